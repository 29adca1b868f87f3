"""Runs and evaluations written by hand, in the formats that design and dialogue_log.py describe."""

import itertools
import json
import random

import pytest

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"
WISHES = {
    "advice": "You want advice that really helps you out of your present difficulty",
    "listening": "你希望对方用心倾听你的情绪宣泄。",
    "to be <b>left</b> alone": "to be <b>left</b> alone",
}


def record(number, profile, emotions, end="turn_limit", wish="advice", words=str, **more):
    """A dialogue with these emotions; `words(what)` gives its texts."""
    messages = [{"role": "user", "content": words("first"), "tokens": [], "emotion": emotions[0], "generated": False}]
    for turn, (before, after) in enumerate(itertools.pairwise(emotions), 1):
        reply = {"thought": words(f"thought {turn}"), "content": words(f"say {turn}"), "violation": False}
        messages.append({"role": "assistant", "stopped": True, "say_tokens": [1]} | reply | tokens())
        last = turn == len(emotions) - 1
        messages.append(
            {"role": "user", "content": None if last else words(f"reply {turn}"), "stopped": True, "all_tokens": [1]}
            | {"appraisal": {"feeling": words(f"feeling {turn}")}, "considerations": {"tone": words(f"tone {turn}")}}
            | {f"{script}_{what}": {} for script in ("appraisal", "consideration") for what in SCRIPT_LISTS}
            | {"change": after - before, "change_logprobs": [0.0] * 21, "emotion": after}
            | tokens()
        )
    settled = dict.fromkeys(("language", "style", "scenario", "readout"), "x")
    return {
        "dialogue": number, "profile": profile, "seed": 0, "mode": "think", **settled, "violation": False,
        "initial_emotion": emotions[0], "hidden_intention": WISHES[wish], "end_reason": end, "turns": len(emotions) - 1,
        "reward": emotions[-1] / 100, "emotion": emotions[-1], "emotions": emotions, "messages": messages, **more,
    }  # fmt: skip


SCRIPT_LISTS = ("tokens", "stopped", "logprobs")


def tokens():
    return {"tokens": [1, 2], "logprobs": [-0.5, -0.5], "raw_logprobs": [-0.5, -0.5]}


def write_lines(path, objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects), encoding="utf-8")


def row(step, emotion, **more):
    ends = dict.fromkeys(("failure", "goodbye", "format", "context"), 0.0) | {"success": 0.25, "turn_limit": 0.75}
    return {
        "step": step, "emotion/final_mean": emotion, "emotion/final_std": 10.0, "reward/mean": emotion / 100,
        "reward/std": 0.1, "dialogue/success_rate": 0.25, "dialogue/failure_rate": 0.125, "dialogue/turns_mean": 5.5,
        "reply/tokens_mean": 12.0, "reply/all_tokens_mean": 30.0, "time/rollout_s": 2.0, "time/update_s": 1.0,
    } | {f"dialogue/end_{name}": share for name, share in ends.items()} | more  # fmt: skip


def write_run(folder, rows, played, settings=None):
    """A training run; `played` is {step: records}."""
    write_lines(folder / "metrics.jsonl", rows)
    (folder / "config.json").write_text(json.dumps(settings or {"train.steps": 2}), encoding="utf-8")
    for step, records in played.items():
        write_lines(folder / "dialogues" / f"step_{step:06d}.jsonl", records)
    return folder


def write_evaluation(folder, records, summary=None):
    write_lines(folder / "dialogues.jsonl", records)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def make_records(start, count, words=str, gain=0):
    """Dialogues with profiles p0, p1, … and three wishes in turn."""
    wishes = list(WISHES)
    return [
        record(start + i, f"p{i}", [40, 40 + gain, min(45 + i + 2 * gain, 100)], wish=wishes[i % 3], words=words)
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """Two steps and an evaluation before them; six profiles met in both steps."""
    rows = [{"step": 0, "eval/score": 41.5, "eval/rule_score": 40.0}]
    rows += [row(1, 45.0), row(2, 55.0, **{"eval/score": 61.5, "eval/rule_score": 50.0})]
    folder = tmp_path_factory.mktemp("runs") / "small"
    return write_run(folder, rows, {1: make_records(0, 6), 2: make_records(6, 6, gain=10)})


@pytest.fixture(scope="session")
def sixty_steps(tmp_path_factory):
    """As many steps, dialogues and turns as the miniature's 60 steps, of words that compress worse than its own."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]

    def words(_):
        return " ".join(draw.choices(vocabulary, k=12))

    def dialogue(number, step):
        emotions = [40, *(min(100, 40 + turn * step // 10) for turn in range(1, 7))]
        made = record(number, f"p{number % 64}", emotions, wish=list(WISHES)[number % 3], words=words)
        made["messages"][0]["generated"] = True  # other first words each time
        return made

    rows = [row(step, 40 + step / 2) for step in range(1, 61)]
    played = {step: [dialogue(i, step) for i in range(64)] for step in (1, *range(10, 61, 10))}
    played[60][0]["messages"][1] |= {"content": HOSTILE, "thought": HOSTILE}
    played[60][0]["messages"][2]["appraisal"] = {HOSTILE: HOSTILE}
    return write_run(tmp_path_factory.mktemp("runs") / "sixty", rows, played)
