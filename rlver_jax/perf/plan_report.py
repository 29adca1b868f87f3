"""A plan as tables for a terminal and as one JSON object."""

import dataclasses
import math
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from rlver_jax.perf.chips import Chip
from rlver_jax.perf.hlo import DCN, HOST
from rlver_jax.perf.plan_measure import GIB, Measured
from rlver_jax.perf.plan_phases import Phase, by_link
from rlver_jax.perf.plan_remat import Remat, lightest
from rlver_jax.perf.plan_remedies import Remedy, over


@dataclasses.dataclass(frozen=True)
class Plan:
    """The whole result; sizes in bytes of one chip, times in seconds.

    Attributes:
        mesh, sampling: sizes of the meshes by axis.
        rows, length: dialogues of a step, and tokens of a packed row.
        assumed: assumptions, in sentences.
        host_gib: most memory that planning took on this machine.
        seconds: that planning took.
        steps: of a run.
    """

    topology: str
    chip: Chip
    mesh: dict[str, int]
    sampling: dict[str, int]
    rows: int
    length: int
    measurements: list[Measured]
    phases: list[Phase]
    remedy: Remedy | None
    remats: list[Remat]
    assumed: list[str]
    host_gib: float
    seconds: float
    slices: int = 1
    steps: int = 1

    @property
    def chips(self) -> int:
        """Of the topology."""
        return math.prod(self.mesh.values())

    @property
    def largest(self) -> Measured:
        """The program with most memory alive at once."""
        return max(self.measurements, key=lambda one: one.memory.total)

    @property
    def fits(self) -> bool:
        """Whether every program does, with all that is alive beside it."""
        return over(self.largest, self.chip) <= 0

    @property
    def faults(self) -> list[str]:
        """Arrays that must not exist."""
        return [fault for one in self.measurements for fault in one.faults]

    @property
    def step_s(self) -> float:
        """Predicted time of a step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def roofline_s(self) -> float:
        """Of a step in which collectives wait for nothing."""
        return sum(phase.roofline_s for phase in self.phases)

    @property
    def mfu(self) -> float:
        """Useful operations by what the chips could do in that time."""
        return sum(phase.work.useful for phase in self.phases) / (self.chips * self.chip.flops * self.step_s)

    @property
    def dialogues_per_hour(self) -> float:
        """In that time."""
        return 3600 * self.rows / self.step_s

    @property
    def run_s(self) -> float:
        """Of all steps of a run, without compilation, evaluations and checkpoints."""
        return self.step_s * self.steps

    @property
    def chip_hours(self) -> float:
        """What a run takes of all chips."""
        return self.run_s * self.chips / 3600

    def verdict(self) -> str:
        """One or two sentences."""
        one, room = self.largest, self.chip.usable_gib
        total = one.memory.total / GIB
        if self.fits:
            return f"fits: {total:.2f} of {room:.2f} GiB a chip, most while {one.name} runs"
        tried = f"try {self.remedy}" if self.remedy else "no change of the config that was tried helps; use more chips"
        return f"does not fit: {total - room:.2f} GiB over ({one.name}: {total:.2f} of {room:.2f} GiB a chip); {tried}"

    def prediction(self) -> str:
        """How long a step and a run take, or that a program is missing."""
        if any(not one.memory.arguments for one in self.measurements):
            return "no prediction: a program that does not fit has no HLO to read collectives from"
        return (
            f"prediction, not a measurement: {self.step_s:.1f} s a step ({self.roofline_s:.1f} s at the roofline, the "
            f"rest is latency of collectives), {self.dialogues_per_hour:,.0f} dialogues/hour, {100 * self.mfu:.1f} % "
            f"of the chips' peak (MFU); a run of train.steps={self.steps}: {self.run_s / 3600:.1f} hours "
            f"({self.run_s / 86400:.2f} days), {self.chip_hours:,.0f} chip-hours"
        )

    def to_json(self) -> dict[str, Any]:
        """The whole plan; `fits`, `hbm_gib_per_chip`, `hbm_capacity_gib` and `phases` are a stable interface."""
        return {
            "topology": self.topology,
            "slices": self.slices,
            "chips": self.chips,
            "mesh": self.mesh,
            "mesh_sampling": self.sampling,
            "fits": self.fits,
            "hbm_gib_per_chip": self.largest.memory.total / GIB,
            "hbm_capacity_gib": self.chip.usable_gib,
            "chip": dataclasses.asdict(self.chip),
            "batch": self.rows,
            "packed_length": self.length,
            "programs": [_program_json(one) for one in self.measurements],
            "phases": [_phase_json(phase) for phase in self.phases],
            "predicted": {
                "step_s": self.step_s,
                "roofline_s": self.roofline_s,
                "mfu": self.mfu,
                "dialogues_per_hour": self.dialogues_per_hour,
                "steps": self.steps,
                "days": self.run_s / 86400,
                "chip_hours": self.chip_hours,
            },
            "verdict": self.verdict(),
            "remedy": self.remedy.fields if self.remedy else None,
            "remat": [_remat_json(one) for one in self.remats],
            "faults": self.faults,
            "warnings": [warning for one in self.measurements for warning in one.warnings],
            "assumed": self.assumed,
            "host_gib": self.host_gib,
            "plan_s": self.seconds,
        }


def _program_json(one: Measured) -> dict[str, Any]:
    gib = {name: size / GIB for name, size in dataclasses.asdict(one.memory).items()}
    idle = {name: size / GIB for name, size in one.idle.items()}
    return {
        "name": one.name, "hbm_gib": gib | {"total": one.memory.total / GIB}, "idle_gib": idle,
        "compile_s": one.compile_s,
    }  # fmt: skip


def _phase_json(phase: Phase) -> dict[str, Any]:
    plain = lambda uses, link="": {kind.removeprefix(link): use._asdict() for kind, use in uses.items()}  # noqa: E731
    ici, dcn, host = by_link(phase.collectives)
    return {
        "name": phase.name,
        "program": phase.program,
        "flops": phase.work.flops,
        "useful_flops": phase.work.useful,
        "hbm_bytes_per_chip": phase.hbm_bytes,
        "copied_bytes_per_chip": phase.copied_bytes,
        "collectives_per_chip": plain(ici),
        "dcn_per_chip": plain(dcn, DCN),
        "host_per_chip": plain(host, HOST),
        "seconds": {
            "compute": phase.compute_s, "memory": phase.memory_s, "network": phase.network_s, "dcn": phase.dcn_s,
            "roofline": phase.roofline_s, "latency": phase.latency_s,
        },
        "mfu": phase.mfu,
        "hbm_bandwidth": phase.bandwidth,
    }  # fmt: skip


def _remat_json(one: Remat) -> dict[str, Any]:
    return {"fields": one.fields, "hbm_gib": one.total / GIB, "update_s": one.seconds, "fits": one.fits}


def show(plan: Plan, console: Console) -> None:
    """Prints the plan: memory, phases, notes, and the verdict last."""
    notes = [("warning", text) for one in plan.measurements for text in one.warnings]
    notes += [("fault", text) for text in plan.faults] + [("assumed", text) for text in plan.assumed]
    notes += [("planning", f"{plan.seconds:.0f} s, {plan.host_gib:.1f} GiB of this machine's memory")]
    console.print(Group(_memory_table(plan), _phase_table(plan), *(Text(f"{kind}: {text}") for kind, text in notes)))
    if plan.remats:
        console.print(_remat_table(plan))
        best = lightest(plan.remats)
        console.print(Text(f"lightest remat that fits: {best}" if best else "no remat policy makes the update fit"))
    console.print(Text(plan.prediction()))
    console.print(Text(plan.verdict(), style="green" if plan.fits and not plan.faults else "red"))


def _memory_table(plan: Plan) -> Table:
    sampling = "" if plan.sampling == plan.mesh else f", sampling on {_sizes(plan.sampling)}"
    topology = plan.topology if plan.slices == 1 else f"{plan.slices} slices of {plan.topology}"
    title = f"GiB a chip, {topology}: {_sizes(plan.mesh)}{sampling}; {plan.rows} rows x {plan.length} tokens"
    names = ("program", "arguments", "outputs", "temporaries", "code", "alive beside it", "sum")
    table = Table(*names, title=title, title_justify="left")
    for one in plan.measurements:
        m = one.memory
        parts = (m.arguments, m.outputs, m.temporaries, m.code)
        cells = [f"{size / GIB:.2f}" for size in parts] if m.arguments else ["", "", f"{m.program / GIB:.2f}", ""]
        beside = ", ".join(f"{name} {size / GIB:.2f}" for name, size in one.idle.items())
        mark = " !" if over(one, plan.chip) > 0 else ""
        table.add_row(one.name, *cells, beside, f"{m.total / GIB:.2f}{mark}")
    return table


def _remat_table(plan: Plan) -> Table:
    table = Table("remat", "GiB a chip", "update s", title="the update under each remat policy", title_justify="left")
    for one in plan.remats:
        mark = "" if one.fits else " !"
        table.add_row(one.fields["policy.remat"], f"{one.total / GIB:.2f}{mark}", f"{one.seconds:.2f}")
    return table


def _sizes(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def _phase_table(plan: Plan) -> Table:
    columns = ["phase", "PFLOP", "GB a chip", "of it copies", "collectives a chip: count, GB"]
    columns += ["compute s", "memory s", "network s", "latency s"] + ["DCN s"] * (plan.slices > 1)
    title = "phases of a step, every dialogue at its limits; shares of the chips' peak in that time"
    table = Table(*columns, "MFU", "HBM", title=title, title_justify="left")
    for phase in plan.phases:
        sent = ", ".join(
            f"{kind} {use.times:,.0f}, {use.bytes / 1e9:.2f}" for kind, use in sorted(phase.collectives.items())
        )
        seconds = [phase.compute_s, phase.memory_s, phase.network_s, phase.latency_s]
        seconds += [phase.dcn_s] * (plan.slices > 1)
        times = [f"{s:.2f}" for s in seconds]
        done, moved = f"{phase.work.flops / 1e15:.2f}", f"{phase.hbm_bytes / 1e9:.1f}"
        cells = (phase.name, done, moved, f"{phase.copied_bytes / 1e9:.1f}", sent, *times)
        table.add_row(*cells, f"{phase.mfu:.0%}", f"{phase.bandwidth:.0%}")
    return table
