"""What to change in a config whose programs don't fit: tried with the compiler, not guessed."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax.config.validate import ConfigError, validate
from rlver_jax.perf.chips import Chip
from rlver_jax.perf.plan_measure import GIB, Measured, compile_all
from rlver_jax.perf.plan_programs import Shapes, programs_of
from rlver_jax.training.learners import has_critic

TRIES = 6  # compilations


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Fields to change, and the largest memory of a chip, in bytes, that programs which did not fit then take."""

    fields: dict[str, Any]
    total: int

    def __str__(self) -> str:
        return f"{flags_of(self.fields)} (compiled: {self.total / GIB:.2f} GiB)"


def flags_of(fields: dict[str, Any]) -> str:
    """Changed fields of a config as its command line takes them."""
    return " ".join(f"--config.{name}={value}" for name, value in fields.items())


def with_fields(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """A copy of a config with fields changed, their names in full."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(fields)
    return changed


def trained_of(config: ConfigDict) -> list[str]:
    """Sections of the config whose layers an update differentiates."""
    return ["policy"] + ["critic"] * (has_critic(config) and config.critic.kind == "separate")


def over(measurement: Measured, chip: Chip) -> int:
    """Bytes by which a program and what is alive beside it exceed a chip; 0 or less: it fits."""
    return measurement.memory.total - int(chip.usable_gib * GIB)


def find_remedy(
    config: ConfigDict,
    mesh: Mesh,
    measurements: Sequence[Measured],
    chip: Chip,
    remake: Callable[[ConfigDict], Shapes],
    tell: Callable[[str], None],
) -> Remedy | None:
    """The first of `candidates`, each on top of those before, with which all that did not fit does; None: none does.

    After `TRIES` compilations only adapters are still tried.

    Args:
        remake: shapes of a changed config.
    """
    failing = [one.name for one in measurements if over(one, chip) > 0]
    fields: dict[str, Any] = {}
    tries = 0
    for step in candidates(config, failing):
        if tries >= TRIES and step.keys() != adapters(config).keys():
            continue
        attempt = with_fields(config, fields | step)
        try:
            validate(attempt, mesh.size)
            shapes = remake(attempt)
        except (ConfigError, ValueError):
            continue
        fields |= step
        programs = [program for program in programs_of(shapes) if program.name in failing]
        tell(f"{', '.join(failing)} too large, trying {', '.join(f'{name}={value}' for name, value in fields.items())}")
        attempted = compile_all(programs, shapes, tell)
        tries += len(attempted)
        if all(over(one, chip) <= 0 for one in attempted):
            return Remedy(fields, max((one.memory.total for one in attempted), default=0))
    return None


def adapters(config: ConfigDict) -> dict[str, Any]:
    """Adapters on a base in bfloat16, in place of all parameters, their gradients and moments (docs/lora.md)."""
    bases = {f"{name}.param_dtype": "bfloat16" for name in trained_of(config)}
    played = {"rollout.param_dtype": ""} if config.rollout.param_dtype else {}  # of weights that change alone
    return {"lora.rank": 16, "lora.alpha": 32.0} | bases | played


def candidates(config: ConfigDict, failing: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Changes, the cheapest first: only the last three change what is learned."""
    trained = trained_of(config)
    if "learn" in failing:
        full = {f"{name}.remat": "full" for name in trained if config[name].remat != "full"}
        full |= {f"{name}.attention": "chunked" for name in trained if config[name].attention == "dense"}
        if full:
            yield full
        yield {"train.microbatches": 2 * config.train.microbatches}
        yield {"train.microbatches": 4 * config.train.microbatches}
    if set(failing) - {"learn"} and config.mesh_sampling.fsdp == 1:
        yield {"mesh_sampling.fsdp": 2, "mesh_sampling.replica": -1}
        yield {"mesh_sampling.fsdp": 4, "mesh_sampling.replica": -1}
    if config.train.moment_dtype != "bfloat16":
        yield {"train.moment_dtype": "bfloat16"}
    if not config.lora.rank:
        yield adapters(config)
    yield {"rollout.batch": config.rollout.batch // 2}
    yield {"rollout.batch": config.rollout.batch // 4}
