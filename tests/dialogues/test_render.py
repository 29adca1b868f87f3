"""A dialogue on the terminal: everything is there, and model text can't do more than be read."""

import io
import re

import pytest
from rich.console import Console

from rlver_jax.dialogues.render import change_text, emotion_bar, print_comparison, print_dialogue
from rlver_jax.text.console import plain


def shown(record, **options):
    out = io.StringIO()
    print_dialogue(record, Console(file=out, width=100, **options))
    return out.getvalue()


def test_everything_that_was_said_is_shown(played_records):
    for record in played_records:
        text = shown(record)
        flat = re.sub(r"\s+", "", text)
        for message in record["messages"]:
            words = [message["content"], message.get("thought"), *message.get("appraisal", {}).values()]
            for word in filter(None, words):
                assert re.sub(r"\s+", "", plain(word)) in flat
        assert f"{record['end_reason']} after {record['turns']} turns" in text
        assert text.count(" turn ") + text.count("\nturn ") == record["turns"]


def hostile(text):
    user = {"role": "user", "content": text, "tokens": [], "emotion": 40, "generated": False}
    policy = {"role": "assistant", "thought": text, "content": text, "violation": False}
    reaction = {
        "role": "user",
        "content": text,
        "appraisal": {"content": text},
        "considerations": {"tone": text},
        "change": 10,
        "emotion": 50,
    }
    return {
        "dialogue": 0,
        "profile": text,
        "mode": "think",
        "hidden_intention": text,
        "end_reason": "goodbye",
        "turns": 1,
        "initial_emotion": 40,
        "emotion": 50,
        "reward": 0.5,
        "messages": [user, policy, reaction],
    }


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", "[bold", "\\[x]", "[link=http://a]b[/link]", ":smile:"])
def test_markup_is_only_text(text):
    assert shown(hostile(text)).count(text) >= 7


@pytest.mark.parametrize("text", ["\x1b[2Jgone", "a\rb", "a\x07b", "\x9b31mred", "\x08\x08", "\u202eabc", "a\x00b"])
def test_controls_are_stripped(text):
    """In colour: no escape sequence but rich's own colours, and no other control character."""
    output = shown(hostile(text), force_terminal=True, color_system="standard")
    left = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", left)
    assert "\x1b[2J" not in output


def test_line_ends_and_other_scripts_stay():
    assert plain("一\r\n二\t3\u2028é👩‍👧") == "一\n二    3\né👩‍👧"


@pytest.mark.parametrize(("change", "text", "style"), [(7, "+7", "green"), (-3, "-3", "red"), (0, "0", "dim")])
def test_a_change_has_sign_and_colour(change, text, style):
    assert (change_text(change).plain, change_text(change).style) == (text, style)


@pytest.mark.parametrize(("emotion", "full", "band"), [(0, 0, "F"), (40, 10, "B"), (100, 25, "S")])
def test_the_bar_is_as_long_as_the_emotion(emotion, full, band):
    bar = emotion_bar(emotion).plain
    assert (bar.count("█"), bar.count("█") + bar.count("░")) == (full, 25)
    assert bar.endswith(f" {emotion} {band}")


def test_a_comparison_shows_one_profile_twice_and_the_scores_side_by_side():
    before, after = hostile("poor words"), hostile("good words")
    stranger = hostile("of somebody else") | {"profile": "other"}
    before["profile"] = after["profile"] = "same"
    out = io.StringIO()
    summaries = ({"score": 31.5, "success": 0, "n": 2}, {"score": 72.25, "success": 12, "n": 2, "rule_score": 70.0})
    pairs = [(summaries[0], [stranger, before]), (summaries[1], [after, stranger])]
    print_comparison(*pairs, Console(file=out, width=100))
    text = out.getvalue()
    assert text.index("poor words") < text.index("good words")
    assert "of somebody else" not in text
    assert re.search(r"by the simulated user\W+31\.50\W+72\.25", text)
    assert re.search(r"successes \(emotion 100\)\W+0\W+12", text)
    assert "gold judge" not in text, "only one of them has it"
