"""Imports of transformers without its advice to install PyTorch, which nothing here needs."""

import contextlib
import os
from collections.abc import Iterator

_VARIABLE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Within this context importing transformers prints nothing about PyTorch."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE)
        if before is not None:
            os.environ[_VARIABLE] = before
