"""A fresh log is recomputed completely; every planted edit is found, in the log alone and through the command line."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.dialogues.faults import logged_turns, recomputed_rewards
from rlver_jax.dialogues.known_profiles import KnownProfiles
from rlver_jax.dialogues.log import dialogue_records, rewards_of
from rlver_jax.dialogues.verify_changes import is_tie
from rlver_jax.dialogues.verify_set import TrainingPlan
from rlver_jax.dialogues.verify_settings import check_settings
from rlver_jax.dialogues.verify_tokens import TOLERANCES
from rlver_jax.profiles.reader import ProfileReader
from rlver_jax.rollout import rewards
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.user.emotion import EmotionRules, change_readout
from rlver_jax.user.turn import UserLimits
from rlver_jax.verify import LoggedDialogue, Report, Settings, verify_records
from tests.conftest import make_profiles

TURNS, PROFILES, GROUP, SEED = 4, 3, 2, 11  # as training plays: groups, the emotion starting at 30
COUNT = PROFILES * GROUP
REWARD = {"name": "final", "gamma": 1.0, "weight": 0.5}
FIELDS = dict.fromkeys(("seed", "initial_emotion", "max_turns", "num_profiles"), "the test's config")
SETTINGS = Settings(reply_temperature=0.9, field_tokens=12, reply_tokens=16, readout="argmax", reward=REWARD)


def make_agents(policy_lm, user_lm, bpe, prompts, readout):
    spec = RolloutConfig(
        mode="think",
        enforce_format=True,
        group=GROUP,
        max_turns=TURNS,
        context=900,
        think_tokens=24,
        say_tokens=20,
        user_tokens=16,
        readout=readout,
        rules=EmotionRules(initial=30),
    )
    return Agents.build(policy_lm, user_lm, bpe, prompts, spec, style="vanilla", scenario="heart_to_heart")


@pytest.fixture(
    scope="module", params=["argmax", *(pytest.param(x, marks=pytest.mark.slow) for x in ("mean", "sample"))]
)
def log(request, policy_lm, user_lm, bpe, prompts):
    """(agents, profiles, records), with policy replies and user replies sampled. Sampled changes: test_forged_logs."""
    agents, profiles = make_agents(policy_lm, user_lm, bpe, prompts, request.param), make_profiles(PROFILES)
    return agents, profiles, play(agents, profiles)


def play(agents, profiles):
    user = UserLimits(jnp.int32(12), jnp.int32(16), jnp.float32(0.9))
    limits = RolloutLimits(jnp.int32(TURNS), jnp.int32(24), jnp.int32(20), jnp.float32(1.0), jnp.int32(30), user)
    encoded = agents.encode(profiles, range(COUNT))
    played = jax.device_get(agents.play(encoded, jax.random.key(SEED), limits))
    return dialogue_records(played, agents, profiles, range(COUNT), seed=SEED, rewards=rewards_of(played, REWARD))


def plan_of(profiles):
    """One step of a training run."""
    reader = ProfileReader(profiles, seed=0, batch_size=PROFILES, shuffle=False)
    return TrainingPlan(FIELDS, SEED, 30, TURNS, 1.0, profiles, reader=reader, batch=COUNT, group=GROUP)


def check_all(log, records, **settings) -> list[Report]:
    agents, profiles, _ = log
    settings = dataclasses.replace(SETTINGS, readout=records[0]["readout"], **settings)
    plan = plan_of(profiles[:PROFILES])
    logged = [LoggedDialogue(f"dialogue {record['dialogue']}", record, plan) for record in records]
    return list(verify_records(agents, KnownProfiles(profiles), logged, settings))


def check(log, record, **settings) -> Report:
    (report,) = check_all(log, [record], **settings)
    return report


def test_a_fresh_log_is_recomputed_completely(log):
    reports = check_all(log, log[2])
    assert [report.faults for report in reports] == [[]] * COUNT
    appraised = sum(m["role"] == "user" for record in log[2] for m in record["messages"][1:])
    assert sum(report.turns for report in reports) == appraised > COUNT
    generated = sum(
        len(tokens)
        for record in log[2]
        for m in record["messages"][1:]
        if m["role"] == "user"
        for tokens in [*m["appraisal_tokens"].values(), *m["consideration_tokens"].values(), m["all_tokens"]]
    )
    made_up = [len(r["messages"][0]["tokens"]) for r in log[2] if r["messages"][0]["generated"]]
    ends = sum(count < SETTINGS.reply_tokens for count in made_up)  # which no log holds
    assert made_up
    assert sum(report.tokens for report in reports) == generated + sum(made_up) + ends


def longest(log):
    """A dialogue whose first two turns both have a reply."""
    return copy.deepcopy(
        next(
            r for r in log[2]
            if sum(m["role"] == "user" and bool(m["content"]) and bool(m["tokens"]) for m in r["messages"][1:]) >= 2
        )
    )  # fmt: skip


def other_token(agents, tokens, position=0):
    """The same tokens with one of them exchanged for another piece of text."""
    pieces = [t for t in range(agents.tokenizer.vocab_size) if agents.tokenizer.token_bytes(t).isalpha()]
    tokens[position] = next(t for t in pieces if t != tokens[position])


def user_messages(record):
    return [m for m in record["messages"][1:] if m["role"] == "user"]


def edit_reward(agents, r):
    r["reward"] += 0.01


def edit_final_emotion(agents, r):
    r["emotion"] += 1


def edit_emotion_after_a_turn(agents, r):
    user_messages(r)[0]["emotion"] += 1


def edit_change_alone(agents, r):
    user_messages(r)[0]["change"] += 1 if user_messages(r)[0]["change"] < 10 else -1


def edit_change_and_all_that_follows(agents, r):
    """A consistent forgery: change, emotions and reward fit each other; only the user model disagrees."""
    delta = 1 if user_messages(r)[-1]["change"] < 10 else -1
    last = user_messages(r)[-1]
    before = r["emotions"][-2] if not r["violation"] else r["emotions"][-3]
    last["change"] += delta
    last["emotion"] = int(np.clip(before + last["change"], 0, 100))
    positions = [-1, -2] if r["violation"] else [-1]
    for position in positions:
        r["emotions"][position] = last["emotion"]
    r["emotion"] = last["emotion"]
    r["reward"] = 0.0 if r["violation"] else float(np.float32(last["emotion"] / 100))


def edit_appraisal_text(agents, r):
    user_messages(r)[0]["appraisal"]["feeling"] += " happy"


def edit_appraisal_tokens(agents, r):
    user = user_messages(r)[0]
    tokens = user["appraisal_tokens"]["feeling"]
    other_token(agents, tokens)
    user["appraisal"]["feeling"] = agents.tokenizer.decode(tokens[: len(tokens) - user["appraisal_stopped"]["feeling"]])


def edit_reply_text(agents, r):
    user_messages(r)[0]["content"] = "Thank you, goodbye."


def edit_reply_tokens(agents, r):
    user = user_messages(r)[0]
    other_token(agents, user["all_tokens"])
    user["tokens"][0] = user["all_tokens"][0]
    user["content"] = agents.tokenizer.decode(user["tokens"])


def edit_say_text(agents, r):
    r["messages"][1]["content"] = "I understand you completely."


def edit_say_tokens(agents, r):
    """A consistent forgery of what the policy said: found by what the user thought of it."""
    m = r["messages"][1]
    position = len(m["tokens"]) - m["stopped"] - len(m["say_tokens"])
    other_token(agents, m["say_tokens"])
    m["tokens"][position] = m["say_tokens"][0]
    m["content"] = agents.tokenizer.decode(m["say_tokens"])


def edit_first_talk(agents, r):
    other_token(agents, r["messages"][0]["tokens"])
    r["messages"][0]["content"] = agents.tokenizer.decode(r["messages"][0]["tokens"])


def edit_change_distribution(agents, r):
    user_messages(r)[0]["change_logprobs"][3] += 0.01


def edit_cut_field(agents, r):
    """A field without its end: shorter, and no line end."""
    user = user_messages(r)[0]
    user["appraisal_tokens"]["feeling"] = user["appraisal_tokens"]["feeling"][:-1]
    user["appraisal_logprobs"]["feeling"] = user["appraisal_logprobs"]["feeling"][:-1]
    user["appraisal_stopped"]["feeling"] = False


def edit_impossible_emotion(agents, r):
    user_messages(r)[0]["emotion"] = 101


def edit_impossible_change(agents, r):
    user_messages(r)[0]["change"] = 11


def edit_unknown_token(agents, r):
    user_messages(r)[0]["all_tokens"][0] = agents.tokenizer.vocab_size


def edit_missing_field(agents, r):
    del user_messages(r)[0]["appraisal_tokens"]["feeling"]


def edit_missing_logprob(agents, r):
    user_messages(r)[0]["raw_logprobs"].pop()


EDITS = [value for name, value in list(globals().items()) if name.startswith("edit_")]


@pytest.mark.parametrize("log", ["argmax"], indirect=True)
@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.__name__.removeprefix("edit_"))
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_planted_edits_are_found(log, edit, dtype):
    if dtype == "bfloat16" and edit in (edit_say_tokens, edit_change_distribution):
        pytest.skip("here they move what the user says by less than bfloat16's rounding may")
    record = longest(log)  # without a fault, as all of them
    edit(log[0], record)
    faults = check(log, record, tolerance=TOLERANCES[dtype]).faults
    assert faults, "the edit was not found"
    assert all(fault.startswith(f"dialogue {record['dialogue']}") for fault in faults)


@pytest.mark.slow
@pytest.mark.parametrize("log", ["mean"], indirect=True)
def test_a_user_that_rounds(log, policy_lm, user_lm, bpe, prompts):
    """Played in float32, recomputed in bfloat16: as far apart as two programs that round may be."""
    rounded = user_lm.replace(model=user_lm.model.clone(dtype=jnp.bfloat16))
    log = make_agents(policy_lm, rounded, bpe, prompts, "mean"), *log[1:]
    records = log[2]
    strict, loose = Report(), Report()
    for report in check_all(log, records):
        strict.add(report)
    for report in check_all(log, records, tolerance=TOLERANCES["bfloat16"]):
        loose.add(report)
    assert (loose.dialogues, loose.faults) == (COUNT, [])
    assert len(strict.faults) > COUNT
    assert 1e-3 < loose.logprob_error == strict.logprob_error < 1


def test_a_dialogue_of_an_unknown_profile(log):
    stranger, known = check_all(log, [log[2][0] | {"profile": "nobody"}, log[2][1]])
    assert stranger.turns == 0
    assert "profile is 'nobody', but the config plays 'p0' in it" in stranger.faults[0]
    assert "profile 'nobody' is not in data.eval or data.train" in stranger.faults[1]
    assert known.turns > 0
    assert known.faults == []


def test_training_and_held_out_profiles_may_share_ids(log):
    """As the miniature's do: a dialogue's own profile is the one that the config plays in it."""
    agents, profiles, records = log
    others = [dataclasses.replace(p, id=q.id) for p, q in zip(profiles[1:] + profiles[:1], profiles, strict=True)]
    assert not any(report.faults for report in check_all((agents, profiles + others, records), records))
    assert all(report.faults for report in check_all((agents, others + profiles, records), records))


def test_of_several_profiles_with_one_id_the_one_that_a_record_holds(log):
    _, profiles, records = log
    others = [dataclasses.replace(p, id=q.id) for p, q in zip(profiles[1:] + profiles[:1], profiles, strict=True)]
    for both in (others + profiles, profiles + others):
        assert [KnownProfiles(both).of(record) for record in records[::GROUP]] == profiles


def test_turns_of_a_dialogue_that_ended_on_an_emotion(log):
    record = longest(log)
    last = user_messages(record)[-1]
    assert (last["content"] is None) == (not logged_turns(record)[-1].reply)


@pytest.mark.parametrize("count", [8, 250, 733])
@pytest.mark.parametrize("name", ["final", "per_turn", "mixed"])
def test_rewards_of_many_dialogues_are_those_that_small_batches_gave(name, count):
    """However many a log has: XLA adds 733 rows up in another order than 8. A step of any reward is no rounding."""
    draw, settings = np.random.default_rng(0), {"name": name, "gamma": 0.9, "weight": 0.3}
    changes = draw.integers(-10, 11, (count, 6))
    emotions = np.clip(np.cumsum(np.insert(changes, 0, 40, axis=1), axis=1), 0, 100)
    turns, rows = draw.integers(1, 5, count), []
    for row, n in zip(emotions.tolist(), turns.tolist(), strict=True):
        reactions = [{"role": "user", "emotion": emotion} for emotion in row[: n + 1]]
        messages = [reactions[0], *(m for one in reactions[1:] for m in ({"role": "assistant"}, one))]
        rows.append({"messages": messages, "seed": 0, "violation": False, "turns": n})
    recomputed = recomputed_rewards(rows, settings)
    for row, n, (value, rounding) in zip(emotions / 1.0, turns.tolist(), recomputed, strict=True):
        tenths, weights = np.diff(row[: n + 1]) / 10, 0.9 ** np.arange(n)
        expected = {
            "final": row[n] / 100,
            "per_turn": tenths.sum(),
            "mixed": (0.3 * tenths * weights).sum() + 0.7 * weights[-1] * row[n] / 100,
        }[name]
        assert abs(value - expected) <= rounding < 1e-5
    played = np.concatenate(
        [played_rewards(emotions[i : i + 8], turns[i : i + 8], settings) for i in range(0, count, 8)]
    )
    assert all(abs(one - value) <= rounding for one, (value, rounding) in zip(played, recomputed, strict=True))


def played_rewards(emotions, turns, settings):
    """As they are computed where dialogues are played."""
    none = np.zeros(len(turns), bool)
    emotions, turns = np.asarray(emotions, np.int32), np.asarray(turns, np.int32)
    return np.asarray(rewards.reward(emotions=emotions, n_turns=turns, violation=none, **settings).reward, np.float64)


@pytest.mark.parametrize("readout", ["argmax", "sample"])
def test_ties(readout):
    logprobs = np.full(21, -9.0, np.float32)
    logprobs[[12, 15]] = -1.0, -1.00005
    assert is_tie(readout, logprobs, 2, 5, 1e-4)
    logprobs[15] = -1.001
    assert not is_tie(readout, logprobs, 2, 5, 1e-4)
    assert is_tie(readout, logprobs, 2, 5, 0.01)


def test_ties_of_means():
    even = np.full(21, -np.inf, np.float32)
    even[[12, 13]] = -1.0
    assert is_tie("mean", even, 2, 3, 1e-4)
    assert not is_tie("mean", even, 2, 4, 1e-4)
    # Each log-probability moved by up to a tenth of a nat, against the readout of what that gives.
    draw = np.random.default_rng(0)
    for logprobs in draw.normal(size=(300, 21), scale=3).astype(np.float32):
        logprob_error = logprobs + draw.uniform(-0.1, 0.1, 21)
        recomputed, logged = (int(change_readout(jnp.asarray(x), "mean")) for x in (logprobs, logprob_error))
        assert is_tie("mean", logprobs, recomputed, logged, 0.11)  # the spread itself moves a little, too
        assert not is_tie("mean", logprobs, recomputed, logged + 3, 0.11)


def test_another_config_than_the_logs_is_refused(log):
    from configs.base import get_config

    config = get_config("challenging")
    config.data.language = "en"
    config.user.readout = log[2][0]["readout"]
    with pytest.raises(ValueError, match="user.style='vanilla'"):
        check_settings(log[2], config)
    config.user.style = "vanilla"
    check_settings(log[2], config)


def test_temperature_matters(log):
    """Replies were sampled: compared with a greedy user they are faults."""
    faults = [fault for report in check_all(log, log[2], reply_temperature=0.0) for fault in report.faults]
    assert any("'reply'" in fault for fault in faults)
    assert not any("'feeling'" in fault for fault in faults)
