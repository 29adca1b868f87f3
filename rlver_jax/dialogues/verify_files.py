"""One file of a log, not trusted: its dialogues, how the config plays them, and which are missing."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from rlver_jax.dialogues.log import Record
from rlver_jax.dialogues.verify_lines import read_log
from rlver_jax.dialogues.verify_set import Plan, TrainingPlan, best_plan, set_faults
from rlver_jax.dialogues.verify_settings import check_settings, endpoints_of
from rlver_jax.profiles.reader import ProfileReader
from rlver_jax.profiles.schema import Profile
from rlver_jax.profiles.sources import open_profiles

_OF_STEP = re.compile(r"step_(\d{6,})\.jsonl")  # see `RunFolder.dialogues`


class PlannedDialogue(NamedTuple):
    """A dialogue of a log, how the config plays it, and its faults so far."""

    record: Record
    plan: Plan
    faults: list[str]


class LogFile(NamedTuple):
    """A file: faults that belong to no dialogue, and its dialogues."""

    faults: list[str]
    dialogues: list[PlannedDialogue]


def plans_of(config: ConfigDict, held_out: Sequence[Profile], *, repeats: int = 0, partial: bool = False) -> list[Plan]:
    """How a config evaluates, and how it trains where it can.

    Args:
        held_out: profiles that it evaluates with, in their order.
        repeats, partial: see `Plan`.

    Raises:
        ValueError: files of profiles that cannot be used.
    """
    c = config.eval
    fields = {name: f"eval.{name}={c[name]}" for name in ("seed", "initial_emotion", "max_turns")}
    fields["num_profiles"] = f"{len(held_out)} profiles, eval.num_profiles={c.num_profiles}"
    settings = (c.seed, c.initial_emotion, c.max_turns, c.temperature, held_out)
    plans = [Plan(fields, *settings, repeats=repeats, partial=partial)]
    c = config.rollout
    count = c.batch // c.group
    profiles = open_profiles(config, "data.train") if config.data.train else []
    if 0 < count <= len(profiles):  # else it cannot train
        reader = ProfileReader(profiles, seed=config.data.seed, batch_size=count, shuffle=config.data.shuffle)
        fields = {
            "seed": f"train.seed={config.train.seed}",
            "initial_emotion": f"emotion.initial={config.emotion.initial}",
            "max_turns": f"rollout.max_turns={c.max_turns}",
            "num_profiles": f"data.seed={config.data.seed}, rollout.batch={c.batch}, rollout.group={c.group}",
        }
        settings = (config.train.seed, config.emotion.initial, c.max_turns, c.temperature, profiles)
        plans.append(TrainingPlan(fields, *settings, reader=reader, batch=c.batch, group=c.group, partial=partial))
    return plans


def read_log_file(path: str, plans: Sequence[Plan], config: ConfigDict) -> LogFile:
    """The contents of a file, by the plan that explains it best.

    Raises:
        ConfigError: none of its dialogues was played with the config's settings.
        DialogueLogError: no such file.
    """
    lines = read_log(path)
    faults = [_unread(path, line.number, line.dialogue, line.fault) for line in lines if line.record is None]
    records = [line.record for line in lines if line.record is not None]
    if not records:
        return LogFile([*faults, f"{path}: no dialogue in it"], [])
    faults_by_record, endpoints = check_settings(records, config), endpoints_of(records, config)
    # A number that no dialogue can have is reported with the dialogue.
    numbered = [record for record in records if 0 <= record["dialogue"] < 2**32]
    plan = dataclasses.replace(best_plan(plans, numbered), endpoints=frozenset(endpoints))
    unread = [line.dialogue for line in lines if line.record is None and line.dialogue is not None]
    faults += [f"{path}: {fault}" for fault in set_faults(plan, numbered, unread)]
    step_file = _OF_STEP.fullmatch(Path(path).name)
    if step_file and isinstance(plan, TrainingPlan):
        steps = sorted({record["dialogue"] // plan.batch + 1 for record in numbered} - {int(step_file[1])})
        faults += [f"{path}: holds dialogues of step {step}" for step in steps[:3]]
    return LogFile(
        faults,
        [
            PlannedDialogue(record, plan, record_faults)
            for record, record_faults in zip(records, faults_by_record, strict=True)
        ],
    )


def _unread(path: str, number: int, dialogue: int | None, fault: str) -> str:
    known = "" if dialogue is None else f", dialogue {dialogue}"
    return f"{path}:{number}{known}: {fault}"
