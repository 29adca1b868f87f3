"""Profiles in tokens: widths that all batches share, found in one pass, which a data set needs once."""

import dataclasses

import jax
import numpy as np
import pytest

from rlver_jax.profiles.builder import prepare
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout import profile_tokens
from rlver_jax.rollout.profile_tokens import EncodedProfile, measure_profiles
from tests.profiles.test_builder import line, write


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [line(i, player="x" * length, first_talk="y" * (i + 1)) for i, length in enumerate((5, 300, 299, 7))]
    return prepare({"train": write(tmp_path / "a.jsonl", rows)}, tmp_path / "sets")["train"]


class Encoder:
    """A token for each character; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, profile: Profile) -> EncodedProfile:
        self.calls += 1
        return EncodedProfile(*(np.arange(len(t), dtype=np.int32) for t in (profile.persona, profile.first_talk or "")))


def test_batches_have_the_widths_of_all_profiles_whatever_they_hold(source):
    tokens, longest, length = measure_profiles(source, Encoder())
    assert (longest.id, length) == ("id1", 302)  # 299 + 3 is no more: the first one is named
    assert (tokens.count, tokens.prefix_width, tokens.first_width) == (4, 384, 128)
    batch = tokens.batch([3, 0], [8, 9, 20, 21], count=4)
    assert batch.prefix.shape == (4, 384)
    assert batch.first_talk.shape == (4, 128)
    assert batch.prefix_count.tolist() == [7, 5, 0, 0]
    assert batch.first_count.tolist() == [4, 1, 0, 0]
    assert batch.prefix[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    assert batch.active.tolist() == [True] * 4 + [False] * 4


def test_a_list_gives_the_same_arrays(source):
    ours, listed = (measure_profiles(profiles, Encoder())[0] for profiles in (source, list(source)))
    batches = [jax.tree.leaves(tokens.batch([2, 1], [0, 1])) for tokens in (ours, listed)]
    for a, b in zip(*batches, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_a_data_set_is_measured_once_for_a_tokenizer_and_prompts(source, tmp_path):
    first, again, other, listed = Encoder(), Encoder(), Encoder(), Encoder()
    one, two = measure_profiles(source, first, ["a"]), measure_profiles(source, again, ["a"])
    assert one[1:] == two[1:]
    assert dataclasses.replace(one[0], encode=None) == dataclasses.replace(two[0], encode=None)
    measure_profiles(source, other, ["b"])
    measure_profiles(list(source), listed, ["a"])
    assert [encoder.calls for encoder in (first, again, other, listed)] == [4, 0, 4, 4]
    (file, _) = sorted((tmp_path / "cache").rglob("profile_widths/*.json"))
    for broken in ("{", "[1]", '{"prefix": 3}'):
        for path in file.parent.glob("*.json"):
            path.write_text(broken)
        assert measure_profiles(source, Encoder(), ["a"])[1:] == one[1:]


def test_few_profiles_stay_in_tokens_and_many_are_encoded_anew(source, monkeypatch):
    few, many = Encoder(), Encoder()
    measure_profiles(source, few)[0].batch([0, 1, 2, 3], range(4))
    assert few.calls == 4
    monkeypatch.setattr(profile_tokens, "KEPT", 1)
    measure_profiles(source, many, ["b"])[0].batch([0, 1, 0, 2], range(4))
    assert many.calls == 4 + 3  # each of a batch once
