"""Dialogues on fewer rows than there are: each is what it is on a row of its own, and no row idles in between."""

import dataclasses

import jax
import numpy as np
import pytest

from rlver_jax.decoding.cache import LM
from rlver_jax.parallel.distributed import replicate
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.end_reason import END_REASONS
from rlver_jax.rollout.sampler import sample_dialogues
from tests.conftest import check_claims, make_profiles
from tests.rollout.test_sampler import ALONE, DIRECT, HOW, PROFILES, THINK, Table, limits, words

ROWS = 3  # 16 and 8 dialogues are no multiple of it
SPECS = {"think": (THINK, PROFILES, range(16)), "direct": (DIRECT, make_profiles(4), range(8))}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(policy_lm, user_lm, bpe, prompts):
    tables = {}

    def get(spec, rows=0) -> Table:
        spec = dataclasses.replace(spec, rows=rows)
        if spec not in tables:
            tables[spec] = Table(policy_lm, user_lm, bpe, prompts, spec)
        return tables[spec]

    return get


@pytest.fixture(scope="module")
def plays(table):
    """{name: [(on rows of their own, on ROWS rows), …]}: three batches of each spec, from other emotions."""
    settings = [{"seed": 0}, {"seed": 2, "initial_emotion": 40}, {"seed": 3, "initial_emotion": 22}]
    return {
        name: [tuple(table(spec, rows).play(profiles, ids, **options) for rows in (0, ROWS)) for options in settings]
        for name, (spec, profiles, ids) in SPECS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_each_dialogue_is_the_same_token_for_token(name, plays):
    """All arrays of the log, also those of turns that were never played."""
    for want, actual in plays[name]:
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(actual), strict=True):
            what = jax.tree_util.keystr(path)
            if what in (".row_turns", ".row_steps"):
                continue
            if np.issubdtype(a.dtype, np.floating):
                np.testing.assert_allclose(b, a, atol=1e-4, err_msg=what)
            else:
                np.testing.assert_array_equal(b, a, err_msg=what)


@pytest.mark.slow
def test_dialogues_ended_at_every_turn_for_every_reason(plays):
    """What the test above would prove nothing without."""
    batches = [d for pairs in plays.values() for _, d in pairs]
    ends = {(int(t), END_REASONS[r]) for d in batches for t, r in zip(d.turns, d.end_reason, strict=True)}
    assert {turns for turns, _ in ends} >= {1, 2, 3, 4}
    assert {reason for _, reason in ends} == set(END_REASONS[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_log_probs_on_used_rows_equal_fresh_contexts(name, table, plays, policy_lm, user_lm):
    """Nothing of a row's earlier dialogues is seen: plain passes over contexts of the logged ids."""
    spec, profiles, _ = SPECS[name]
    actual = plays[name][0][1]
    mine, theirs = table(spec, ROWS).rows(actual, profiles)
    assert check_claims(policy_lm, mine) == actual.policy.completion.count.sum() > 200
    assert check_claims(user_lm, theirs) == actual.user.appraisal.count.sum() + actual.user.reply.count.sum() > 200


def by_lists(d, rows, count=None):
    """[(dialogue, turn) of each row that plays, of each turn of the loop], from the lengths of the first `count`."""
    # A dialogue that the context ends takes one more turn of its row, in which that is found out.
    left = [int(t) + (END_REASONS[r] == "context") for t, r in zip(d.turns, d.end_reason, strict=True)][:count]
    waiting, seats, turns, loop = list(range(len(left))), [None] * rows, [0] * len(left), []
    while waiting or any(seat is not None for seat in seats):
        seats = [waiting.pop(0) if seat is None and waiting else seat for seat in seats]
        playing = [seat for seat in seats if seat is not None]
        loop.append([(seat, turns[seat]) for seat in playing])
        for seat in playing:
            turns[seat] += 1
        seats = [None if seat is None or turns[seat] == left[seat] else seat for seat in seats]
    return loop


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_room_is_counted(name, plays):
    """Turns and decode steps of the loop, by a list of who sits where."""
    for both in plays[name]:
        for d, rows in zip(both, (len(both[0].turns), ROWS), strict=True):
            loop = by_lists(d, rows)
            assert d.row_turns == rows * len(loop)
            steps = 0
            for playing in loop:
                row, turn = (np.array(x) for x in zip(*playing, strict=True))
                steps += d.policy.completion.count[turn, row].max()
                steps += sum(
                    generated.count[turn, :, row].max(0).sum() for generated in (d.user.appraisal, d.user.reply)
                )
            assert d.row_steps == rows * steps
            played, longest = sum(map(len, loop)), 1 + max(turn for playing in loop for _, turn in playing)
            assert played <= d.row_turns <= played + (rows - 1) * longest, "Graham's bound of list scheduling"


@pytest.fixture(scope="module")
def think(table):
    return table(THINK).play(PROFILES, range(16))


@pytest.fixture(scope="module")
def queues(table):
    """Plays a queue of (profile, dialogue id) on four rows of six places; the program is compiled once."""
    four = table(ALONE, 4)

    def play(queue, **change):
        return four.play([PROFILES[p] for p, _ in queue], [i for _, i in queue], count=6, **change)

    play([(0, 0)])
    return play


QUEUES = {
    "permuted": [(1, 13), (0, 6), (1, 8), (0, 1), (1, 15), (0, 0)],
    "reversed": [(0, 0), (1, 15), (0, 1), (1, 8), (0, 6), (1, 13)],
    "no multiple of the rows": [(1, 9), (0, 7), (1, 11), (0, 2), (1, 8)],
    "as many as rows": [(0, 3), (1, 10), (1, 12), (0, 4)],
    "shorter than the rows": [(1, 14), (0, 5)],
    "one": [(1, 13)],
}


@pytest.mark.parametrize("queue", QUEUES.values(), ids=QUEUES)
def test_a_dialogue_is_the_same_in_any_queue(queue, queues, think):
    """Other groups, rows, company and order; places without a dialogue stay empty, and nothing compiles again."""
    compiled = sample_dialogues._cache_size()
    actual = queues(queue)
    for position, (_, number) in enumerate(queue):
        assert words(actual, position) == words(think, number), f"dialogue {number}"
    assert not actual.turns[len(queue) :].any()
    assert not actual.end_reason[len(queue) :].any()
    assert actual.row_turns == 4 * len(by_lists(actual, 4, len(queue)))
    assert sample_dialogues._cache_size() == compiled


def test_other_limits_compile_nothing(queues):
    compiled = sample_dialogues._cache_size()
    d = queues(QUEUES["no multiple of the rows"], max_turns=2, say_tokens=5, field=3, reply=2)
    assert sample_dialogues._cache_size() == compiled
    assert d.turns[:5].min() > 0
    assert d.turns.max() == 2
    assert not d.turns[5:].any()
    assert d.row_turns == 4 * len(by_lists(d, 4, 5))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [("think", 8), pytest.param("direct", 4, marks=pytest.mark.long)])
def test_parts_of_a_mesh_refill_their_own_rows(name, rows, plays, policy_lm, user_lm, bpe, prompts):
    """Four parts: two profiles, whole on each, are no multiple of them; four are, and lie where their rows do."""
    spec, profiles, ids = SPECS[name]
    mesh = make_mesh(2, 2, 2)
    policy, user = (LM(replicate(lm.params, mesh), lm.model) for lm in (policy_lm, user_lm))
    spec = dataclasses.replace(spec, rows=rows)
    agents = Agents.build(policy, user, bpe, prompts, spec, mesh, **HOW)
    actual = jax.device_get(agents.play(agents.encode(profiles, ids), jax.random.key(0), limits(spec)))
    want = plays[name][0][0]
    for b in range(len(ids)):
        assert words(actual, b) == words(want, b), f"dialogue {b}"
    size = len(ids) // 4
    loops = []
    for i in range(0, len(ids), size):
        part = dataclasses.replace(want, turns=want.turns[i:], end_reason=want.end_reason[i:])
        loops.append(by_lists(part, rows // 4, size))
    assert actual.row_turns == rows * max(map(len, loops))


@pytest.mark.slow
def test_profiles_are_read_once_each(plays):
    """A group's members share one prefill, also one after the other on one row."""
    for pairs in plays.values():
        for want, actual in pairs:
            assert actual.prefix_tokens == want.prefix_tokens
