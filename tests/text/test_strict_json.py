import json
import time

from rlver_jax.text.strict_json import half_character, repeats


def test_names_that_stand_twice():
    objects = []
    json.loads('{"a": {"b": 1, "c": 2}, "d": 0, "a": 1, "d": 2, "a": 3}', object_pairs_hook=lambda p: objects.append(p))
    assert [list(repeats(pairs)) for pairs in objects] == [[], ["a", "d", "a"]]


def test_a_hundred_thousand_names_take_no_time():
    """Counting each among all would take minutes."""
    pairs = [(str(i), 0) for i in range(100_000)] + [("7", 1)]
    began = time.process_time()
    assert list(repeats(pairs)) == ["7"]
    assert time.process_time() - began < 1


def test_half_characters():
    assert half_character("plain") == half_character("我听到了 🙂") == ""
    assert half_character("a\ud83d\ude42") == "\ud83d"
    assert half_character("我\udfff") == "\udfff"
