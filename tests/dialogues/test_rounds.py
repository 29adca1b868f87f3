"""Dialogues in rounds: with a user who repeats what the one on the device said, they are the sampler's own."""

import asyncio
import dataclasses
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.dialogues import rounds
from rlver_jax.dialogues.as_arrays import END_NAMES, dialogues_of
from rlver_jax.dialogues.device_agents import TextPolicy
from rlver_jax.dialogues.log import UNANSWERED
from rlver_jax.dialogues.rounds import play_rounds
from rlver_jax.dialogues.turn_by_turn import Row
from rlver_jax.endpoints.errors import EndpointError, Refused, Unavailable
from rlver_jax.learning.advantages import AdvantageConfig
from rlver_jax.learning.loss import LossConfig, TrainedModels
from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.sequences import build_sequences, row_lengths
from rlver_jax.learning.train_step import TrainStepConfig, UpdateConfig, compile_step, init_state
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.profile_tokens import WIDTH_STEP
from rlver_jax.rollout.rewards import reward
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.user.emotion import EmotionRules
from tests.conftest import make_profiles
from tests.rollout.test_sampler import HOW, limits

pytestmark = pytest.mark.slow
RULES = EmotionRules(initial=30, floor=20, ceiling=42)
THINK = RolloutConfig("think", False, 4, 4, 704, 24, 24, 20, "sample", RULES)
DIRECT = dataclasses.replace(THINK, mode="direct")
PROFILES = make_profiles(2)
SEED, BATCH = 3, 8


class Repeats:
    """Users who say and feel what `played` holds, after delays of their own."""

    def __init__(self, played, tokenizer, delay=lambda: 0.0, faults=None):
        self.played, self.tokenizer, self.delay, self.faults = played, tokenizer, delay, faults or {}

    def text(self, tokens, count) -> str:
        text = self.tokenizer.decode(tokens[:count].tolist())
        assert self.tokenizer.encode(text) == tokens[:count].tolist(), "these words encode back"
        return text

    async def begin_one(self, row):
        await asyncio.sleep(self.delay())
        first = self.text(self.played.first_talk[row.slot], self.played.first_count[row.slot])
        row.messages.append({"role": "user", "content": first, "tokens": None, "emotion": 30, "generated": False})

    async def react_one(self, row, *, may_reply):
        await asyncio.sleep(self.delay())
        turn, b, user = row.turns - 1, row.slot, self.played.user
        if (b, turn) in self.faults:
            raise self.faults[b, turn]
        emotion, count = int(user.emotion[turn, b]), int(user.reply.text_count[turn, -1, b])
        content = self.text(user.reply.tokens[turn, -1, b], count) if count else None
        row.goodbye = bool(user.goodbye[turn, b])
        row.messages.append(
            {"role": "user", "content": content, "change": int(user.change[turn, b]), "emotion": emotion}
        )


@pytest.fixture(scope="module", params=[THINK, DIRECT], ids=["think", "direct"])
def world(request, policy_lm, user_lm, bpe, prompts):
    """(agents, limits, what the sampler played)."""
    agents = Agents.build(policy_lm, user_lm, bpe, prompts, request.param, **HOW)
    allowed = limits(request.param)
    encoded = agents.encode(PROFILES, range(BATCH))
    return agents, allowed, jax.device_get(agents.play(encoded, jax.random.key(SEED), allowed))


def play(world, user, widest=WIDTH_STEP, cohorts=2):
    """(rows, the dialogues as arrays, waits) of a batch played in rounds."""
    agents, allowed, _ = world
    rows = [Row(i, i, PROFILES[i // 4], [RULES.initial]) for i in range(BATCH)]
    policy = TextPolicy(agents, allowed, BATCH, rows, SEED, widest, cohorts)
    waits = asyncio.run(play_rounds(rows, policy, user, rules=RULES, max_turns=agents.spec.max_turns))
    return rows, dialogues_of(rows, policy.log, agents.spec, agents.tokenizer, agents.tables[0].system.shape[0]), waits


def packed(world, dialogues):
    agents, allowed, _ = world
    length = int(row_lengths(dialogues, agents.tables[0], agents.spec).max())
    return jax.device_get(build_sequences(dialogues, agents.tables[0], agents.spec, allowed, length))


def check_same(world, dialogues, expected, rows=slice(None)):
    for name in ("turns", "end_reason", "violation", "emotions"):
        np.testing.assert_array_equal(getattr(dialogues, name)[rows], getattr(expected, name)[rows], err_msg=name)
    mine, theirs = packed(world, dialogues), packed(world, expected)
    for field in dataclasses.fields(mine):
        a, b = (getattr(x, field.name)[rows] for x in (mine, theirs))
        width = min(a.shape[-1], b.shape[-1]) if a.ndim > 1 else None
        assert a.ndim == 1 or not (a[:, width:].any() or b[:, width:].any())
        a, b = (x if width is None else x[:, :width] for x in (a, b))
        if field.name == "logprob":
            np.testing.assert_allclose(a, b, atol=1e-5)
        else:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize("cohorts", [1, 2, 4])
def test_the_sampler_s_own_dialogues(world, cohorts):
    """Tokens, masks, targets, grammar states, rewards' emotions and ends; log-probs to float32 rounding."""
    rows, dialogues, waits = play(world, Repeats(world[2], world[0].tokenizer), cohorts=cohorts)
    assert len({row.end for row in rows}) > 1, "they end in several ways"
    check_same(world, dialogues, world[2])
    size = BATCH // cohorts
    longest = [max(row.turns for row in rows[start : start + size]) for start in range(0, BATCH, size)]
    assert waits.rounds == sum(longest), "answers come at once: a cohort speaks together"


class Sleeps:
    """A policy that takes its time, whoever speaks, and holds how many cohorts were decoding, and for how long."""

    def __init__(self, size, seconds):
        self.size, self.seconds, self.now, self.most, self.busy = size, seconds, 0, 0, 0.0

    def cohorts(self, rows):
        return [list(rows[start : start + self.size]) for start in range(0, len(rows), self.size)]

    def speak(self, rows):
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        for row in rows:
            row.messages.append({"role": "assistant", "content": "x", "violation": False})
        self.now -= 1
        self.busy += self.seconds


class Answers:
    """Users who take their time."""

    def __init__(self, seconds):
        self.seconds = seconds

    async def begin_one(self, row):
        row.messages.append({"role": "user", "content": "x", "emotion": 30})

    async def react_one(self, row, *, may_reply):
        await asyncio.sleep(self.seconds)
        row.messages.append({"role": "user", "content": "x", "change": 0, "emotion": 30})


def test_cohorts_take_turns():
    """A round of all rows takes 0.2 s, of half of them 0.1 s; a user takes 0.2 s, in which the other half decodes."""

    def seconds(cohorts):
        rows, policy = [Row(i, i, PROFILES[0], [30]) for i in range(BATCH)], Sleeps(BATCH // cohorts, 0.2 / cohorts)
        began = time.monotonic()
        waits = asyncio.run(play_rounds(rows, policy, Answers(0.2), rules=RULES, max_turns=4))
        took = time.monotonic() - began
        assert policy.most == 1, "one cohort decodes at a time"
        assert waits.rounds == 4 * cohorts
        assert waits.device == pytest.approx(policy.busy, abs=0.1)
        assert waits.device + waits.users == pytest.approx(took, abs=0.1)
        return took

    in_parallel, in_turn = seconds(1), seconds(2)
    assert in_parallel >= 4 * (0.2 + 0.2)
    assert 4 * (0.1 + 0.2) + 0.1 <= in_turn < in_parallel


def updated(world, dialogues):
    """(rewards, gradients as the optimizer's first moment) of one GRPO update on these dialogues."""
    agents = world[0]
    earned = reward("final", jnp.asarray(dialogues.emotions), dialogues.turns, dialogues.violation)
    earned = dataclasses.replace(earned, counted=jnp.asarray(dialogues.turns > 0))
    models = TrainedModels(agents.policy.model, None, None, LossConfig(), vocab_chunk=128)
    optimizer = make_optimizer(
        learning_rate=1e-3, warmup_steps=0, grad_clip=1.0, beta1=0.9, beta2=0.99, weight_decay=0.0,
        moment_dtype="float32",
    )  # fmt: skip
    setup = TrainStepConfig(models, AdvantageConfig("grpo", group=4), UpdateConfig(), Optimizers(optimizer, None))
    params = {"policy": jax.tree.map(jnp.copy, agents.policy.params)}
    state = jax.device_put(init_state(params, setup.optimizers), jax.devices()[0])
    batch = jax.tree.map(jnp.asarray, packed(world, dialogues))
    state, _ = compile_step(setup, state)(state, batch, earned, agents.tables[0].grammar, jax.random.key(0))
    return np.asarray(earned.reward), jax.device_get(state.opt_state["policy"][1][0].mu)


def test_rewards_and_update_are_the_sampler_s(world):
    _, dialogues, _ = play(world, Repeats(world[2], world[0].tokenizer))
    mine, theirs = updated(world, dialogues), updated(world, world[2])
    np.testing.assert_array_equal(mine[0], theirs[0])
    assert len(set(mine[0].tolist())) > 2
    for a, b in zip(jax.tree.leaves(mine[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert max(abs(x).max() for x in jax.tree.leaves(mine[1])) > 1e-3


def test_who_decodes_together_changes_nothing(world, monkeypatch):
    """Random delays, and nobody waits for others: the same bits, log-probs included."""
    monkeypatch.setattr(rounds, "LINGER", 0.0)
    monkeypatch.setattr(rounds, "LEAST_LINGER", 0.0)
    _, expected, waits = play(world, Repeats(world[2], world[0].tokenizer))
    draw = random.Random(0)
    for _ in range(2):
        _, dialogues, other = play(world, Repeats(world[2], world[0].tokenizer, lambda: draw.random() * 0.05))
        assert other.rounds > waits.rounds
        for a, b in zip(jax.tree.leaves(dialogues), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_unanswered_dialogue_is_left_out(world):
    """The others go on as if nothing had happened."""
    faults = {(1, 0): Unavailable("gone"), (6, 0): Refused("status 400: filtered")}
    rows, dialogues, waits = play(world, Repeats(world[2], world[0].tokenizer, faults=faults))
    assert [row.number for row in rows if row.end == UNANSWERED] == [1, 6]
    assert waits.reasons == {1: "gone", 6: "status 400: filtered"}
    assert dialogues.turns[[1, 6]].tolist() == [0, 0]
    assert {END_NAMES[i] for i in dialogues.end_reason[[1, 6]]} == {UNANSWERED}
    assert not packed(world, dialogues).mask[[1, 6]].any()
    check_same(world, dialogues, world[2], [0, 2, 3, 4, 5, 7])


def test_an_endpoint_that_refuses_everything_stops_the_batch(world):
    with pytest.raises(EndpointError, match="401"):
        play(world, Repeats(world[2], world[0].tokenizer, faults={(2, 0): EndpointError("status 401")}))


def test_words_that_are_too_long_end_a_dialogue_and_disturb_no_other(world):
    """Wide words are prefilled apart: rows that wait keep theirs, whatever the padding."""

    class Wordy(Repeats):
        async def react_one(self, row, *, may_reply):
            await super().react_one(row, may_reply=may_reply)
            if row.slot in (0, 5) and row.messages[-1]["content"]:
                row.messages[-1]["content"] = "felt awful " * (60 if row.slot else 200)

    rows, dialogues, _ = play(world, Wordy(world[2], world[0].tokenizer), widest=3 * WIDTH_STEP)
    assert (rows[0].turns, rows[0].end) == (1, "context"), "longer than what may be heard"
    check_same(world, dialogues, world[2], [1, 2, 3, 4, 6, 7])
