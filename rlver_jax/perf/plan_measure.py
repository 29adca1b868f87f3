"""Compiles the programs of a training step and measures them: memory of a chip, collectives, forbidden arrays."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from rlver_jax.models.attention import MOST_BLOCKS
from rlver_jax.parallel.mesh import batch_parts
from rlver_jax.perf.chips import Torus
from rlver_jax.perf.hlo import HOST, UNKNOWN, Instruction, Module, Uses, array_bytes
from rlver_jax.perf.plan_programs import Program, Shapes, bytes_per_chip
from rlver_jax.training.setup import dialogues_an_update, microbatches_at_most, updates_at_most

GIB = 2**30
AT_ONCE = 2  # programs that are compiled
LARGE = GIB  # bytes from which on an array that is whole on every chip is worth a warning
# The compiler's two ways to say that a program is too large: while it is planned, and after.
_EXCEEDED = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|\(([\d.]+)([KMG])\) exceeds available HBM")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}

# Scopes of `jax.named_scope` in the programs -> phases of a step; the first that an op's name holds counts.
PHASES = {
    "open_dialogues": "prefill",
    "policy_turn": "policy turns",
    "user_turn": "user turns",
    "prepare": "values and log-probs",
    "moved": "values and log-probs",
    "critic": "critic update",
}
# Phase of all other ops.
FIRST = {
    "copy policy": "copy policy",
    "copy user": "copy user",
    "play": "prefill",
    "pack": "pack",
    "learn": "policy update",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip while a program runs. A program that doesn't fit has no parts, only `program`."""

    arguments: int
    outputs: int  # without those that lie in arguments' buffers
    temporaries: int
    code: int
    idle: int  # what stays alive beside it
    program: int  # all but idle

    @property
    def total(self) -> int:
        """All that is alive at once."""
        return self.program + self.idle


@dataclasses.dataclass(frozen=True)
class Measured:
    """One program, compiled.

    Attributes:
        collectives: of one run, by phase and kind; empty where it doesn't fit.
        faults: arrays that must not exist.
        warnings: arrays that could be smaller.
        copied: bytes that one run reads and writes to lay large arrays out anew, by phase.
    """

    name: str
    memory: Memory
    idle: dict[str, int]
    collectives: Uses
    faults: list[str]
    warnings: list[str]
    compile_s: float
    copied: dict[str, float] = dataclasses.field(default_factory=dict)


def phase_of(op_name: str) -> str | None:
    """Phase of an op by the scopes in its name; None: not known from the name."""
    return next((phase for scope, phase in PHASES.items() if re.search(rf"[/(]{scope}[/)]", op_name)), None)


def turns_of_loops(shapes: Shapes) -> Callable[[str], float]:
    """How often loops run whose end the data decides: with every dialogue and every text at its limit."""
    config, spec = shapes.config, shapes.agents.spec
    tables = shapes.agents.tables[1]
    considerations = len(tables.reply.names)
    rounds = -(-config.rollout.batch // spec.rows_of(config.rollout.batch))
    dialogues = config.rollout.batch, dialogues_an_update(config)
    microbatches = [microbatches_at_most(config, shapes.mesh, number) for number in dialogues]
    reply = ((considerations - 1) * config.user.field_tokens + config.user.reply_tokens) / considerations

    def turns(op_name: str) -> float:
        if re.search(r"[/(]reads[/)]", op_name):
            return microbatches["prepare" not in op_name]
        if re.search(r"[/(]attn/while", op_name):
            return MOST_BLOCKS  # of a cache
        if pieces := re.search(r"[/(]pieces_(\d+)/while[^/]*$", op_name):
            return int(pieces[1])
        if "policy_turn" in op_name:
            return spec.policy_tokens
        if "appraise" in op_name:
            return config.user.field_tokens
        if "/reply/" in op_name:
            return reply
        if "open_dialogues" in op_name:
            return 0  # profiles hold their first utterance
        if re.search(r"[/(]updates[/)]", op_name):
            return updates_at_most(config)
        return spec.max_turns * rounds if "sample_dialogues" in op_name else 1

    return turns


def measure(program: Program, shapes: Shapes) -> Measured:
    """Compiles a program for the topology's chips.

    Raises:
        jax.errors.JaxRuntimeError: the compiler fails for another reason than memory.
    """
    began = time.monotonic()
    idle = {name: bytes_per_chip(tree) for name, tree in program.idle.items()}
    warnings = _replicated(program, shapes)
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        match = _EXCEEDED.search(str(error))
        if not match:
            raise
        used = int(float(match[1] or match[3]) * _UNITS[match[2] or match[4]])
        memory = Memory(0, 0, 0, 0, sum(idle.values()), used)
        return Measured(program.name, memory, idle, {}, [], warnings, time.monotonic() - began)
    seconds = time.monotonic() - began
    memory = _memory(compiled, sum(idle.values()), bytes_per_chip(program.again))
    module = Module.parse(compiled.as_text())
    torus = Torus.of(shapes.mesh.devices.flat)  # both meshes take the devices in one order
    walked = FIRST[program.name], phase_of, turns_of_loops(shapes)
    uses, copied = module.collectives(*walked, torus.hops), module.copied(*walked)
    faults = _logits(module, shapes) if program.name == "learn" else []
    warnings += _gathered(module) + uncounted(uses)
    return Measured(program.name, memory, idle, uses, faults, warnings, seconds, copied)


def _memory(compiled: Any, idle: int, again: int) -> Memory:
    """`again`: bytes of arguments that lie in the buffers of others."""
    sizes = compiled.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    parts = (
        sizes.argument_size_in_bytes - again,
        outputs,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
    )
    return Memory(*parts, idle, sum(parts))


def _replicated(program: Program, shapes: Shapes) -> list[str]:
    """Large arguments that every chip holds whole."""
    warnings = []
    for path, x in jax.tree_util.tree_leaves_with_path(program.arguments):
        size = array_bytes(x.dtype.name, x.shape)
        if shapes.mesh.size > 1 and size >= LARGE and x.sharding.is_fully_replicated:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            warnings.append(
                f"{name} {x.shape}: {size / GIB:.1f} GiB, whole on every chip; split it in parallel/rules.py"
            )
    return warnings


def _gathered(module: Module) -> list[str]:
    """Large arrays that a collective makes whole."""
    ops = [op for body in module.computations.values() for op in body if op.kind.startswith("all-gather")]
    sized = {(op.shapes[-1], op.op_name): array_bytes(*op.shapes[-1]) for op in ops if op.shapes}
    return [
        f"{dtype}{list(sizes)}: {size / GIB:.1f} GiB gathered on each chip, in {name or 'an op without a name'}"
        for ((dtype, sizes), name), size in sized.items()
        if size >= LARGE
    ]


def uncounted(uses: Uses) -> list[str]:
    """Transfers whose volume or time this version doesn't know."""
    warnings = []
    for (phase, kind), use in sorted(uses.items()):
        size = f"{kind.removesuffix(UNKNOWN)} in {phase}: {use.times:,.0f} of {use.bytes / 1e9:.2f} GB"
        if kind.endswith(UNKNOWN):
            warnings.append(
                f"{size} in all; this version doesn't know what it sends and counts the bytes of its result"
            )
        elif kind.startswith(HOST):
            warnings.append(f"{size} in all, over the link of chip and host, whose time is not counted")
    return warnings


def _logits(module: Module, shapes: Shapes) -> list[str]:
    """Arrays of the size of one microbatch's logits: [B, L, V], however they are cut and laid out."""
    config, mesh = shapes.config, shapes.mesh
    model = shapes.agents.policy.model.config
    dialogues = config.rollout.batch // (config.train.minibatches * config.train.microbatches) // batch_parts(mesh)
    positions = (1 if config.train.share_rows else dialogues) * shapes.lengths[-1]
    return logits_among(module.arrays(), positions, model.vocab_size, mesh.shape["tensor"], model.hidden_size)


def logits_among(
    arrays: dict[tuple[str, tuple[int, ...]], Instruction], positions: int, vocab: int, shards: int, width: int
) -> list[str]:
    """Float arrays with an axis of the vocabulary, or of a shard of it, for `positions` or more tokens.

    Args:
        width: of the model: the head and its gradient have a vocabulary axis, too.
    """
    faults = []
    for (dtype, sizes), op in arrays.items():
        axes = [n for n in (vocab, vocab // shards) if n in sizes]
        rest = math.prod(sizes) // max(axes) if axes else 0
        if axes and "f" in dtype and rest >= positions and width % (rest or 1) and rest != width:
            faults.append(f"{dtype}{list(sizes)} holds logits of every token, in {op.op_name or op.name}")
    return faults


def compile_all(programs: Sequence[Program], shapes: Shapes, tell: Callable[[str], None]) -> list[Measured]:
    """All programs, two at a time; `tell` gets messages on progress and results.

    The compiler works on one core for the most part, and takes up to 5 GiB of memory for a program of 7B.
    """

    def one(program: Program) -> Measured:
        tell(f"compiling {program.name}")
        measurement = measure(program, shapes)
        total, seconds = measurement.memory.total / GIB, measurement.compile_s
        tell(f"{program.name}: {total:.2f} GiB a chip with all that is alive beside it (compiled in {seconds:.0f} s)")
        return measurement

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, programs))
