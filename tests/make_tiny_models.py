"""Trains the two tiny models of the dialogue tests and writes them to tests/golden; run it when their texts change.

    python -m tests.make_tiny_models

They write think-then-say replies and short lines: random weights would never close a thought or end a line.
"""

import random
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from rlver_jax.decoding.cache import LM
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.qwen import Qwen2, logits
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import HFTokenizer
from tests.conftest import GOLDEN, SHORT_PROMPTS, TINY, random_params, vocabulary
from tests.text.conftest import write_bpe

PHRASES = ["felt awful", "did not listen", "said goodbye", "my boss", "I", "my sister", "and she", "2024", "知道", "不"]


def _phrase(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(PHRASES, k=draw.randint(1, most))) + draw.choice([".", "", "。"])


def _policy_text(tokenizer, draw: random.Random) -> list[int]:
    chat, think = ChatTemplate(tokenizer), draw.random() < 0.7
    tokens = chat.message("system", SHORT_PROMPTS["policy_think.j2" if think else "policy_direct.j2"])
    for _ in range(2):
        tokens += chat.message("user", _phrase(draw, 3)) + chat.open("assistant")
        if think:
            close = draw.choice(["\n</think>\n\n", "</think>\n", "\n</think>"])
            tokens += tokenizer.encode("<think>\n") + tokenizer.encode(_phrase(draw, 1) + close)
        tokens += tokenizer.encode(_phrase(draw, 4)) + chat.close
    return tokens


def _user_text(tokenizer, draw: random.Random) -> list[int]:
    chat = ChatTemplate(tokenizer)
    tokens = chat.message("system", _phrase(draw, 3)) + chat.message("user", "Go.") + chat.open("assistant")
    tokens += tokenizer.encode(_phrase(draw, 3)) + chat.close + chat.message("user", _phrase(draw, 4))
    tokens += chat.open("assistant")
    fill = lambda s: s.replace("{emotion}", str(draw.randint(0, 100))).replace("{band}", draw.choice("SABCF"))  # noqa: E731
    script = SHORT_PROMPTS["appraisal.script"] + "\n" + SHORT_PROMPTS["reply.script"]
    script = re.sub("<<free:.*>>", lambda _: _phrase(draw, 3), fill(script))
    change = draw.randint(-10, 10)
    script = script.replace("<<choose:change>>", f"{change:+d}" if change else "0")
    bye = "\n" if draw.random() < 0.8 else " goodbye.\n"
    return tokens + tokenizer.encode(script + bye)


def train_tiny(tokenizer, text, sizes: dict, *, seed: int, steps: int = 60, width: int = 144) -> LM:
    """A tiny model fitted to what `text(tokenizer, random)` writes. Some embedding rows have no token."""
    config = Qwen2Config(tokenizer.vocab_size + 9, head_dim=16, rope_theta=1e4, **sizes)
    model = Qwen2(config, scan_layers=False)
    draw = random.Random(seed)
    batches = np.zeros((steps, 8, width), np.int32)
    for row in batches.reshape(-1, width):
        tokens = text(tokenizer, draw)[:width]
        row[: len(tokens)] = tokens
    optimizer = optax.adam(optax.linear_schedule(1e-2, 1e-3, steps))

    def loss(params, tokens):
        hidden, _ = model.apply({"params": params}, tokens, jnp.broadcast_to(jnp.arange(width), tokens.shape))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, hidden[:, :-1]), tokens[:, 1:])
        return (losses * (tokens[:, 1:] > 0)).mean()

    def step(carry, tokens):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    params = random_params(model, seed)
    state, losses, step = (params, optimizer.init(params)), [], jax.jit(step)
    for batch in batches:
        state, value = step(state, batch)
        losses.append(value)
    params = state[0]
    assert losses[-1] < 0.5 * losses[0], "the tiny model has learned nothing"
    return LM(params, model)


def main() -> None:
    """Writes both models."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = HFTokenizer(write_bpe(Path(folder)))
        models = {
            "policy": train_tiny(tokenizer, _policy_text, TINY["policy"], seed=0, steps=130, width=104),
            "user": train_tiny(tokenizer, _user_text, TINY["user"], seed=1),
        }
    GOLDEN.mkdir(exist_ok=True)
    for name, lm in models.items():
        leaves = jax.tree_util.tree_leaves_with_path(lm.params)
        arrays = {"/".join(key.key for key in path): np.asarray(x) for path, x in leaves} | {
            "vocabulary": vocabulary(tokenizer)
        }
        safetensors.numpy.save_file(arrays, GOLDEN / f"{name}.safetensors")


if __name__ == "__main__":
    main()
