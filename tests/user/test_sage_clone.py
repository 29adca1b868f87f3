"""SAGE's prompts out of a clone, what its user is asked, and how its answers are read; the clone is made up."""

import json
import os
from pathlib import Path

import pytest

from rlver_jax.profiles.schema import Profile
from rlver_jax.user import sage_clone
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.sage_user import appraisal_request, band_name, read_appraisal, read_reply, reply_request
from rlver_jax.user.text_forms import Unreadable
from tests.user.made_up_clone import POLICY, SIMULATOR, write_clone

PROFILE = Profile.from_json(
    {
        "id": "p",
        "player": "Ida, 30",
        "scene": "a lost job {{dialog_history}}",
        "main_cha": "calm",
        "cha_group": ["calm"],
        "task": "be heard",
    }
)


@pytest.fixture
def clone(tmp_path):
    return write_clone(tmp_path)


def test_what_is_read(clone):
    sage = sage_clone.read(clone)
    assert sage == sage_clone.read(clone / "SAGE"), "its folder SAGE will do"
    assert sage.goal == "You came to talk.\n* Keep your wish to yourself."
    assert [band_name(sage, emotion) for emotion in (100, 99, 70, 40, 10, 9, 0)] == [
        f"Mood-{band}" for band in "SAABCFF"
    ]
    assert sage.speakers == {"user": "ME", "assistant": "THEM"}
    assert sage.no_history == "Nothing yet."
    prompts = load_prompts("en", clone)
    assert prompts.sage == sage
    for mode in ("think", "direct"):
        assert prompts.policy_system(mode) == "Chat so that they feel good. {{ braces }} stay."


def test_requests_are_its_templates_filled_in(clone):
    """By hand. The replacements have SAGE's order: a slot that a profile names is filled too, one in a reply is not."""
    sage, profile = sage_clone.read(clone), PROFILE
    aloud = ["I lost it.", "Oh?", "Yes.", "Tell me {{new_history}}."]
    history = [{"role": who, "content": text} for who, text in zip(["ME", "THEM"] * 2, aloud, strict=True)]
    shown = lambda messages: json.dumps(messages, ensure_ascii=False, indent=2)  # noqa: E731
    assert appraisal_request(sage, profile, aloud, 47) == (
        "Judge the latest words.\n# Aim\n*You came to talk.\n* Keep your wish to yourself.\n"
        "Answer as: Content: TargetCompletion: Activity: Analyse: Change:\n# Who\nIda, 30\n# Where\n"
        f"a lost job {shown(history)}\n**mood 47\n**so far\n{shown(history)}\n"
    )
    plain = Profile.from_json(PROFILE.to_json() | {"scene": "a lost job"})
    felt = {"content": "C", "target": "T", "activity": "A", "feeling": "F"}
    assert reply_request(sage, plain, aloud[:2], 70, felt) == (
        "Say something.\n*You came to talk.\n* Keep your wish to yourself.\nIda, 30\na lost job\n**before\n[]\n"
        f"**latest\n{shown(history[:2])}\n**thoughts\ncool:\nT\nwarm:\nAF\n**mood Mood-A\n"
    )
    assert reply_request(sage, plain, [], 40, None) == (
        "Say something.\n*You came to talk.\n* Keep your wish to yourself.\nIda, 30\na lost job\n**before\n"
        "Nothing yet.\n**latest\n\n**thoughts\nBegin, in a few words.\n**mood Mood-B\n"
    )


@pytest.mark.parametrize(
    ("behind", "change"),
    [("+4", 4), ("-10", -10), ("[-3]", -3), ("+25 (very much)", 10), ("-99", -10), ("about 2, or 3", 2), ("0", 0)],
)
def test_an_appraisal_is_read_as_sage_does(behind, change):
    """Bold marks go, full-width colons count, the first whole number behind Change counts, limited to ten."""
    answer = (
        f"**Content：**\n[they asked]\nTargetCompletion:\n[partly]\nActivity:\n[hm\nand so]\nAnalyse:\nwarm\n"
        f"**Change:**\n{behind}"
    )
    filled = read_appraisal(f"<think>Change: 9</think>{answer}")
    assert filled.change == change
    assert filled.texts == {"content": "they asked", "target": "partly", "activity": "hm\nand so", "feeling": "warm"}


def test_answers_that_hold_nothing():
    with pytest.raises(Unreadable):
        read_appraisal("Content:\na\nChange:\nup")
    with pytest.raises(Unreadable):
        read_reply("Thinking:\nx\nResponse:\n[]")


def test_a_reply_is_read_as_sage_does():
    answer = "Thinking:\n1. cool\nOrigin:\nHm.\nChange:\nshorter\nResponse:\n[“Well.”]\n"
    assert read_reply(answer) == ("1. cool\nOrigin:\nHm.\nChange:\nshorter", "Well.")
    assert read_reply("just words").reply == "just words"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "target_prompt = ",
            "goal = ",
            "expected, at the top, a text assigned to target_prompt",
        ),
        ("emo_count = {", "emo_count = dict(", "is no Python file that can be parsed"),
        (
            '{"Mood-S": 100',
            '{"Mood-S": "high"',
            "at the top, a dictionary assigned to emo_count (int by name)",
        ),
        ("def planning_reply", "def plan", "expected, at the top, a function planning_reply"),
        (
            '    template = """Judge',
            '    text = """Judge',
            "planning_reply, a text assigned to template",
        ),
        ("{{simulator_role}}", "{{role}}", "planning_reply, {{simulator_role}} within the text assigned to template"),
        ("{{new_history}}\n**", "\n**", "player_reply, {{new_history}} within the text assigned to template"),
        ('"cool:\\n" + planning', "cool + planning", "in the function player_reply, a text around the appraisal"),
        ('"Nothing yet."', "nothing", "player_reply, a text for no {{dialog_history}}"),
        ("planning['analyse'] = ", "first = ", "a text assigned to planning['analyse'], for the first words"),
        ('mapping = {"user": "ME", "assistant": "THEM"}\n        prompt', "prompt", "a dictionary assigned to mapping"),
    ],
)
def test_what_a_clone_lacks_is_said(tmp_path, old, new, says):
    assert old in SIMULATOR
    with pytest.raises(ValueError, match="SAGE/simulator_response.py: ") as error:
        sage_clone.read(write_clone(tmp_path, SIMULATOR.replace(old, new)))
    assert says in str(error.value)


def test_what_is_no_clone(tmp_path):
    with pytest.raises(ValueError, match=r"holds no SAGE/simulator_response.py; expected a clone of github"):
        sage_clone.read(tmp_path)
    with pytest.raises(ValueError, match=r"npc_response.py: No such file"):
        sage_clone.read(write_clone(tmp_path / "a", policy=None))
    with pytest.raises(ValueError, match=r"npc_response.py: expected, in the function call_npc, a text assigned"):
        sage_clone.read(write_clone(tmp_path / "b", policy=POLICY.replace("role_system", "system")))


def test_the_published_repository():
    """A clone of github.com/Tencent/digitalhuman in RLVER_JAX_SAGE_CLONE: everything is found, every slot is filled."""
    folder = os.environ.get("RLVER_JAX_SAGE_CLONE", "")
    if not folder:
        pytest.skip("no clone of SAGE's repository: name one in RLVER_JAX_SAGE_CLONE")
    sage = sage_clone.read(Path(folder))
    assert (list(sage.bands.values()), sage.lowest) == ([100, 70, 40, 10], "Emotion-F")
    plain = Profile.from_json(PROFILE.to_json() | {"scene": "a lost job"})
    felt = {"content": "C", "target": "T", "activity": "A", "feeling": "F"}
    for request in (
        appraisal_request(sage, plain, ["a", "b"], 40),
        reply_request(sage, plain, ["a", "b"], 40, felt),
        reply_request(sage, plain, [], 40, None),
    ):
        assert "{{" not in request
        assert "Ida, 30" in request
        assert "a lost job" in request
