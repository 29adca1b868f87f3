"""The text form of guided scripts, part by part."""

import pytest

from rlver_jax.user.prompts import Part, parse_script


def test_parts_by_hand():
    text = "Mood {emotion} ({band}).\nHeard:<<free:content>>\nChange:\n<<choose:change>>\n"
    assert parse_script(text) == (
        Part("text", "Mood "),
        Part("slot", "emotion"),
        Part("text", " ("),
        Part("slot", "band"),
        Part("text", ").\nHeard:"),
        Part("free", "content"),
        Part("text", "Change:\n"),
        Part("choose", "change"),
    )


def test_line_ends_belong_to_fields():
    same = (Part("text", "a:"), Part("free", "x"), Part("text", "\nb:"), Part("free", "y"))
    assert parse_script("a:<<free:x>>\n\nb:<<free:y>>") == same
    assert parse_script("a:<<free:x>>\r\n\r\nb:<<free:y>>\r\n\r\n") == same


def test_fields_may_touch_lines_and_slots_each_other():
    assert parse_script("<<free:x>>\n<<free:y>>") == (Part("free", "x"), Part("free", "y"))
    assert parse_script("{emotion}{band}") == (Part("slot", "emotion"), Part("slot", "band"))
    assert parse_script("") == ()
    assert parse_script("1 < 2 << 3 > 0") == (Part("text", "1 < 2 << 3 > 0"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb {mood}", r"mine, line 2: unknown slot \{mood\}; a script knows \{emotion\} and \{band\}"),
        ("{}", r"line 1: unknown slot \{\}"),
        ("<<fre:x>>", "unknown mark <<fre:x>>"),
        ("<<free:Two Words>>", "unknown mark"),
        ("a\n\nb:<<free:x>> tail", "line 3: <<free:x>> must be the last thing on its line"),
        ("a: <<free:x>>", "remove the space before <<free:x>>"),
        ("a:<<free:x>>\nb:<<free:x>>", "line 2: <<free:x>> uses a name"),
    ],
)
def test_errors_name_file_and_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_script(text, "mine")
