"""Reads optimized HLO: which collectives run, how often, with how many bytes; and which arrays exist.

What crosses TPU slices is no collective there: the compiler hands it to the hosts, as a `send` and a `recv` that name
the transfer which the runtime (Megascale) makes of them over the data center's network, DCN.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
DCN, HOST = "DCN ", "host "  # first words of the kinds that take the network between slices, and the host's link
LARGE_COPY = 1 << 24  # bytes from which on a copy counts; less fits beside others in a chip's fast memory
UNKNOWN = " (unknown)"  # last word of a kind whose volume is a guess: the bytes of its result

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_RESULT = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_GROUPS = re.compile(  # three ways to write them: the groups themselves, a grid cut into rows, axes of a mesh
    r"replica_groups=(?:\{\{(?P<listed>[\d,]*)\}"
    r"|\[(?P<count>\d+),(?P<size>\d+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
    r"|mesh\[(?P<mesh>[^\]]*)\]\s*\{(?P<axes>[^}]*)\})"
)
_DEVICES = re.compile(r"\b(num_partitions|replica_count)=(\d+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CROSSES_CHIPS = re.compile(r"\b(replica_groups|source_target_pairs)=")  # attributes that only collectives have
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')
_TARGET = re.compile(r'_xla_megascale_target="?([{}\d,:x>\- ]+)')
_PER_SLICE = 100_000  # the runtime's number of a chip is that of its slice times this, plus its number in the slice
_ON_HOST = "S(5)"  # memory space, in a layout


Shape = tuple[str, tuple[int, ...]]  # dtype, sizes


class Instruction(NamedTuple):
    """One line of a computation; `shapes` are those of its result, on one chip."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    rest: str  # operands and attributes
    is_root: bool
    result: str = ""  # its type as written, layouts included

    @property
    def op_name(self) -> str:
        """Where in the program it comes from: names of functions and scopes, joined by slashes."""
        match = _OP_NAME.search(self.rest)
        return match[1] if match else ""

    def attribute(self, name: str) -> str:
        """The computation that an attribute names."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""

    @property
    def elements(self) -> list[tuple[Shape, ...]]:
        """Shapes of each element of the tuple that it returns, tuples inside it flattened; of an array: its own."""
        text = self.result.strip()
        return [shapes_in(part) for part in _split(text[1:-1])] if text.startswith("(") else [shapes_in(text)]


class Use(NamedTuple):
    """Collectives of one kind in one phase, on one chip."""

    times: float
    bytes: float  # that arrive from other chips (DCN: from other slices), with the ring algorithms' volumes
    hops: float = 0.0  # from chip to chip inside a slice, one after another


Uses = dict[tuple[str, str], Use]  # by (phase, kind)
HopsOf = Callable[[str, tuple[int, ...]], int]  # hops of a collective, by its kind and its chips


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program's text, parsed."""

    computations: dict[str, list[Instruction]]
    entry: str
    devices: int = 1

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
            match = _RESULT.match(line)
            if match:
                shapes = shapes_in(match[3])
                current.append(Instruction(match[2], match[4], shapes, match[5], bool(match[1]), match[3]))
        devices = math.prod(int(count) for _, count in _DEVICES.findall(text[: text.find("\n")]))
        return cls(computations, entry, devices)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """All instructions: names are unique in a program."""
        return {op.name: op for body in self.computations.values() for op in body}

    def collectives(
        self,
        phase: str,
        phase_of: Callable[[str], str | None],
        trips_of: Callable[[str], float],
        hops_of: HopsOf = lambda kind, chips: 0,
    ) -> Uses:
        """Collectives of one run of the program.

        Args:
            phase: where no op says another.
            phase_of: phase of an op's name; None: that of what calls it.
            trips_of: turns of a loop whose condition the data decides, by the op's name.
            hops_of: of each collective.
        """
        walk = _Walk(self, phase_of, trips_of, hops_of, functools.partial(transfer, devices=self.devices))
        return walk.uses(self.entry, phase, set())

    def copied(
        self, phase: str, phase_of: Callable[[str], str | None], trips_of: Callable[[str], float]
    ) -> dict[str, float]:
        """Bytes that one run of the program reads and writes to lay large arrays out anew, by phase.

        Arguments as `collectives`. What a fusion lays out anew on its way is not counted.
        """
        walk = _Walk(self, phase_of, trips_of, lambda kind, chips: 0, laid_out_anew, fused=False)
        return {name: use.bytes for (name, _), use in walk.uses(self.entry, phase, set()).items()}

    def arrays(self) -> dict[tuple[str, tuple[int, ...]], Instruction]:
        """Every array that gets memory of its own, by dtype and shape: what lies inside a fusion does not."""
        inside = {
            called for body in self.computations.values() for op in body if op.kind == "fusion"
            for called in _CALLS.findall(op.rest)
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
    hops_of: HopsOf
    read: "Callable[[Instruction], Transfer | None]"
    fused: bool = True  # whether to look into fusions

    def uses(self, name: str, phase: str, seen: set[str]) -> Uses:
        """Of one run of a computation. `seen`: transfers counted already in this run of the loop around it.

        A collective that the compiler has spread over several fusions stands in each of them under one channel, and
        one between slices twice, as what is sent and what is received.
        """
        total: Uses = {}
        for op in self.module.computations.get(name, ()):
            here = self.phase_of(op.op_name) or phase
            moved = self.read(op)
            if moved:
                if moved.name not in seen:
                    _add(total, {(here, moved.kind): Use(1, moved.bytes, self.hops_of(moved.kind, moved.chips))})
                seen.add(moved.name)
            elif op.kind == "while":
                known = trip_count(self.module, op)
                turns = self.trips_of(op.op_name) if known is None else known
                for part in ("body", "condition"):
                    _add(total, self.uses(op.attribute(part), here, set()), turns)
            elif op.kind == "conditional":
                names = [n.strip(" %") for a, b in _BRANCHES.findall(op.rest) for n in (a or b).split(",")]
                branches = [self.uses(n, here, set(seen)) for n in names]
                _add(total, max(branches, key=lambda u: sum(x.bytes for x in u.values()), default={}))
            elif op.kind in ("call", "async-start") or (op.kind == "fusion" and self.fused):
                for called in _CALLS.findall(op.rest):
                    _add(total, self.uses(called, here, seen))
        return total


def _add(total: Uses, more: Uses, times: float = 1) -> None:
    for key, use in more.items():
        old = total.get(key, Use(0, 0))
        total[key] = Use(*(before + times * now for before, now in zip(old, use, strict=True)))


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Turns of a loop that counts from a constant to another; None: its condition looks at data.

    It counts from 0, unless the compiler has taken its first turns out of it.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    ops = list(module.computations.get(loop.attribute("condition"), ()))
    ops += [
        op for outer in list(ops) for name in _CALLS.findall(outer.rest) for op in module.computations.get(name, ())
    ]
    constants = [int(match[1]) for op in ops if op.kind == "constant" and (match := re.match(r"(\d+)\)", op.rest))]
    counts = Counter(op.kind for op in ops)
    if counts["compare"] != 1 or counts["all-reduce"] or counts["reduce"] or len(constants) != 1:
        return None
    compare = next(op for op in ops if op.kind == "compare")
    return constants[0] + ("direction=LE" in compare.rest) - _start(module, loop, ops)


def _start(module: Module, loop: Instruction, condition: list[Instruction]) -> int:
    """What a loop counts from, where that is a constant; else 0."""
    indices = {match[1] for op in condition if op.kind == "get-tuple-element" and (match := _INDEX.search(op.rest))}
    op = module.by_name.get(_operand(loop, 0))
    if len(indices) != 1 or op is None or op.kind != "tuple":
        return 0
    op = module.by_name.get(_operand(op, int(indices.pop())))
    while op is not None and op.kind in ("copy", "bitcast", "copy-start", "copy-done"):
        op = module.by_name.get(_operand(op, 0))
    match = re.match(r"(\d+)\)", op.rest) if op is not None and op.kind == "constant" else None
    return int(match[1]) if match else 0


def _operand(op: Instruction, number: int) -> str:
    names = _split(op.rest.split(")")[0])
    return re.sub(r"/\*.*?\*/|[% ]", "", names[number]) if number < len(names) else ""


def shapes_in(text: str) -> tuple[Shape, ...]:
    """All arrays of a type as HLO writes it; tokens are none."""
    sizes = lambda dims: tuple(int(n.strip("<=")) for n in dims.split(",") if n)  # noqa: E731
    return tuple((dtype, sizes(dims)) for dtype, dims in _SHAPE.findall(text))


def _split(text: str) -> list[str]:
    """At the commas that no bracket encloses."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def array_bytes(dtype: str, sizes: tuple[int, ...]) -> int:
    """Bytes of an array without the padding of its layout, by its dtype's name in HLO or NumPy; int4 is packed."""
    bits = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s4, float8_e4m3fn, complex64: the first number is that of bits
    return -(-math.prod(sizes) * (int(bits[0]) if bits else 8) // 8)


class Transfer(NamedTuple):
    """What one instruction moves: between chips, between a chip and its host, or from one place to another."""

    name: str  # the same for all instructions that are one transfer
    kind: str
    bytes: float
    chips: tuple[int, ...] = ()  # that a collective inside a slice goes over, by their numbers in the program


def transfer(op: Instruction, devices: int = 1) -> Transfer | None:
    """Of an instruction that begins one; None: it begins none.

    Args:
        devices: of the program, for collectives that name no groups.
    """
    kind, channel = op.kind.removesuffix("-start"), re.search(r"channel_id=(\d+)", op.rest)
    name = f"{kind} {channel[1]}" if channel else op.name
    if kind in COLLECTIVES:
        chips = group(op.rest, devices)
        return Transfer(name, kind, _bytes_received(op, kind, len(chips)), chips)
    if kind in ("send", "recv"):
        return _sent(op, name)
    if op.kind == "copy-start" and len({_ON_HOST in part for part in _split(op.result.strip()[1:-1])[:2]}) == 2:
        return Transfer(op.name, f"{HOST}copy", float(_size(op.elements[0])))
    if _CROSSES_CHIPS.search(op.rest) and not op.kind.endswith(("-done", "-update")):
        return Transfer(name, kind + UNKNOWN, float(_size(_result(op))))
    return None


def laid_out_anew(op: Instruction) -> Transfer | None:
    """Of a copy of a large array inside a chip's memory, read and written."""
    size = _size(op.shapes)
    return Transfer(op.name, "copy", 2.0 * size) if op.kind in ("copy", "transpose") and size >= LARGE_COPY else None


def _sent(op: Instruction, name: str) -> Transfer:
    """A send or a receive: to chips of other slices, to the host itself, or to a chip of the slice."""
    size, kind_match, name_match = float(_size(op.elements[0])), _TRANSFER.search(op.rest), _RENDEZVOUS.search(op.rest)
    if not kind_match:
        if "is_host_transfer=true" in op.rest:
            return Transfer(name, HOST + op.kind, size)
        return Transfer(name.replace(op.kind, "send"), "send", size)  # one channel for both ends
    n, sent = _slices(op.rest), op.kind == "send"
    volumes = {
        "ALL_REDUCE": ("all-reduce", 2 * (n - 1) / n * size),
        "ALL_GATHER": ("all-gather", (n - 1) * size if sent else (n - 1) / n * size),
        "REDUCE_SCATTER": ("reduce-scatter", (n - 1) / n * size if sent else (n - 1) * size),
        "ALL_TO_ALL": ("all-to-all", (n - 1) / n * size),
        "ONE_TO_ONE": ("collective-permute", size),
    }
    kind, volume = volumes.get(kind_match[1], (kind_match[1].lower().replace("_", "-") + UNKNOWN, size))
    return Transfer(f"{DCN}{name_match[1]}" if name_match else name, DCN + kind, volume)


def _slices(attributes: str) -> int:
    """Slices that a transfer goes over: "{1,2}x{0:7}" (of slices, of chips), or groups of chips by number."""
    target = _TARGET.search(attributes)
    if not target:
        return 2
    if "x" in target[1]:
        first = re.findall(r"(\d+)(?::(\d+))?", target[1].split("x")[0])
        return sum(int(last or begin) - int(begin) + 1 for begin, last in first)
    return max(len({int(chip) // _PER_SLICE for chip in re.findall(r"\d+", g)}) for g in target[1].split("}"))


def _result(op: Instruction) -> tuple[Shape, ...]:
    """Shapes of what an instruction makes; one that only starts returns its operands before it, and contexts after."""
    if op.kind.endswith("-start") and op.kind != "all-reduce-start" and len(op.elements) > 1:
        return op.elements[1]
    return op.shapes


def _size(shapes: tuple[Shape, ...]) -> int:
    return sum(array_bytes(*shape) for shape in shapes)


def _bytes_received(op: Instruction, kind: str, n: int) -> float:
    factor = {
        "all-gather": (n - 1) / n, "all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "all-to-all": (n - 1) / n,
        "ragged-all-to-all": (n - 1) / n,  # of all that there is room for
    }.get(kind, 1)  # fmt: skip
    return _size(_result(op)) * factor


@functools.lru_cache(maxsize=1024)
def group(attributes: str, devices: int = 1) -> tuple[int, ...]:
    """Partitions that a collective goes over, of its first group; all `devices` of the program if it names none."""
    match = _GROUPS.search(attributes)
    if not match:
        return tuple(range(max(devices, 1)))
    if match["listed"] is not None:
        return tuple(int(part) for part in match["listed"].split(",") if part) or tuple(range(max(devices, 1)))
    if match["count"] is not None:
        numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
        grid = np.arange(int(match["count"]) * int(match["size"])).reshape(numbers(match["dims"]))
        grid = grid.transpose(numbers(match["order"])) if match["order"] else grid
        return tuple(grid.reshape(-1, int(match["size"]))[0].tolist())
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["mesh"])}
    along = re.findall(r"'(\w+)'", match["axes"])
    grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return tuple(grid[tuple(slice(None) if name in along else 0 for name in sizes)].ravel().tolist())
