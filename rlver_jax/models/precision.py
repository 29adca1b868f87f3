"""The precision that sums and nonlinearities are computed in, whatever a model's activations are kept in."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike


def wide(*dtypes: DTypeLike) -> Any:
    """float32, or float64 where an argument is (finite differences need it): never less than float32."""
    return jnp.result_type(jnp.float32, *(jnp.dtype(dtype) for dtype in dtypes))
