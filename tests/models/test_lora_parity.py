"""Adapters against `peft` on torch in float64 (extra `parity`): loss, gradients, merged logits, and its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.families import Qwen3Config
from rlver_jax.models.hf_weights import save_params
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.lora import LoRA, applied, merged
from rlver_jax.models.peft_files import save_adapter, with_adapter
from rlver_jax.models.qwen import Qwen2, head
from tests.conftest import random_params
from tests.models.test_lora import CONFIG, SOME, TOKENS, drawn, forward

pytestmark = pytest.mark.parity
QWEN3 = Qwen3Config(58, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=16)
FACTORS = {"lora_A": "lora_a", "lora_B": "lora_b"}


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch", reason="extra `parity` is not installed")
    return pytest.importorskip("peft", reason="extra `parity` is not installed")


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("config", "lora"),
    [(CONFIG, LoRA(4, 6.0)), (CONFIG, SOME), (QWEN3, LoRA(4, 6.0))],
    ids=["all", "rank_stabilized", "qwen3"],
)
def test_loss_gradients_and_merged_logits_are_those_of_peft(peft, config, lora, scan, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = Qwen2(config, scan_layers=scan)
    params, adapter = random_params(model, 1), drawn(model, lora)
    save_params(tmp_path / "base", params, config, dtype="float32")
    save_adapter(tmp_path / "adapter", adapter, config, lora, base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).to(torch.float64)
    ids = torch.tensor(TOKENS.astype(np.int64))
    wanted = theirs(ids, labels=ids)
    wanted.loss.backward()

    def loss(adapter):
        whole = applied(params, adapter, lora)
        positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
        hidden, _ = model.apply({"params": whole}, jnp.asarray(TOKENS), positions)
        return -token_logprobs(hidden[:, :-1], head(whole), jnp.asarray(TOKENS[:, 1:]), chunk=20).logprob.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapter)
    assert float(value) == pytest.approx(wanted.loss.item(), rel=1e-5)
    checked = 0
    for name, parameter in theirs.named_parameters():
        if "lora_" not in name:
            assert parameter.grad is None
            continue
        words = name.split(".")
        i, factor = int(words[words.index("layers") + 1]), next(x for x in words if x in FACTORS)
        matrix, where = words[words.index(factor) - 1].removesuffix("_proj"), words[words.index("layers") + 2]
        ours = gradient["layers"] if scan else gradient[f"layer_{i}"]
        ours = (ours["attn"] if where == "self_attn" else ours)[matrix][FACTORS[factor]]
        ours, grad = np.asarray(ours[i] if scan else ours).T, parameter.grad.numpy()
        assert np.linalg.norm(ours - grad) <= 1e-5 * np.linalg.norm(grad), name
        checked += 1
    assert checked == 2 * 2 * len(lora.targets)
    whole = merged(applied(params, adapter, lora))
    with torch.no_grad():
        logits = theirs.merge_and_unload()(ids).logits.numpy()
    actual = np.asarray(forward(model, whole))
    assert np.linalg.norm(actual - logits) <= 1e-5 * np.linalg.norm(logits)
    assert np.linalg.norm(np.asarray(forward(model, params)) - logits) > 0.05 * np.linalg.norm(logits)


def test_an_adapter_of_peft_is_read(peft, tmp_path):
    """Made and saved by peft: our merged logits are its own."""
    import torch
    from transformers import AutoModelForCausalLM

    model = Qwen2(CONFIG)
    save_params(tmp_path / "base", random_params(model, 1), CONFIG, dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    kinds = {"r": 3, "lora_alpha": 7, "target_modules": ["k_proj", "gate_proj"], "init_lora_weights": False}
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", use_rslora=True, **kinds))
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
    actual = np.asarray(forward(model, with_adapter(random_params(model, 1), model, tmp_path / "adapter")))
    assert np.linalg.norm(actual - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert np.linalg.norm(np.asarray(forward(model, random_params(model, 1))) - wanted) > 0.1 * np.linalg.norm(wanted)
