"""How much of an update is computed twice to save memory: every remat policy compiled, and the lightest that fits."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from rlver_jax.perf.chips import Chip
from rlver_jax.perf.plan_measure import Measured, compile_all
from rlver_jax.perf.plan_phases import phases_of
from rlver_jax.perf.plan_programs import Shapes, programs_of
from rlver_jax.perf.plan_remedies import flags_of, over, trained_of, with_fields

LIGHTEST_FIRST = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Remat:
    """One policy for all that is trained.

    Attributes:
        fields: of the config, that set it.
        total: bytes of a chip while the update runs, with all that is alive beside it.
        seconds: of the update as `Phase.seconds`.
    """

    fields: dict[str, Any]
    total: int
    seconds: float
    fits: bool

    def __str__(self) -> str:
        return flags_of(self.fields)


def remats_of(
    config: ConfigDict,
    shapes: Shapes,
    measurements: Sequence[Measured],
    chip: Chip,
    remake: Callable[[ConfigDict], Shapes],
    tell: Callable[[str], None],
) -> list[Remat]:
    """The update under each policy, from the one that computes least twice to the one that keeps least.

    Args:
        measurements: programs of `shapes`, what the config says; its update is not compiled again.
        remake: shapes of a changed config.
    """
    trained = trained_of(config)
    remats = []
    for remat in LIGHTEST_FIRST:
        fields = {f"{name}.remat": remat for name in trained}
        now, learn = shapes, [one for one in measurements if one.name == "learn"]
        if any(config[name].remat != remat for name in trained):
            now = remake(with_fields(config, fields))
            tell(f"trying {' '.join(f'{name}={value}' for name, value in fields.items())}")
            learn = compile_all([program for program in programs_of(now) if program.name == "learn"], now, tell)
        seconds = sum(phase.seconds for phase in phases_of(now, learn, chip))
        remats.append(Remat(fields, learn[0].memory.total, seconds, over(learn[0], chip) <= 0))
    return remats


def lightest(remats: Sequence[Remat]) -> Remat | None:
    """The first that fits; None: none does."""
    return next((one for one in remats if one.fits), None)
