"""Fits a small Qwen2.5 to packed rows (next-token cross-entropy), with a progress bar."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlver_jax.miniature.rows import Rows
from rlver_jax.models.config import Qwen2Config
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.qwen2 import Params, Qwen2, head, init_params
from rlver_jax.sampling.cache import LM


def small_model(rows: int, *, hidden: int = 128, mlp: int = 384, layers: int = 4) -> Qwen2:
    """The miniature's architecture: 4 query heads, 2 key heads, float32, unrolled for CPU."""
    config = Qwen2Config(
        rows, hidden, mlp, num_layers=layers, num_heads=2, num_kv_heads=1, head_dim=hidden // 2, rope_theta=1e4,
        tie_embeddings=True,
    )  # fmt: skip
    return Qwen2(config, scan_layers=False)


def fit(
    model: Qwen2,
    batch_of: Callable[[int], Rows],
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
    warmup = min(100, steps // 10 + 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps, learning_rate / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    step = _compiled(model, optimizer)
    state, losses = optimizer.init(params), []
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=steps, loss="")
        for i in range(steps):
            params, state, loss = step(params, state, batch_of(i))
            losses.append(loss)
            if i % 20 == 19 or i == steps - 1:
                shown = float(jnp.stack(losses[-20:]).mean())
                bar.update(task, completed=i + 1, loss=f"loss {shown:.4f}")
                if not console.is_terminal and i % 100 == 99:
                    console.print(f"{name} {i + 1}/{steps} loss {shown:.4f}", highlight=False)
    return LM(params, model), float(jnp.stack(losses[-max(1, steps // 10) :]).mean())


@functools.cache
def _compiled(model: Qwen2, optimizer: optax.GradientTransformation):
    def loss_of(params: Params, rows: Rows):
        hidden = model.apply({"params": params}, rows.tokens, rows.positions, rows.branch)[0]
        learned = rows.target >= 0
        found = token_logprobs(hidden, head(params), jnp.maximum(rows.target, 0), chunk=4096)
        return -jnp.where(learned, found.logprob, 0).sum() / jnp.maximum(learned.sum(), 1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state, rows: Rows):
        loss, gradient = jax.value_and_grad(loss_of)(params, rows)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step
