"""From sections of a config to the keywords of what is built from them, by name."""

import inspect
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict


def keywords(target: Callable[..., Any], *sections: ConfigDict) -> dict[str, Any]:
    """{name: value} of those fields of the sections that a function, or a dataclass, has parameters for.

    A new field of a section so reaches a dataclass by its name: `LossConfig(**keywords(LossConfig, config.loss))`.
    """
    names = inspect.signature(target).parameters
    return {name: value for section in sections for name, value in section.items() if name in names}
