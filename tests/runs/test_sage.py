"""SAGE's published results come through our records unchanged, and our records through SAGE's schema."""

import json

import pytest

from rlver_jax.profiles.schema import Profile
from rlver_jax.runs.dialogue_log import read_dialogues, write_dialogues
from rlver_jax.runs.sage import from_sage, to_sage


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
    """All three published files, to the letter."""
    files = sorted(published.parent.glob("sage/*_result.jsonl"))
    if not files:
        pytest.skip("no published results of SAGE beside the profiles")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            sage = json.loads(line)
            assert to_sage(from_sage(sage), Profile.from_json(sage)) == sage
