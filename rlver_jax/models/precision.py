"""The precision that sums and nonlinearities are computed in, whatever the dtype of a model's activations."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def accum_dtype(*dtypes: DTypeLike) -> Any:
    """float32, or float64 where an argument is (finite differences need it): never less than float32."""
    return jnp.result_type(jnp.float32, *(jnp.dtype(dtype) for dtype in dtypes))


def matmul_options(dtype: DTypeLike) -> dict[str, Any]:
    """Options of a product that loses nothing of its operands (of one dtype), accumulated in `accum_dtype`.

    Left alone, accelerators round float32 operands before they multiply: TPUs to bfloat16, GPUs to 10 bits.
    """
    rounded = jnp.dtype(dtype).itemsize < 4
    return {
        "preferred_element_type": accum_dtype(dtype),
        "precision": None if rounded else jax.lax.Precision.HIGHEST,
    }
