"""The order of training, against a plain recount; resuming, sharing among processes, and held-out batches."""

import json
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlver_jax.profiles.check import shared_personas_warning
from rlver_jax.profiles.reader import ProfileReader, evaluation_batches, shared_personas
from rlver_jax.profiles.schema import Profile, read_profiles


def people(count, persona="persona"):
    return [Profile(f"id{i}", f"{persona} {i}", "scene", "wish", "calm") for i in range(count)]


def indices(reader, steps):
    """Indices of the next steps, one list a step; each index must come with its own profile."""
    batches = [reader.next_batch() for _ in range(steps)]
    assert all(profile.id == f"id{index}" for batch in batches for index, profile in batch)
    return [[index for index, _ in batch] for batch in batches]


def flat(batches):
    return [index for batch in batches for index in batch]


@st.composite
def layouts(draw):
    """(profiles, processes, global batch) that fit each other."""
    processes = draw(st.integers(1, 4))
    share = draw(st.integers(1, 6))
    size = draw(st.integers(processes * share, 50))
    return size, processes, processes * share


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 2**64 - 1), st.booleans())
def test_each_epoch_once_over_all_processes_and_no_repeat_in_a_batch(layout, seed, shuffle):
    size, processes, batch = layout
    source = people(size)
    steps = 4 * size // batch + 2
    shares = [
        indices(
            ProfileReader(
                source,
                seed=seed,
                batch_size=batch,
                process_index=p,
                process_count=processes,
                shuffle=shuffle,
            ),
            steps,
        )
        for p in range(processes)
    ]
    assert {len(share) for shares_of_one in shares for share in shares_of_one} == {batch // processes}
    whole = [flat(parts) for parts in zip(*shares, strict=True)]
    assert whole == indices(ProfileReader(source, seed=seed, batch_size=batch, shuffle=shuffle), steps)
    assert all(len(set(step)) == batch for step in whole)
    stream = flat(whole)
    for start in range(0, len(stream) - size + 1, size):
        assert Counter(stream[start : start + size]) == Counter(range(size))
    if not shuffle:
        assert stream == [i % size for i in range(len(stream))]


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 2**32), st.integers(0, 40), st.sampled_from([1, 2, 3, 4]))
def test_resuming_anywhere_equals_the_unbroken_sequence(layout, seed, stop, processes):
    size, _, batch = layout
    assume(batch % processes == 0)
    source = people(size)
    unbroken = indices(ProfileReader(source, seed=seed, batch_size=batch), stop + 8)
    first = ProfileReader(source, seed=seed, batch_size=batch)
    indices(first, stop)
    saved = json.loads(json.dumps(first.state()))
    assert (saved["epoch"], saved["position"]) == divmod(stop * batch, size)
    resumed = []
    for p in range(processes):
        reader = ProfileReader(source, seed=seed, batch_size=batch, process_index=p, process_count=processes)
        indices(reader, 3)  # whatever was read before must not matter
        reader.restore(saved)
        assert reader.state() == saved
        resumed.append(indices(reader, 8))
    assert [flat(parts) for parts in zip(*resumed, strict=True)] == unbroken[stop:]


def test_saving_does_not_move_and_going_back_repeats():
    reader = ProfileReader(people(7), seed=3, batch_size=5)
    start = reader.state()
    first = indices(reader, 6)
    assert reader.state() == reader.state()
    reader.restore(start)
    assert indices(reader, 6) == first


def test_seeds_and_epochs_differ():
    def epochs(seed):
        reader = ProfileReader(people(40), seed=seed, batch_size=40)
        return [tuple(batch) for batch in indices(reader, 3)]

    permutations = [order for seed in (0, 1, 2**63) for order in epochs(seed)]
    assert len(set(permutations)) == 9
    assert tuple(range(40)) not in permutations
    assert epochs(1) == epochs(1)


def test_every_place_is_as_likely_for_every_profile():
    """A chi-squared test over 2,000 epochs, on a source so small that batches always cross epochs."""
    reader = ProfileReader(people(5), seed=11, batch_size=3)
    stream = flat(indices(reader, 2000 * 5 // 3))
    counts = Counter((at % 5, index) for at, index in enumerate(stream))
    expected = len(stream) / 25
    assert sum((counts[position, i] - expected) ** 2 / expected for position in range(5) for i in range(5)) < 50


def test_the_order_is_the_documented_one():
    """The words of Philox with key (seed, epoch), sorted: a contract, since checkpoints rely on it."""
    words = philox_words(key=(7, 0), count=6)
    by_hand = sorted(range(6), key=lambda i: words[i])
    assert flat(indices(ProfileReader(people(6), seed=7, batch_size=6), 1)) == by_hand


def philox_words(key, count):
    """Philox4x64-10 (Salmon et al. 2011) in plain Python; NumPy counts from 1."""
    mask, words = 2**64 - 1, []
    for block in range(1, -(-count // 4) + 1):
        c, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(high >> 64) ^ c[1] ^ k[0], high & mask, (low >> 64) ^ c[3] ^ k[1], low & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:count]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "process_count": 2}, r"batch_size is 5, .*multiple of the 2 processes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 11}, r"batch_size is 11 but there are only 10 profiles.*lower it"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of process_count 2"),
        ({"process_count": 0}, "process_index is 0 of process_count 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ProfileReader(people(10), **({"seed": 0, "batch_size": 4} | options))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 0}, "expected a dict with 'epoch' and 'position'"),
        ([0, 0], "expected a dict"),
        ({"epoch": 0, "position": 0, "step": 1}, "expected a dict"),
        ({"epoch": -1, "position": 0}, r"state\['epoch'\] is -1"),
        ({"epoch": 0, "position": 4.0}, r"state\['position'\] is 4.0"),
        ({"epoch": True, "position": 4}, r"state\['epoch'\] is True"),
        ({"epoch": 0, "position": 12}, "position below 10"),
        ({"epoch": 0, "position": 3}, "whole number of batches of 4"),
        ({"epoch": 0, "position": 4, "seed": 1}, "saved with seed = 1 but this reader has seed = 0"),
        ({"epoch": 0, "position": 4, "size": 9}, "saved with size = 9 but this reader has size = 10"),
        ({"epoch": 0, "position": 4, "batch_size": 2}, "use the saved run's batch_size"),
    ],
)
def test_bad_states_are_refused_and_move_nothing(state, message):
    reader = ProfileReader(people(10), seed=0, batch_size=4)
    reader.next_batch()
    before = reader.state()
    with pytest.raises(ValueError, match=message):
        reader.restore(state)
    assert reader.state() == before


@given(st.integers(1, 30), st.integers(1, 5), st.integers(1, 4), st.data())
def test_held_out_profiles_come_once_in_order(size, share, processes, data):
    wanted = data.draw(st.none() | st.integers(1, size))
    parts = [
        list(
            evaluation_batches(
                people(size),
                batch_size=share * processes,
                num_profiles=wanted,
                process_index=p,
                process_count=processes,
            )
        )
        for p in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    pairs = [pair for step in zip(*parts, strict=True) for part in step for pair in part]
    assert [index for index, _ in pairs] == list(range(wanted or size))
    assert all(profile.id == f"id{index}" for index, profile in pairs)
    assert all(len(batch) <= share for part in parts for batch in part)


def test_held_out_batches_that_do_not_fit():
    with pytest.raises(ValueError, match="num_profiles is 4, expected 1 to 3"):
        evaluation_batches(people(3), batch_size=1, num_profiles=4)
    with pytest.raises(ValueError, match="num_profiles is 0"):
        evaluation_batches([], batch_size=1)
    with pytest.raises(ValueError, match="batch_size is 3"):
        evaluation_batches(people(3), batch_size=3, process_count=2)


def test_shared_personas_are_found_and_warned_of():
    train, test = people(4), [*people(3, "other"), *people(2), *people(1)]
    assert shared_personas(train, test) == ["persona 0", "persona 1"]
    warning = shared_personas_warning(train, test)
    assert warning.startswith("2 personas of the evaluation profiles")
    assert "(3 of 6 profiles: id0, id1, id0)" in warning
    assert shared_personas_warning(train, people(3, "other")) == ""


def test_personas_shared_by_the_published_files(published):
    train, test = (published / name for name in ("train_profile.jsonl", "test_profile_first50.jsonl"))
    texts = [
        {json.loads(line)["player"] for line in path.read_text(encoding="utf-8").splitlines()} for path in (train, test)
    ]
    shared = shared_personas(read_profiles(train), read_profiles(test))
    assert set(shared) == texts[0] & texts[1]
    assert len(shared) == len(set(shared)) == 25
