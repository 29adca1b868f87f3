"""Fits a small Qwen2.5 to training sequences (next-token cross-entropy), with a progress bar."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from rlver_jax.decoding.cache import LM
from rlver_jax.miniature.sequences import SequenceBatch
from rlver_jax.models.architecture import Qwen2Config
from rlver_jax.models.qwen import Params, Qwen2, init_params, logits
from rlver_jax.text.progress import Meter


def small_model(vocab_size: int, *, hidden: int = 128, mlp: int = 384, layers: int = 4) -> Qwen2:
    """The miniature's architecture: 4 query heads, 2 key heads, float32, unrolled for CPU."""
    config = Qwen2Config(
        vocab_size, hidden, mlp, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=hidden // 4, rope_theta=1e4,
        tie_embeddings=True,
    )  # fmt: skip
    # Chunks of queries: scores that stay in the cores' caches cost a fifth less a step.
    return Qwen2(config, scan_layers=False, attention="chunked", attention_chunk=112)


LEARNED = 0.45  # largest share of a batch's positions that may have a target: logits are computed for these only


def target_positions(target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(position, token) of all targets in the flattened batch, padded to LEARNED of the positions with token -1.

    Raises:
        ValueError: there are more.
    """
    flat = target.reshape(-1)
    nonzero, size = np.flatnonzero(flat >= 0), int(flat.size * LEARNED)
    if len(nonzero) > size:
        raise ValueError(f"{len(nonzero)} of {flat.size} positions have a target; raise fit.LEARNED above {LEARNED}")
    positions, tokens = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    positions[: len(nonzero)], tokens[: len(nonzero)] = nonzero, flat[nonzero]
    return positions, tokens


def fit(
    model: Qwen2,
    batch_of: Callable[[int], SequenceBatch],
    steps: int,
    *,
    console: Console,
    name: str,
    learning_rate: float = 2e-3,
    seed: int = 0,
    params: Params | None = None,
) -> tuple[LM, float]:
    """Trains on `batch_of(step)`; returns the model and the mean loss a token over the last tenth of the steps.

    Args:
        params: to begin with; fresh ones if None.
    """
    params = init_params(model, jax.random.key(seed)) if params is None else params
    warmup = min(100, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, learning_rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    step = _compiled(model, optimizer)
    state, losses = optimizer.init(params), []
    with Meter(console, steps, "", label=name) as meter:
        for i in range(steps):
            batch = batch_of(i)
            params, state, loss = step(params, state, batch, *target_positions(batch.target))
            losses.append(loss)
            if i % 20 == 19 or i == steps - 1:
                shown = float(jnp.stack(losses[-20:]).mean())
                line = f"{name} {i + 1}/{steps} loss {shown:.4f}" if i % 100 == 99 else ""
                meter.show(i + 1, f"loss {shown:.4f}", line)
    return LM(params, model), float(jnp.stack(losses[-max(1, steps // 10) :]).mean())


@functools.cache
def _compiled(model: Qwen2, optimizer: optax.GradientTransformation):
    def loss_of(params: Params, batch: SequenceBatch, positions, tokens):
        hidden = model.apply({"params": params}, batch.tokens, batch.positions, batch.branch)[0]
        scores = logits(params, hidden.reshape(-1, hidden.shape[-1])[positions])
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(tokens, 0))
        return jnp.where(tokens >= 0, losses, 0).sum() / jnp.maximum((tokens >= 0).sum(), 1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state, batch: SequenceBatch, positions, tokens):
        loss, gradient = jax.value_and_grad(loss_of)(params, batch, positions, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step
