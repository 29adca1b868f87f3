"""Finds out whether a config fits a TPU topology, and how fast it runs there, without a TPU.

    rlver plan --config=FILE[:ARG] --topology=v5p:4x4x4 [--slices=N] [--config.a.b=v …] [--remat] [--json=FILE]

The real programs are compiled ahead of time by the TPU compiler: pip install -e '.[tpu]' in the clone (on any machine).
Prints memory of a chip while each program of a training step runs, with all that is alive beside it; operations, bytes
and collectives of each phase; and a prediction of the time. A model is given by its folder (policy.path:
config.json and the tokenizer are read, no weights) or its size (policy.size=7b).
Exit status: 0 it fits, 1 it does not, or an array exists that must not, 2 bad usage, 130 interrupted.
"""

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: planning leaves accelerators alone

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax.config.flags import config_from_flags, define_path
from rlver_jax.config.lora_fields import rounding_faults
from rlver_jax.config.validate import ConfigError, flatten, validate
from rlver_jax.miniature.assets import POLICY, shipped
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.perf.chips import chip_of, topology_devices
from rlver_jax.perf.plan_measure import GIB, compile_all
from rlver_jax.perf.plan_phases import phases_of
from rlver_jax.perf.plan_programs import Shapes, Texts, abstract_agents, bytes_per_chip, programs_of, shapes_of
from rlver_jax.perf.plan_remat import remats_of
from rlver_jax.perf.plan_remedies import find_remedy, over
from rlver_jax.perf.plan_report import Plan, show
from rlver_jax.profiles.sources import open_profiles
from rlver_jax.rollout.ready import rollout_model, sampling_params
from rlver_jax.runs.files import write_json
from rlver_jax.text.command import Command, run_command
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training.setup import check_learning, rollout_spec

PREFIX, FIRST_TALK = 2688, 128  # tokens: RLVER's 500 published training profiles under Qwen2.5's tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("plan", _plan, argv)


def _plan(command: Command, argv: Sequence[str]) -> int:
    config, options = _arguments(argv)
    validate(config)  # what needs no devices, and so no TPU compiler
    check_learning(config)
    if faults := list(rounding_faults(flatten(config))):
        raise ConfigError("; ".join(faults))
    devices = topology_devices(options.topology, options.slices)
    validate(config, len(devices))
    mesh = make_mesh(**config.mesh, devices=devices)
    # What is compiled for chips that aren't there can be written to the cache of compiled programs, but not read.
    jax.config.update("jax_enable_compilation_cache", False)
    with command.errors.status("planning"):
        tell = lambda text: command.errors.print(text, highlight=False)  # noqa: E731
        plan = make_plan(config, options.topology, mesh, tell, remats=options.remat)
    show(plan, command.console)
    if options.json:
        write_json(Path(options.json), plan.to_json())
    return 0 if plan.fits and not plan.faults else 1


def _arguments(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("topology", None, "TPU chips, as FAMILY:SIZES, e.g. v5e:2x4", flag_values=values)
        what = "so many slices of it, joined by mesh.replica over the data center's network"
        flags.DEFINE_integer("slices", 1, what, flag_values=values)
        what = "also compile the update under each remat policy, and name the lightest that fits"
        flags.DEFINE_boolean("remat", False, what, flag_values=values)
        define_path("json", None, "file that the whole plan is written to as well", values, new="file")

    config, options, rest = config_from_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --topology=v5e:2x4; --help lists them")
    if not options.topology:
        raise ConfigError("no --topology was given; name the chips to plan for, e.g. --topology=v5e:2x4")
    chip_of(options.topology)
    return config, options


def make_plan(config: ConfigDict, topology: str, mesh: Mesh, tell: Any, remats: bool = False) -> Plan:
    """Compiles and measures everything.

    Args:
        mesh: of training, over the topology's devices.
        tell: gets messages: what is being compiled, and the results.
        remats: whether to try every remat policy.

    Raises:
        ValueError, OSError: the config doesn't fit the mesh, or a model is not named.
    """
    began, chip = time.monotonic(), chip_of(topology)
    texts, assumed = texts_of(config)
    remake = lambda changed: shapes_of(changed, mesh, texts)  # noqa: E731
    shapes: Shapes = remake(config)
    measurements = compile_all(programs_of(shapes), shapes, tell)
    remedy = None
    if any(over(one, chip) > 0 for one in measurements):
        remedy = find_remedy(config, mesh, measurements, chip, remake, tell)
    if config.rollout.param_dtype and config.eval.every:
        assumed.append(evaluations_unplanned(shapes))
    tried = remats_of(config, shapes, measurements, chip, remake, tell) if remats else []
    playing = shapes.agents.mesh or mesh
    return Plan(
        topology, chip, dict(mesh.shape), dict(playing.shape), config.rollout.batch, shapes.lengths[-1], measurements,
        phases_of(shapes, measurements, chip), remedy, tried, assumed,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.monotonic() - began,
        len({getattr(device, "slice_index", 0) for device in mesh.devices.flat}), config.train.steps,
    )  # fmt: skip


def evaluations_unplanned(shapes: Shapes) -> str:
    """What evaluations need beyond the programs of a step, where these play a rounded policy."""
    policy, mesh = shapes.agents.policy.model, shapes.agents.mesh
    rounded = rollout_model(shapes.config, policy)
    unrounded, narrow = (bytes_per_chip(sampling_params(model, mesh)) for model in (policy, rounded))
    return (
        f"evaluations play the policy unrounded: its copy takes {(unrounded - narrow) / GIB:.2f} GiB a chip more than "
        f"the one that plays in training, which is in no sum above"
    )


def texts_of(config: ConfigDict) -> tuple[Texts, list[str]]:
    """How long prompts and profiles are, and what of it is assumed for want of a tokenizer or of profiles.

    Raises:
        ValueError, OSError: what the config names cannot be read.
    """
    assumed = [
        "every dialogue takes all its turns, every text its limit, and every packed sequence the greatest length"
    ]
    language = config.data.language
    if config.policy.path:
        tokenizer = load_tokenizer(config.policy.path)
    else:
        tokenizer, language = load_tokenizer(shipped() / POLICY), "en"
        assumed.append(
            "prompts: the English ones under the miniature's tokenizer, a little longer than under Qwen2.5's"
        )
    prefix, first = PREFIX, FIRST_TALK
    if config.policy.path and config.data.train:
        prefix, first = _widths(config, tokenizer)
    else:
        assumed.append(
            f"profiles: {prefix} tokens of prefix and {first} of first words, as RLVER's published ones have"
        )
    return Texts(tokenizer, language, prefix, first), assumed


def _widths(config: ConfigDict, tokenizer: Any) -> tuple[int, int]:
    agents = abstract_agents(config, tokenizer, config.data.language, rollout_spec(config))
    tokens = agents.tokens(open_profiles(config, "data.train"))
    return tokens.prefix_width, tokens.first_width


if __name__ == "__main__":
    sys.exit(main())
