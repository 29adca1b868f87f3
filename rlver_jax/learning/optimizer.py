"""AdamW whose arithmetic and second moments are float32, whatever the parameters are kept in; one for each model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlver_jax.models.precision import accum_dtype

LEAST = 0.05  # of the learning rate is left after its decay


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """One for each trained tree; each clips its gradients and counts its steps by itself."""

    policy: optax.GradientTransformation
    critic: optax.GradientTransformation | None = None

    def of(self, name: str) -> optax.GradientTransformation:
        """That of `policy` or `critic`."""
        return getattr(self, name)


@functools.cache  # equal settings give one object: `train_step.compile_step` knows its programs again by it
def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    grad_clip: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    moment_dtype: str,
    adam_eps: float = 1e-8,
    decay_steps: int = 0,
) -> optax.GradientTransformation:
    """AdamW behind a gradient clip (0: none); the learning rate rises linearly over `warmup_steps` updates.

    Then it stays, or falls like a cosine over `decay_steps` updates to a LEAST share of itself. The first update
    already moves: its rate is learning_rate / (warmup_steps + 1). Everything is computed in float32, whatever the
    parameters are kept in, and so is the second moment; the first one is rounded to `moment_dtype` once an update.
    """
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    rate = rise if warmup_steps else learning_rate
    if decay_steps:
        rate = optax.join_schedules(
            [rise, optax.cosine_decay_schedule(learning_rate, decay_steps, LEAST)], [warmup_steps]
        )
    moments = {"b1": beta1, "b2": beta2, "mu_dtype": jnp.dtype(moment_dtype)}
    adam = optax.adamw(rate, eps=adam_eps, weight_decay=weight_decay, **moments)
    # optax clips to a norm of 0 by 0/0.
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return in_float32(optax.chain(clip, adam))


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on float32 parameters, gradients and state; returns float32 updates, to be rounded when they are added.

    Left to itself optax computes in the parameters' precision. In bfloat16 a norm over many arrays stops growing, and
    a second moment never falls, since 0.999 of it is rounded back to all of it. For float32 this changes nothing.
    """

    def init(params: Any) -> Any:
        return inner.init(widened(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(widened(updates), widened(state), widened(params))

    return optax.GradientTransformation(init, update)


def widened(tree: Any) -> Any:
    """Floats of less than float32 in float32; everything else as it is."""
    float_ = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: x.astype(accum_dtype(x.dtype)) if float_(x) else x, tree)
