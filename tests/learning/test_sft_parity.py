"""Supervised fine-tuning against transformers on torch in float64 (extra `parity`): the loss, and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.learning.sft_loss import FieldLoss
from rlver_jax.models.hf_weights import load_params, save_params
from tests.learning.plain_sft import policy_lines, transcripts, user_lines
from tests.learning.test_sft_loss import (
    LENGTH,
    WEIGHTS,
    agents,
    field_weights_of,
    lm,
    loss_and_gradient,
    made,
    rows_of,
)

pytestmark = pytest.mark.parity
__all__ = ["agents", "lm"]  # fixtures


@pytest.mark.parametrize("role", ["user", "policy"])
def test_loss_and_gradients_are_those_of_transformers(agents, lm, role, bpe_folder, tmp_path):
    torch = pytest.importorskip("torch", reason="extra `parity` is not installed")
    from transformers import AutoModelForCausalLM

    save_params(tmp_path / "model", lm.params, lm.model.config, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    make, examples, _ = made(agents, role, 2)
    dialogues, tokenizer = transcripts(), agents.tokenizer
    of_turns = user_lines if role == "user" else lambda *arguments: policy_lines(*arguments[:2])
    lines = [line for one in dialogues for line in of_turns(tokenizer, one, 2)]
    weights = dict(zip(make.fields, field_weights_of(make, lines, WEIGHTS), strict=True))
    total = torch.zeros((), dtype=torch.float64)
    for line in lines:
        ids = torch.tensor([line.context + line.tokens])
        logprob = torch.log_softmax(theirs(ids).logits[0, len(line.context) - 1 : -1], dim=-1)
        total -= weights[line.field] * line.share * logprob[range(len(line.tokens)), line.tokens].sum()
    total.backward()

    of, vector = FieldLoss(lm.model, len(make.fields), vocab_chunk=100), jnp.float32(list(weights.values()))
    sums, gradient = loss_and_gradient(of, lm.params, rows_of(examples, LENGTH)[0], vector)
    assert float((sums * vector).sum()) == pytest.approx(total.item(), rel=1e-5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.to(torch.float32).save_pretrained(tmp_path / "gradient")
    wanted = load_params(tmp_path / "gradient", lm.model)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    assert largest > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, wanted)
