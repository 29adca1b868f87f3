"""Requests to models behind endpoints and what they cost; answers from the cache count as any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the client needs the extra `remote`; counts don't
    from rlver_jax.endpoints.completion import Answer

COUNTS = ("requests", "asked_again", "prompt_tokens", "completion_tokens")


@dataclass
class Usage:
    """What one agent of a dialogue, or a judge of it, cost: the same whatever was interrupted."""

    requests: int = 0
    asked_again: int = 0  # because an answer could not be read
    prompt_tokens: int = 0
    completion_tokens: int = 0
    models: set[str] = field(default_factory=set)  # as the endpoint names what answered

    def add(self, answer: Answer, *, again: bool) -> None:
        """Counts one answer."""
        self.requests += 1
        self.asked_again += again
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.models |= {answer.model} - {""}

    def to_json(self) -> dict[str, Any]:
        """In JSON's types, as it stands in logs."""
        return asdict(self) | {"models": sorted(self.models)}


def priced(used: Mapping[str, Any], prices: tuple[float, float]) -> dict[str, Any]:
    """What `Usage.to_json` gave, with its `cost`.

    Args:
        prices: of a million tokens read, and generated.
    """
    used = {**used, **{name: _sane(used[name]) for name in COUNTS}}
    return used | {"cost": (used["prompt_tokens"] * prices[0] + used["completion_tokens"] * prices[1]) / 1e6}


def _sane(count: Any) -> int:
    """A count of a log; 0 where an older version has taken over what a server made up."""
    return int(count) if isinstance(count, int) and 0 <= count < 2**53 else 0


def summed(used: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of what `priced` gave, and the names of all models."""
    sums = {name: sum(one[name] for one in used) for name in (*COUNTS, "cost")}
    return sums | {"models": sorted({model for one in used for model in one["models"]})}


def usage_text(used: Mapping[str, Any]) -> str:
    """`summed` in a line."""
    cost = f", cost {used['cost']:.4f}" if used["cost"] else ""
    return (
        f"{used['requests']} requests ({used['asked_again']} asked again), "
        f"{used['prompt_tokens']} + {used['completion_tokens']} tokens{cost}"
    )
