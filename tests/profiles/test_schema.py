"""Profiles and their files: both schemas, and every fault with the place where it stands."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlver_jax.profiles.intentions import HIDDEN_INTENTIONS
from rlver_jax.profiles.schema import (
    Profile,
    ProfileError,
    intention_of,
    read_profiles,
)

LISTEN = "你希望对方用心倾听你的情绪宣泄"
texts = st.text(min_size=1).filter(lambda text: text.strip())


def rlver(**changes):
    """A made-up line in RLVER's schema; a change to None takes the field away."""
    obj = {
        "id": "p1",
        "player": "* 姓名：林一\n* 职业：木匠",
        "scene": f"## 背景\n林一的工坊漏雨了。\n####隐藏主题:\n***{LISTEN}",
        "main_cha": "被动型",
        "cha_group": ["内向", "细心"],
        "task": LISTEN,
    } | changes
    return {name: value for name, value in obj.items() if value is not None}


def sage(**changes):
    obj = rlver(main_cha=None, cha_group=None) | {
        "character": "被动型",
        "topic": "工作-工坊漏雨",
        "emo_point": 40,
        "emo_state": "Emotion-B",
        "target": "eq",
        "history": [
            {"role": "user", "content": "今天真倒霉。"},
            {"role": "assistant", "content": "怎么了？"},
        ],
    }
    return {name: value for name, value in (obj | changes).items() if value is not None}


def write(path, *lines):
    """Writes lines, each bytes, text, or an object to be dumped as JSON."""
    as_bytes = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(as_bytes) + b"\n")
    return path


def faults_of(*paths):
    with pytest.raises(ProfileError) as caught:
        read_profiles(paths)
    return list(caught.value.faults)


def test_both_schemas_give_the_same_words():
    plain = Profile.from_json(rlver(first_talk="今天真倒霉。"))
    assert plain == Profile(
        id="p1",
        persona="* 姓名：林一\n* 职业：木匠",
        scene=f"## 背景\n林一的工坊漏雨了。\n####隐藏主题:\n***{LISTEN}",
        hidden_intention=LISTEN,
        main_character="被动型",
        traits=("内向", "细心"),
        topic=None,
        first_talk="今天真倒霉。",
    )
    result = Profile.from_json(sage())
    assert (result.traits, result.topic, result.first_talk) == ((), "工作-工坊漏雨", "今天真倒霉。")
    assert (result.persona, result.scene, result.main_character) == (
        plain.persona,
        plain.scene,
        plain.main_character,
    )
    assert plain.background == "## 背景\n林一的工坊漏雨了。"
    assert Profile.from_json(rlver(scene="no such ending")).background == "no such ending"


@given(texts, texts, texts, texts, texts, st.lists(texts), st.none() | texts, st.none() | texts)
def test_round_trip_through_json_text(id_, persona, story, intention, character, traits, topic, first_talk):
    obj = rlver(id=id_, player=persona, scene=story, task=intention, main_cha=character, cha_group=traits)
    obj |= {name: text for name, text in (("topic", topic), ("first_talk", first_talk)) if text is not None}
    profile = Profile.from_json(json.loads(json.dumps(obj)))
    assert json.loads(json.dumps(profile.to_json())) == obj
    assert Profile.from_json(profile.to_json()) == profile


@given(texts, texts, st.none() | texts)
def test_sage_round_trips_into_rlver(persona, opening, topic):
    profile = Profile.from_json(sage(player=persona, topic=topic, history=[{"role": "user", "content": opening}]))
    assert (profile.persona, profile.first_talk, profile.topic) == (persona, opening, topic)
    assert Profile.from_json(profile.to_json()) == profile


def test_the_eight_hidden_intentions():
    assert [one.kind for one in HIDDEN_INTENTIONS] == ["rational"] * 4 + ["emotional"] * 4
    for field in ("key", "chinese", "english"):
        assert len({getattr(one, field) for one in HIDDEN_INTENTIONS}) == 8
    listening = Profile.from_json(rlver())
    assert intention_of(listening).key == "listening"
    assert listening.kind == "emotional"
    english = Profile.from_json(rlver(scene="s", task=HIDDEN_INTENTIONS[0].english + "."))
    assert (intention_of(english).key, english.kind) == ("advice", "rational")
    own = Profile.from_json(rlver(scene="s", task="You want to laugh about it"))
    assert intention_of(own) is None
    assert own.kind is None


FAULTS = [
    ('{"id": "p1",', "text that is not JSON", "one whole JSON object"),
    (json.dumps(rlver()) + json.dumps(rlver(id="p9")), "Extra data", "one whole JSON object"),
    ("[1, 2]", "a list [1, 2]", "expected a JSON object"),
    ("null", "found null", "expected a JSON object"),
    ("[" * 100_000, "can't be read", "expected one plain JSON object"),
    ('{"id": "a", "id": "b"}', "field 'id' more than once", "expected it once"),
    (b'{"id": "\xff"}', "byte 0xff at column 9", "expected UTF-8"),
    (rlver(id=None), "no field 'id'", "expected it to hold a text"),
    (rlver(id=7), "the number 7 in field 'id'", "expected a text"),
    (rlver(id=True), "the value true in field 'id'", "expected a text"),
    (rlver(player=""), "empty text in field 'player'", "at least one visible character"),
    (rlver(scene=" \n"), "empty text in field 'scene'", "at least one visible character"),
    (rlver(task=["x"]), """a list ["x"] in field 'task'""", "expected a text"),
    (rlver(main_cha=None), "no field 'main_cha'", "expected it to hold a text"),
    (rlver(cha_group=None), "no field 'cha_group'", "expected a list of texts"),
    (rlver(cha_group="内向"), "the text", "expected a list of texts"),
    (rlver(cha_group=["内向", 3]), "the number 3 in item 2 of field 'cha_group'", "expected a text"),
    (rlver(first_talk=""), "empty text in field 'first_talk'", "at least one visible character"),
    (rlver() | {"firstTalk": "Hello."}, "found field 'firstTalk'", "expected 'first_talk'"),
    (rlver() | {"first talk": "Hello."}, "found field 'first talk'", "expected 'first_talk'"),
    (rlver(player="\ud83d"), "half of a surrogate pair", "expected whole characters"),
    (rlver(task="另一个愿望"), "'另一个愿望'", "expected the same sentence in both"),
    (sage(history=[]), "a list [] in field 'history'", "opened by one of role 'user'"),
    (
        sage(history=[{"role": "assistant", "content": "x"}]),
        "in field 'history'",
        "opened by one of role 'user'",
    ),
    (sage(history=[{"role": "user", "content": 5}]), "the number 5 in the first message", "expected a text"),
    (sage(history=None), "no field 'history'", "opened by one of role 'user'"),
    (sage(topic=5), "the number 5 in field 'topic'", "expected a text"),
]


@pytest.mark.parametrize(("line", "named", "expected"), FAULTS)
def test_a_faulty_line_is_named(tmp_path, line, named, expected):
    path = write(tmp_path / "own.jsonl", rlver(id="before"), "   ", line, rlver(id="after"))
    (fault,) = faults_of(path)
    assert fault.startswith(f"{path}:3: ")
    assert named in fault
    assert expected in fault


def test_every_fault_of_a_line_and_of_every_file_is_listed(tmp_path):
    first = write(tmp_path / "a.jsonl", rlver(id=None, player="", task=4), rlver())
    second = write(tmp_path / "b.jsonl", rlver(id="p2"), rlver())
    empty = write(tmp_path / "empty.jsonl", "  ", "")
    missing = tmp_path / "missing.jsonl"
    listed = faults_of(first, second, empty, missing, tmp_path)
    locations = [fault.removeprefix(str(tmp_path)).split(": ")[0] for fault in listed]
    assert locations == ["/a.jsonl:1"] * 3 + ["/b.jsonl:2", "/empty.jsonl:1", "/missing.jsonl", ""]
    assert f"'p1' again, which {first}:2 has already" in listed[3]
    assert "check the path" in listed[5]
    assert faults_of() == ["no file was given, expected at least one JSONL file of profiles"]


def test_the_message_shows_twenty_faults_and_counts_the_rest(tmp_path):
    path = write(tmp_path / "many.jsonl", *["nonsense"] * 33)
    with pytest.raises(ProfileError) as caught:
        read_profiles(path)
    message = str(caught.value)
    assert len(caught.value.faults) == 33
    assert [f"{path}:{n}: " in message for n in (1, 20, 21)] == [True, True, False]
    assert message.startswith("33 faults")
    assert message.endswith("and 13 more")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.faults, str(copy)) == (caught.value.faults, message)


def test_blank_lines_crlf_byte_order_mark_and_line_separators_are_harmless(tmp_path):
    rows = [rlver(id="a", player="上\u2028下"), rlver(id="b"), sage(id="c")]
    lines = [json.dumps(row, ensure_ascii=False) + "\r" for row in rows]
    path = write(tmp_path / "own.jsonl", b"\xef\xbb\xbf" + lines[0].encode(), "", *lines[1:], "\t")
    assert [profile.id for profile in read_profiles(path)] == ["a", "b", "c"]
    assert read_profiles(str(path))[0].persona == "上\u2028下"


def test_three_planted_errors_in_the_published_file(tmp_path, published):
    lines = (published / "train_profile.jsonl").read_text(encoding="utf-8").splitlines()
    lines[99] = lines[99][:-1]
    lines[199] = json.dumps({k: v for k, v in json.loads(lines[199]).items() if k != "player"})
    lines[299] = json.dumps(json.loads(lines[299]) | {"id": json.loads(lines[7])["id"]})
    path = write(tmp_path / "planted.jsonl", *lines)
    bad_json, no_field, twice = faults_of(path)
    assert bad_json.startswith(f"{path}:100: found text that is not JSON")
    assert no_field.startswith(f"{path}:200: found no field 'player'")
    assert twice.startswith(f"{path}:300: found id ")
    assert f"{path}:8 has" in twice
