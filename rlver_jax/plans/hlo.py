"""Reads optimized HLO: which collectives run, how often, with how many bytes; and which arrays exist."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
BYTES |= {"bool": 1, "bfloat16": 2, "float16": 2, "int16": 2}  # the rest: 4

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_RESULT = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_SHAPE = re.compile(r"\b(pred|[subf]\w*\d)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\]<=|mesh\[([^\]]*)\]\s*\{([^}]*)\})")


class Instruction(NamedTuple):
    """One line of a computation; `shapes` are those of its result, on one chip."""

    name: str
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    rest: str  # operands and attributes
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the program it comes from: names of functions and scopes, joined by slashes."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The computation that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


class Use(NamedTuple):
    """Collectives of one kind in one phase, on one chip."""

    times: float
    bytes: float  # that arrive from other chips, with the ring algorithms' volumes


Uses = dict[tuple[str, str], Use]  # by (phase, kind)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program's text, parsed."""

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Module":
        """From `compiled.as_text()`."""
        computations: dict[str, list[Instruction]] = {}
        entry, current = "", []
        for line in text.splitlines():
            head = _COMPUTATION.match(line)
            if head:
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
                continue
            found = _RESULT.match(line)
            if found:
                shapes = tuple((t, tuple(map(int, filter(None, d.split(","))))) for t, d in _SHAPE.findall(found[3]))
                current.append(Instruction(found[2], found[4], shapes, found[5], bool(found[1])))
        return cls(computations, entry)

    def collectives(self, phase: str, phase_of: Callable[[str], str | None], trips_of: Callable[[str], float]) -> Uses:
        """Collectives of one run of the program.

        Args:
            phase: where no op says another.
            phase_of: phase of an op's name; None: that of what calls it.
            trips_of: turns of a loop whose condition the data decides, by the op's name.
        """
        walk = _Walk(self, phase_of, trips_of)
        return walk.uses(self.entry, phase, set())

    def arrays(self) -> dict[tuple[str, tuple[int, ...]], Instruction]:
        """Every array that gets memory of its own, by dtype and shape: what lies inside a fusion does not."""
        inside = {
            found for body in self.computations.values() for op in body if op.kind == "fusion"
            for found in _CALLS.findall(op.rest)
        }  # fmt: skip
        return {
            shape: op
            for name, body in self.computations.items()
            if name not in inside
            for op in body
            for shape in op.shapes
        }


@dataclasses.dataclass(frozen=True)
class _Walk:
    module: Module
    phase_of: Callable[[str], str | None]
    trips_of: Callable[[str], float]

    def uses(self, name: str, phase: str, seen: set[str]) -> Uses:
        """Of one run of a computation. `seen`: channels counted already in this run of the loop around it.

        A collective that the compiler has spread over several fusions stands in each of them under one channel.
        """
        total: Uses = {}
        for op in self.module.computations.get(name, ()):
            here = self.phase_of(op.op_name) or phase
            kind = op.kind.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", op.rest)
                if channel is None or channel[1] not in seen:
                    _add(total, {(here, kind): Use(1, _bytes_received(op, kind))})
                seen |= {channel[1]} if channel else set()
            elif op.kind == "while":
                known = trip_count(self.module, op)
                turns = self.trips_of(op.op_name) if known is None else known
                for part in ("body", "condition"):
                    _add(total, self.uses(op.attribute(part), here, set()), turns)
            elif op.kind == "conditional":
                names = [n.strip(" %") for a, b in _BRANCHES.findall(op.rest) for n in (a or b).split(",")]
                branches = [self.uses(n, here, set(seen)) for n in names]
                _add(total, max(branches, key=lambda u: sum(x.bytes for x in u.values()), default={}))
            elif op.kind in ("fusion", "call", "async-start"):
                for called in _CALLS.findall(op.rest):
                    _add(total, self.uses(called, here, seen))
        return total


def _add(total: Uses, more: Uses, times: float = 1) -> None:
    for key, use in more.items():
        old = total.get(key, Use(0, 0))
        total[key] = Use(old.times + times * use.times, old.bytes + times * use.bytes)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Turns of a loop that counts from 0 to a constant; None: its condition looks at data."""
    ops = list(module.computations.get(loop.attribute("condition"), ()))
    ops += [
        op for outer in list(ops) for name in _CALLS.findall(outer.rest) for op in module.computations.get(name, ())
    ]
    constants = [int(found[1]) for op in ops if op.kind == "constant" and (found := re.match(r"(\d+)\)", op.rest))]
    counts = Counter(op.kind for op in ops)
    if counts["compare"] != 1 or counts["all-reduce"] or counts["reduce"] or len(constants) != 1:
        return None
    compare = next(op for op in ops if op.kind == "compare")
    return constants[0] + ("direction=LE" in compare.rest)


def array_bytes(dtype: str, sizes: tuple[int, ...]) -> int:
    """Bytes of an array without the padding of its layout."""
    return math.prod(sizes) * BYTES.get(dtype, 4)


def _bytes_received(op: Instruction, kind: str) -> float:
    sizes = [array_bytes(*shape) for shape in op.shapes if len(shape[1]) or len(op.shapes) == 1]
    if op.kind.endswith("-start") and kind in ("all-gather", "reduce-scatter", "all-to-all"):
        sizes = sizes[len(sizes) // 2 :]  # operands first, then results
    size = sizes[0] if kind == "collective-permute" else sum(sizes)
    n = group_size(op.rest)
    factor = {
        "all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }  # fmt: skip
    return size * factor[kind]


@functools.lru_cache(maxsize=1024)
def group_size(attributes: str) -> int:
    """Chips that a collective goes over."""
    found = _GROUPS.search(attributes)
    if not found:
        return 2
    if found[1] is not None:
        return max(len(found[1].split(",")), 1)
    if found[3] is not None:
        return int(found[3])
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[4])}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[5]))
