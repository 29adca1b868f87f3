"""What a plan says, from sizes and rates chosen by hand."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from rlver_jax.perf.chips import CHIPS
from rlver_jax.perf.flops import Work
from rlver_jax.perf.hlo import Use
from rlver_jax.perf.plan_measure import Measured, Memory
from rlver_jax.perf.plan_phases import Phase
from rlver_jax.perf.plan_remat import Remat
from rlver_jax.perf.plan_remedies import Remedy, over
from rlver_jax.perf.plan_report import Plan, show

GIB = 2**30
V5E = CHIPS["v5e"]


def program_of(name: str, program: float, idle: float) -> Measured:
    memory = Memory(int(program * GIB) // 2, 0, int(program * GIB) // 2, 0, int(idle * GIB), int(program * GIB))
    return Measured(name, memory, {"user": int(idle * GIB)}, {}, [], [], 60.0)


def plan_of(*programs: Measured, remedy: Remedy | None = None, remats: list[Remat] | None = None) -> Plan:
    phases = [
        Phase("play", "play", Work(8e12, 8e12, 0), 1e9, {"all-reduce": Use(56, 2e9)}, 1.0, 6.0, 2.0),
        Phase("learn", "learn", Work(24e12, 32e12, 0), 1e9, {}, 4.0, 3.0, 2.0),
    ]
    mesh = {"replica": 1, "fsdp": 2, "tensor": 4}
    return Plan(
        "v5e:2x4", V5E, mesh, mesh, 5, 512, list(programs), phases, remedy, remats or [], ["nothing"], 2.0, 61.0
    )


def test_it_fits_with_what_lies_beside():
    plan = plan_of(program_of("play", 10, 5.5), program_of("learn", 11, 4))
    assert plan.fits
    assert plan.verdict() == "fits: 15.50 of 15.75 GiB a chip, most while play runs"
    assert over(plan.largest, V5E) == -0.25 * GIB


def test_it_does_not_fit():
    """Alone each program would: what stays alive beside it counts."""
    remedy = Remedy({"train.microbatches": 4}, 14 * GIB)
    plan = plan_of(program_of("play", 10, 5), program_of("learn", 14, 4), remedy=remedy)
    assert not plan.fits
    assert plan.verdict() == (
        "does not fit: 2.25 GiB over (learn: 18.00 of 15.75 GiB a chip); "
        "try --config.train.microbatches=4 (compiled: 14.00 GiB)"
    )


def test_prediction():
    """The longest of three times each: 6 s and 4 s; 32e12 useful operations on 8 chips of 197e12 a second."""
    plan = plan_of(program_of("play", 10, 5))
    assert plan.step_s == 10
    assert plan.dialogues_per_hour == 5 * 360
    assert plan.mfu == pytest.approx(32e12 / (8 * 197e12 * 10))
    assert plan.prediction().startswith(
        "prediction, not a measurement: 10.0 s a step (10.0 s at the roofline, the rest is latency of collectives), "
        "1,800 dialogues/hour, 0.2 %"
    )


def test_collectives_that_wait():
    """500,000 sums of four hops at a microsecond each: 2 s on top of what the memory takes."""
    chip = CHIPS["v5p"]
    phase = Phase("play", "play", Work(8e12, 8e12, 0), 1e9, {}, 1.0, 6.0, 2.0, latency_s=2.0)
    plan = dataclasses.replace(plan_of(program_of("play", 10, 5)), chip=chip, phases=[phase])
    assert (plan.step_s, plan.roofline_s, phase.bandwidth) == (8, 6, 0.75)
    assert "8.0 s a step (6.0 s at the roofline, the rest is latency of collectives)" in plan.prediction()
    assert plan.to_json()["phases"][0]["seconds"]["latency"] == 2


def test_tables_and_json_say_the_same():
    plan = plan_of(program_of("play", 10, 5.5), program_of("learn", 11, 4))
    console = Console(file=io.StringIO(), width=200)
    show(plan, console)
    text, result = console.file.getvalue(), plan.to_json()  # type: ignore[attr-defined]
    assert result["hbm_gib_per_chip"] == 15.5
    assert result["hbm_capacity_gib"] == 15.75
    assert [phase["seconds"]["roofline"] for phase in result["phases"]] == [6.0, 4.0]
    assert [phase["mfu"] for phase in result["phases"]] == [1 / 6, 0.75], "8 layers of 32 are computed again"
    assert [phase["hbm_bandwidth"] for phase in result["phases"]] == [1.0, 0.75]
    shares = ("17%", "75%", "100%")
    for part in ("15.50", *shares, "user 5.50", "all-reduce 56, 2.00", "assumed: nothing", result["verdict"]):
        assert part in text


def test_several_slices():
    """What goes between slices stands apart, and may take the longest."""
    plan = plan_of(program_of("learn", 9, 0))
    uses = {"all-reduce": Use(56, 2e9), "DCN all-reduce": Use(3, 25e9), "host copy": Use(1, 1e9)}
    phase = Phase("learn", "learn", Work(24e12, 32e12, 0), 1e9, uses, 4.0, 3.0, 2.0, 8.0)
    plan = dataclasses.replace(plan, slices=2, phases=[phase])
    console = Console(file=io.StringIO(), width=200)
    show(plan, console)
    text, result = console.file.getvalue(), plan.to_json()  # type: ignore[attr-defined]
    for part in ("2 slices of v5e:2x4", "DCN s", "8.00", "DCN all-reduce 3, 25.00", "all-reduce 56, 2.00"):
        assert part in text
    (phase_json,) = result["phases"]
    assert result["slices"] == 2
    assert phase_json["collectives_per_chip"] == {"all-reduce": {"times": 56, "bytes": 2e9, "hops": 0}}
    assert phase_json["dcn_per_chip"] == {"all-reduce": {"times": 3, "bytes": 25e9, "hops": 0}}
    assert phase_json["host_per_chip"] == {"copy": {"times": 1, "bytes": 1e9, "hops": 0}}
    assert (phase_json["seconds"]["dcn"], phase_json["seconds"]["roofline"], plan.step_s) == (8.0, 8.0, 8.0)


def test_remat_policies():
    kinds = [("none", 20, 1.0), ("dots", 12, 1.25), ("full", 9, 1.3125)]
    remats = [Remat({"policy.remat": name}, size * GIB, seconds, size < 15) for name, size, seconds in kinds]
    plan = plan_of(program_of("learn", 9, 0), remats=remats)
    console = Console(file=io.StringIO(), width=200)
    show(plan, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("none  │ 20.00 !", "1.25", "lightest remat that fits: --config.policy.remat=dots"):
        assert part in text
    assert plan.to_json()["remat"][1] == {
        "fields": {"policy.remat": "dots"}, "hbm_gib": 12.0, "update_s": 1.25, "fits": True
    }  # fmt: skip


def test_what_a_run_takes():
    """Ten seconds a step on 8 chips: 900 steps are 9,000 s, 2.5 hours and 20 chip-hours."""
    plan = dataclasses.replace(plan_of(program_of("play", 10, 5)), steps=900)
    assert plan.to_json()["predicted"] | {"mfu": 0} == {
        "step_s": 10, "roofline_s": 10, "mfu": 0, "dialogues_per_hour": 1800, "steps": 900,
        "days": pytest.approx(9000 / 86400), "chip_hours": 20,
    }  # fmt: skip
    assert "a run of train.steps=900: 2.5 hours (0.10 days), 20 chip-hours" in plan.prediction()


def test_the_table_of_the_page_is_what_a_plan_would_say_of_its_rows():
    page = (Path(__file__).resolve().parents[2] / "docs" / "pods.md").read_text(encoding="utf-8")
    rows = [line.strip("| \n").split(" | ") for line in page.splitlines() if re.match(r"\| (PPO|GRPO)", line)]
    assert len(rows) == 16
    costs = []
    for *_, chips, _, _, step, _, days, hours in rows:
        count, seconds = int(re.search(r", (\d+)", chips)[1]), float(step.removesuffix(" s").replace(",", ""))
        run_s = 500 * seconds
        assert float(days) == pytest.approx(run_s / 86400, abs=0.006)
        costs.append(float(hours.replace(",", "")))
        assert costs[-1] == pytest.approx(run_s * count / 3600, abs=0.6)
    assert costs == sorted(costs), "the cheapest first"
