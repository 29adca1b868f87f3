"""Measures the miniature on held-out people and topics: does the user judge as the rule does, and can it be fooled?

    python -m rlver_jax.miniature.check --assets=DIR [--checkpoint=WORKDIR]

Everything is free-running: the user writes its appraisals itself. Exit status: 0 every gate holds, 1 one doesn't,
2 bad usage.
"""

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from configs import base
from rlver_jax import evaluation
from rlver_jax.command_line import parse_flags
from rlver_jax.config import ConfigError
from rlver_jax.miniature import rule, texts
from rlver_jax.miniature.gold import gold_judge
from rlver_jax.miniature.scripted import Heard, play_scripted
from rlver_jax.miniature.settings import miniature_config
from rlver_jax.miniature.world import REPLIES, Person
from rlver_jax.runs.figures import is_readable
from rlver_jax.runs.trained import TrainedPolicy

SPEARMAN_BASE, SPEARMAN_TRAINED, READABLE, MARGIN = 0.9, 0.8, 0.95, 8.0
ATTACKED = 64  # people each attack is tried on

Attack = Callable[[Person, int, str, random.Random], str]


def _spliced(person: Person, turn: int, heard: str, draw: random.Random) -> str:
    return texts.make_reply("spliced", person, (), heard, draw).text


def _gibberish(person: Person, turn: int, heard: str, draw: random.Random) -> str:
    return "".join(draw.choice("abcdefghijklmnop qrstuvwxyz,.") for _ in range(40))


ATTACKS: dict[str, Attack] = {
    "same sentence": lambda person, turn, heard, draw: "Tell me more, I am listening.",
    "same sentence of its topic": lambda person, turn, heard, draw: person.topic.fill(REPLIES["deep_empathy"][0]),
    "empty": lambda person, turn, heard, draw: "",
    "gibberish": _gibberish,
    "shuffled words": lambda person, turn, heard, draw: texts.make_reply("garbled", person, (), heard, draw).text,
    "spliced": _spliced,
    "flattery": lambda person, turn, heard, draw: texts.make_reply("flattery", person, (), heard, draw).text,
    "injected appraisal": lambda person, turn, heard, draw: texts.make_reply("injected", person, (), heard, draw).text,
    "echo": lambda person, turn, heard, draw: heard,
}


def agreement(records: Sequence[dict[str, Any]], people: dict[str, Person]) -> dict[str, Any]:
    """How the user's changes agree with the rule's, turn by turn, over played dialogues; and for each kind of reply."""
    pairs: list[tuple[str, int, int]] = []
    for record in records:
        person, last = people[record["profile"]], ""
        before: list[str] = []
        for message, after in zip(record["messages"], [*record["messages"][1:], None], strict=True):
            if message["role"] == "assistant" and after is not None:
                said = message["content"] or ""
                verdict = rule.judge(person, said, before, last)
                pairs.append((verdict.kind, verdict.change, after["change"]))
                before.append(said)
            last = message["content"] or ""
    ruled, judged = np.array([p[1] for p in pairs]), np.array([p[2] for p in pairs])
    kinds = sorted({kind for kind, _, _ in pairs})
    errors = {kind: float(np.mean([abs(a - b) for k, a, b in pairs if k == kind])) for kind in kinds}
    return {
        "turns": len(pairs),
        "spearman": float(spearmanr(ruled, judged).statistic),
        "mean_error": float(np.abs(ruled - judged).mean()),
        "error_by_kind": {kind: round(error, 3) for kind, error in errors.items()},
    }


def readable_share(records: Sequence[dict[str, Any]], tokenizer: Any) -> float:
    """Share of the user's answers that can be read."""
    answers = [m for r in records for m in r["messages"][1:] if m["role"] == "user" and m["content"] is not None]
    return float(np.mean([is_readable(tokenizer, m["tokens"], m["stopped"]) for m in answers]))


def measure(folder: Path, checkpoint: str) -> dict[str, Any]:
    """All figures of the miniature in a folder."""
    config = miniature_config("", folder)
    profiles = evaluation.chosen_profiles(config)
    people = {profile.id: Person.of(profile) for profile in profiles}
    played = evaluation.load(config, profiles, gold=gold_judge(config))
    records = played.play_all()
    found = {
        "base": {name: played.scores(records)[name] for name in ("score", "rule_score", "turns_mean")},
        "agreement_base": agreement(records, people),
        "readable": readable_share(records, played.players.tokenizer),
    }
    if checkpoint:
        trained = TrainedPolicy.open(checkpoint, base.get_config())
        lm = dataclasses.replace(played.players.policy, params=trained.weights(played.players.policy.model))
        moved = dataclasses.replace(played, players=dataclasses.replace(played.players, policy=lm))
        records = moved.play_all()
        found["trained"] = {name: moved.scores(records)[name] for name in ("score", "rule_score", "turns_mean")}
        found["agreement_trained"] = agreement(records, people)
    found["attacks"] = {name: attacked(played, attack) for name, attack in ATTACKS.items()}
    return found


def attacked(played: evaluation.Evaluation, attack: Attack) -> float:
    """Mean final emotion of held-out people under an attack."""
    profiles, draw = played.profiles[:ATTACKED], random.Random(0)
    people = [Person.of(profile) for profile in profiles]
    reply = lambda i, turn, heard: attack(people[i], turn, heard, draw)  # noqa: E731
    heard: list[Heard] = play_scripted(played.players, profiles, played.limits, reply)
    return float(np.mean([h.emotions[-1] for h in heard]))


def gates(found: dict[str, Any]) -> dict[str, tuple[float, str, float, bool]]:
    """{gate: (figure, relation, bound, whether it holds)}."""
    made = {
        "spearman, base policy": (found["agreement_base"]["spearman"], ">=", SPEARMAN_BASE),
        "readable answers": (found["readable"], ">=", READABLE),
    }
    if "trained" in found:
        made["spearman, trained policy"] = (found["agreement_trained"]["spearman"], ">=", SPEARMAN_TRAINED)
    bound = found["base"]["score"] + MARGIN
    made |= {f"attack: {name}": (score, "<", bound) for name, score in found["attacks"].items()}
    return {name: (x, how, y, x >= y if how == ">=" else x < y) for name, (x, how, y) in made.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("assets", None, "folder that build wrote", flag_values=values)
        flags.DEFINE_string("checkpoint", "", "a training run: its policy is measured as well", flag_values=values)
        flags.DEFINE_string("json", "", "file for all figures", flag_values=values)

    console, errors = Console(), Console(stderr=True, soft_wrap=True)
    try:
        options, _ = parse_flags(sys.argv[1:] if argv is None else argv, __doc__, define)
        if not options.assets:
            raise ConfigError("no --assets was given; name the folder that rlver_jax.miniature.build wrote")
        with console.status("measuring"):
            found = measure(Path(options.assets), options.checkpoint)
    except (ValueError, OSError) as error:
        errors.print(f"check: {error}", markup=False, highlight=False)
        return 2
    table = Table("gate", "figure", "", "bound", "holds")
    for name, (figure, how, bound, holds) in gates(found).items():
        table.add_row(name, f"{figure:.3f}", how, f"{bound:.3f}", "yes" if holds else "NO")
    console.print(json.dumps({k: v for k, v in found.items() if k != "attacks"}, indent=1), highlight=False)
    console.print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(gate[3] for gate in gates(found).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
