"""Forms of the scripts, and answers as models of all tempers write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_jax.user.prompts import LANGUAGES, load_prompts, parse_script
from rlver_jax.user.text_forms import Unreadable, make_form, read_form, read_wanted

APPRAISAL = make_form(
    parse_script(
        'At {emotion}, band "{band}".\nHeard:<<free:heard>>\nFeel:<<free:feel>>\nChange, -10 to +10:\n<<choose:change>>'
    ),
    40,
    "B",
)
REPLY = make_form(parse_script("Now {emotion}.\nTone:<<free:tone>>\nSay aloud:<<free:reply>>"), 47, "B")


def test_a_form_is_its_script_with_marks():
    assert APPRAISAL.text == 'At 40, band "B".\n[heard] Heard:\n[feel] Feel:\nChange, -10 to +10:\n[change]'
    assert REPLY.text == "Now 47.\n[tone] Tone:\n[reply] Say aloud:"
    assert [field.name for field in APPRAISAL.fields] == ["heard", "feel", "change"]


@pytest.mark.parametrize(
    "answer",
    [
        "[heard] Heard: to sleep on it\n[feel] Feel: a little better\nChange, -10 to +10:\n[change] +3",
        "[heard] to sleep on it\n[feel] a little better\n[change] 3",
        "Heard: to sleep on it\nFeel: a little better\nChange, -10 to +10:\n3",
        "**[heard]** **Heard:** to sleep on it\n\n**[feel]** Feel: a little better\n\n**[change]** **+3**",
        "- [heard] Heard: to sleep\n  on it\n- [feel] a little better\n- [change]: +3 (they listened)",
        "【heard】to sleep on it\n【feel】 a little better\n【change】＋3".replace("＋", "+"),
        "<think>\n[change] -9 perhaps?\n</think>\n[heard] to sleep on it\n[feel] a little better\n[change]\n+3\n",
        "```\n[heard] to sleep on it\n[feel] a little better\n[change] +3\n```",
        'At 40, band "B".\n[HEARD] to sleep on it\r\n[Feel] a little better\r\n[Change] +3.',
        "Sure! Here is the form:\n[change] +3\n[heard] to sleep on it\n[feel] a little better",
    ],
)
def test_readable_answers(answer):
    filled = read_form(APPRAISAL, answer)
    assert filled.change == 3
    assert filled.texts == {"heard": "to sleep on it", "feel": "a little better"}


@pytest.mark.parametrize(
    ("text", "change"), [("-10", -10), ("+10", 10), ("0", 0), ("−4", -4), ("- 4", -4), ("7/10", 7)]
)
def test_numbers(text, change):
    assert read_form(APPRAISAL, f"[change] {text}").change == change


@pytest.mark.parametrize(
    "text",
    [
        "",
        "11",
        "-11",
        "3.5",
        "100",
        "much better",
        "up by 3",
        "1000000",
        "+",
        "n/a -3",
        "(-10 … +10)",
        "-10...10",
        "-10 to +10",
        "3 or 4",
        "-3~-1",
    ],
)
def test_no_number_is_made_up(text):
    with pytest.raises(Unreadable, match=r"\[change\], a whole number from -10 to \+10"):
        read_form(APPRAISAL, f"[heard] that\n[change] {text}")


def test_what_counts_must_be_there_and_nothing_else():
    assert read_form(APPRAISAL, "[change] 2").texts == {"heard": "", "feel": ""}
    assert read_form(REPLY, "[reply] Say aloud: I see.\nThank you.").texts == {"tone": "", "reply": "I see. Thank you."}
    for nothing in (
        "",
        "I see. Thank you.",
        "[tone] flat",
        "[tone] flat\n[reply] Say aloud:\n",
        "[tone] flat\n[reply] **",
    ):
        with pytest.raises(Unreadable, match=r"\[reply\]"):
            read_form(REPLY, nothing)


def test_the_wanted_field_alone():
    """A second answer may be the bare thing; what the first one said beside it stays."""
    before = {"heard": "that", "feel": ""}
    for answer in (
        "-3",
        "I think -3.",
        "<think>5 or 6</think>-3",
        "[change] -3",
        "Change, -10 to +10: -3",
        "情绪变化：-3",
    ):
        assert read_wanted(APPRAISAL, before, answer) == (before, -3)
    assert read_wanted(APPRAISAL, before, "[feel] well\n[change] 2") == ({"heard": "that", "feel": "well"}, 2)
    for answer in ("", "-3 or -4", "between -10 and +10", "12", "2.5", "sad", "[feel] well"):
        with pytest.raises(Unreadable, match="change") as caught:
            read_wanted(APPRAISAL, before, answer)
        assert caught.value.texts == before
    assert read_wanted(REPLY, {"tone": "flat"}, "I see.\nThank you.").texts == {
        "tone": "flat",
        "reply": "I see. Thank you.",
    }
    for answer in ("", "[tone] flat", "Say aloud:", "[change] 3"):
        with pytest.raises(Unreadable, match="reply"):
            read_wanted(REPLY, {}, answer)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    for form in (APPRAISAL, REPLY):
        for answer in (text, form.text + text, text + "\n[change] " + text + "\n[reply] " + text):
            try:
                filled = read_form(form, answer)
            except Unreadable:
                continue
            assert -10 <= filled.change <= 10
            assert all("\n" not in words for words in filled.texts.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_shipped_scripts_make_forms_that_read_back(language):
    prompts = load_prompts(language)
    for script, wanted in ((prompts.appraisal, "change"), (prompts.reply, "reply")):
        form = make_form(script, 40, "B")
        lines = [line + (" -7" if line.startswith("[change]") else " words") for line in form.text.split("\n")]
        filled = read_form(form, "\n".join(line if line.startswith("[") else line[:-6] for line in lines))
        assert form.wanted.name == wanted
        assert set(filled.texts.values()) == {"words"}
        assert filled.change == (-7 if wanted == "change" else 0)
        asked = prompts.form(form.text, say="你好 {{ x }}")
        assert form.text in asked
        assert "你好 {{ x }}" in asked
