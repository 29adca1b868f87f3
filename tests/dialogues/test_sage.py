"""SAGE's published results come through our records unchanged, and our records through SAGE's schema."""

import json

import pytest

from rlver_jax.dialogues.log import read_dialogues, record_faults, write_dialogues
from rlver_jax.dialogues.sage import from_sage, to_sage
from rlver_jax.dialogues.trajectory import emotion_faults
from rlver_jax.profiles.schema import Profile
from rlver_jax.user.emotion import SAGE
from tests.dialogues.rlver_log import logged


def planning(change):
    return {"activity": "hm", "TargetCompletion": "partly", "content": "a hug", "analyse": "better", "change": change}


def result():
    """As SAGE writes one: a thinking policy, one appraised reply, and a last one at the turn limit."""
    return {
        "id": "p1",
        "emo_point": 45,
        "emo_state": "Emotion-B",
        "target": "eq",
        "player": "a student",
        "scene": "an exam",
        "character": "calm",
        "topic": "school",
        "task": "advice",
        "history": [
            {"role": "user", "content": "I failed.", "emotion-point": 40},
            {"role": "assistant", "content": "Oh no.", "think": "be kind"},
            {
                "role": "user",
                "content": "Yes.",
                "thinking": "1. Tone: short.\nOrigin:\nYes.",
                "emotion-point": 45,
                "planning": planning(5),
            },
            {"role": "assistant", "content": "What now?"},
        ],
    }


def test_sage_results_survive_the_round_trip():
    sage = result()
    record = from_sage(sage, 7)
    assert record["dialogue"] == 7
    assert record["emotions"] == [40, 45, 45]
    assert (record["turns"], record["end_reason"], record["reward"]) == (2, "turn_limit", 0.45)
    assert record["messages"][2]["appraisal"] == {
        "activity": "hm",
        "target": "partly",
        "content": "a hug",
        "feeling": "better",
    }
    assert [m["thought"] for m in record["messages"] if m["role"] == "assistant"] == ["be kind", None]
    assert to_sage(record, Profile.from_json(sage)) == sage


@pytest.mark.parametrize(
    ("emotion", "content", "reason"), [(100, "bye", "success"), (5, "bye", "failure"), (45, "bye", "goodbye")]
)
def test_end_reasons_follow_from_the_last_message(emotion, content, reason):
    sage = result() | {"emo_point": emotion}
    sage["history"] = sage["history"][:3]
    sage["history"][2] |= {"content": content, "emotion-point": emotion}
    assert from_sage(sage)["end_reason"] == reason


def test_own_records_survive_the_round_trip(played_records, played_profiles, tmp_path):
    """Texts, emotions and changes do; tokens can't."""
    profiles = {p.id: p for p in played_profiles}
    for record in played_records:
        sage = to_sage(record, profiles[record["profile"]])
        json.dumps(sage)
        back = from_sage(sage, record["dialogue"])
        for name in ("dialogue", "profile", "hidden_intention", "turns", "emotion", "emotions", "initial_emotion"):
            assert back[name] == record[name], name
        for ours, theirs in zip(record["messages"], back["messages"], strict=True):
            names = {"role", "content", "thought", "appraisal", "change", "emotion"} & set(ours)
            assert {n: ours[n] for n in names} == {n: theirs[n] for n in names}
            if ours.get("content") is not None and "considerations" in ours:
                assert theirs["considerations"] == ours["considerations"]
        write_dialogues(tmp_path / "log.jsonl", [back])
        assert read_dialogues(tmp_path / "log.jsonl") == [back]


def test_a_profile_of_another_dialogue_is_refused():
    sage = result()
    with pytest.raises(ValueError, match="'p1' given with profile 'p2'"):
        to_sage(from_sage(sage), Profile.from_json(sage | {"id": "p2"}))


@pytest.mark.parametrize("broken", [{}, {"id": "a", "task": "b", "emo_point": 3, "history": []}, []])
def test_other_objects_are_refused(broken):
    with pytest.raises(ValueError, match="not a result of SAGE"):
        from_sage(broken)


def test_published_results(published):
    """All published files that are there, to the letter."""
    files = sorted(published.parent.glob("sage/*_result.jsonl"))
    if not files:
        pytest.skip("no published results of SAGE beside the profiles")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            sage = json.loads(line)
            assert to_sage(from_sage(sage), Profile.from_json(sage)) == sage


def test_rlver_logs_are_read():
    record = from_sage(logged(("+5", 35, "嗯。"), ("-10", 25, "再见。")))
    assert record["source"] == "RLVER"
    assert record["hidden_intention"] == "你希望对方用心倾听你的情绪宣泄"
    assert (record["emotions"], record["reward"], record["end_reason"]) == ([30, 35, 25], 0.25, "goodbye")
    assert record["messages"][2]["change"] == 5
    assert record["messages"][2]["appraisal"] == {
        "activity": "hm",
        "target": "partly",
        "content": "a hug",
        "feeling": "better",
    }
    profile = Profile.from_json(logged())
    assert (profile.hidden_intention, profile.background, profile.first_talk) == (
        record["hidden_intention"],
        "an exam",
        "唉。",
    )


@pytest.mark.parametrize(
    ("turns", "emotions", "reward", "reason"),
    [
        ([("-20", 10, "嗯"), ("-15", -5, "嗯")], [30, 10, -5], 0.0, "failure"),  # nothing bounds a change or a fall
        ([("+80", 100, "谢谢")], [30, 100], 1.0, "success"),  # min(30 + 80, 100)
        ([("+3", 33, "嗯"), (" 4 ", 37, "嗯")], [30, 33, 37], 0.37, "turn_limit"),  # the last reply is answered too
        ([("0", 30, "拜拜")], [30, 30], 0.3, "goodbye"),
    ],
)
def test_rlver_emotions_are_taken_as_they_are_logged(turns, emotions, reward, reason):
    record = from_sage(logged(*turns))
    assert (record["emotions"], record["reward"], record["end_reason"]) == (emotions, reward, reason)
    assert list(emotion_faults(record, SAGE)) == []
    assert not list(record_faults(record))


def test_rlver_arithmetic_is_checked():
    faults = list(emotion_faults(from_sage(logged(("-20", 0, "嗯"), ("+5", 5, "嗯"), ("+99", 104, "嗯"))), SAGE))
    assert faults == ["turn 1: emotion 0, but 30 -20 makes 10", "turn 3: emotion 104, but 5 +99 makes 100"]
    wrong = from_sage(logged(("+5", 35, "嗯")) | {"emo_point": 40})
    assert "final emotion 40, but the last turn's is 35" in list(emotion_faults(wrong, SAGE))


def without(obj, *path):
    """A copy without a field."""
    copy = json.loads(json.dumps(obj))
    *parents, last = path
    inner = copy
    for key in parents:
        inner = inner[key]
    del inner[last]
    return copy


def with_value(obj, value, *path):
    copy = json.loads(json.dumps(obj))
    *parents, last = path
    inner = copy
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return copy


GOOD = logged(("+5", 35, "嗯。"))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (logged(ending=""), "no field task, nor a scene that ends with the hidden intention"),
        (without(GOOD, "emo_point"), "emo_point is None, expected a whole number"),
        (without(GOOD, "history", 2, "planning", "change"), r"history\[2\].planning.change is None"),
        (with_value(GOOD, "five", "history", 2, "planning", "change"), r"history\[2\].planning.change is 'five'"),
        (with_value(GOOD, True, "history", 2, "planning", "change"), r"history\[2\].planning.change is True"),
        (with_value(GOOD, "9" * 5000, "history", 2, "planning", "change"), r"history\[2\].planning.change is '999"),
        (with_value(GOOD, 1.5, "history", 0, "emotion-point"), r"history\[0\].emotion-point is 1.5"),
        (with_value(GOOD, float("nan"), "history", 2, "emotion-point"), r"history\[2\].emotion-point is nan"),
        (with_value(GOOD, 10**400, "history", 2, "emotion-point"), r"history\[2\].emotion-point is 1000"),
        (with_value(GOOD, [], "history", 2, "planning"), r"history\[2\].planning is \[\]"),
        (with_value(GOOD, 3, "history", 2, "thinking"), r"history\[2\].thinking is 3, expected a text"),
        (with_value(GOOD, 3, "history", 2, "planning", "reason"), r"history\[2\].planning.reason is 3"),
        (with_value(GOOD, None, "history", 1, "content"), r"history\[1\].content is None, expected a text"),
        (with_value(GOOD, "system", "history", 1, "role"), r"history\[1\] is not a message of assistant"),
        (with_value(GOOD, "hello", "history"), "a history that opens with the user's message"),
    ],
)
def test_malformed_logs_are_refused_by_the_field(broken, says):
    with pytest.raises(ValueError, match=says):
        from_sage(broken)
