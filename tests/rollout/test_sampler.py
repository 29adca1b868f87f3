"""Whole dialogues against plain forward passes over contexts that are concatenated from the logged ids."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.generate import Truncation
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params
from rlver_jax.models.qwen import Qwen2
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.end_reason import CONTEXT, END_REASONS, FORMAT
from rlver_jax.rollout.sampler import sample_dialogues
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.turn import UserLimits
from tests.conftest import Fresh, check_claims, make_profiles, option_logprobs, plain

HOW = {"style": "vanilla", "scenario": "heart_to_heart"}
RULES = EmotionRules(initial=30, floor=20, ceiling=42)  # narrow, so that both ends are reached
THINK = RolloutConfig("think", False, 8, 4, 704, 24, 24, 20, "sample", RULES)
ALONE = dataclasses.replace(THINK, group=1)
DIRECT = dataclasses.replace(THINK, mode="direct", group=2, readout="argmax", context=575)


def limits(spec: RolloutConfig, **change) -> RolloutLimits:
    user = UserLimits(jnp.int32(change.pop("field", 20)), jnp.int32(change.pop("reply", 20)), jnp.float32(1))
    values = {"max_turns": spec.max_turns, "think_tokens": 24, "say_tokens": 24, "initial_emotion": 30} | change
    temperature = jnp.float32(values.pop("temperature", 0.8))
    return RolloutLimits(**{k: jnp.int32(v) for k, v in values.items()}, temperature=temperature, user=user)


class Table:
    """Agents that play batches and remember what was played."""

    def __init__(self, policy, user, tokenizer, prompts, spec):
        self.agents = Agents.build(policy, user, tokenizer, prompts, spec, **HOW)
        self.fresh = Fresh(tokenizer, spec.mode == "think", RULES.floor, RULES.ceiling)
        self.spec = spec

    def play(self, profiles, ids, seed=0, count=None, **change):
        encoded = self.agents.encode(profiles, ids, count)
        return jax.device_get(self.agents.play(encoded, jax.random.key(seed), limits(self.spec, **change)))

    def rows(self, d, profiles):
        """(policy rows, user rows) of all dialogues."""
        both = [[], []]
        for b in range(len(profiles) * self.spec.group):
            both[0] += self.fresh.policy_rows(d, b)
            both[1] += self.fresh.user_rows(d, b, profiles[b // self.spec.group], self.spec.max_turns)
        return both


@pytest.fixture(scope="module")
def table(policy_lm, user_lm, bpe, prompts):
    """One table a spec, so that each spec is compiled once."""
    tables = {}

    def get(spec) -> Table:
        if spec not in tables:
            tables[spec] = Table(policy_lm, user_lm, bpe, prompts, spec)
        return tables[spec]

    return get


PROFILES = make_profiles(2)


@pytest.fixture(scope="module")
def think(table):
    return table(THINK).play(PROFILES, range(16))


@pytest.fixture(scope="module")
def direct(table):
    return table(DIRECT).play(make_profiles(4), range(8))


@pytest.fixture(scope="module")
def many(table, think, direct):
    """(spec, dialogue arrays) of several batches; none compiles anything new."""
    more = [table(THINK).play(PROFILES, range(16), seed, initial_emotion=e) for seed, e in ((1, 30), (2, 40), (3, 22))]
    more_direct = [table(DIRECT).play(make_profiles(4), range(8), seed, initial_emotion=30) for seed in (4, 5)]
    return [(THINK, d) for d in (think, *more)] + [(DIRECT, d) for d in (direct, *more_direct)]


@pytest.mark.parametrize("spec", [THINK, DIRECT], ids=["think", "direct"])
def test_log_probs_equal_fresh_contexts(spec, table, think, direct, policy_lm, user_lm):
    """Every generated token of both sides: no cache, no rollback, no tables."""
    d, profiles = (think, PROFILES) if spec is THINK else (direct, make_profiles(4))
    policy_rows, user_rows = table(spec).rows(d, profiles)
    count = check_claims(policy_lm, policy_rows)
    answered = check_claims(user_lm, user_rows)
    assert count == d.policy.completion.count.sum() > 200
    assert answered == d.user.appraisal.count.sum() + d.user.reply.count.sum() > 200


def test_changes_are_read_from_the_options_probabilities(table, think, direct, user_lm, bpe):
    """Each option scored in a row of its own; in direct mode the change is the likeliest one."""
    for spec, d, profiles in ((THINK, think, PROFILES), (DIRECT, direct, make_profiles(4))):
        fresh = table(spec).fresh
        for b in (0, 5, 7):
            rows = fresh.user_rows(d, b, profiles[b // spec.group], spec.max_turns)
            for t, row in enumerate(rows[:2]):
                want = option_logprobs(user_lm, bpe, row.ids[: row.choice_at])
                np.testing.assert_allclose(d.user.change_logprobs[t, b], want, atol=1e-4)
                if spec is DIRECT:
                    assert d.user.change[t, b] == np.argmax(d.user.change_logprobs[t, b]) - 10


def test_appraisals_are_greedy_visible_lines(table, think, user_lm, bpe):
    """Each token is the likeliest of those that a line may hold there."""
    pieces = [bpe.token_bytes(i) for i in range(bpe.vocab_size)]
    rows = table(THINK).rows(think, PROFILES)[1][:24]
    stops = [bpe.im_end_id, bpe.pad_id]
    merged = np.array([b"\n" in p and not p.startswith(b"\n") for p in pieces])
    later = ~merged & np.array([bool(p) for p in pieces])
    later[stops] = True
    first = later & np.array([bool(p.strip()) for p in pieces])
    for row, logp in zip(rows, plain(user_lm, [[*r.ids, 0] for r in rows])[1], strict=True):
        for position, tokens in row.fields:
            for i, token in enumerate(tokens):
                here = np.where(first if i == 0 else later, logp[position - 1 + i][: len(pieces)], -np.inf)
                assert here[token] > here.max() - 1e-4


def test_says_are_what_follows_the_thought(table, many):
    for spec, d in many:
        fresh = table(spec).fresh
        for b in range(len(d.turns)):
            for t in range(d.turns[b]):
                tokens = fresh.cut(d.policy.completion, (t, b))[1]
                want = fresh.spoken(tokens)
                assert d.policy.say[t, b, : d.policy.say_count[t, b]].tolist() == want
                assert d.policy.violation[t, b] == (spec.mode == "think" and not want)


def test_emotions_are_clipped_sums(many):
    for spec, d in many:
        for b in range(len(d.turns)):
            emotion = [int(d.emotions[b, 0])]
            for t in range(spec.max_turns):
                assert d.appraised[t, b] == (t < d.turns[b] and not d.policy.violation[t, b])
                assert d.appraised[t, b] or d.user.change[t, b] == 0
                emotion.append(min(max(emotion[-1] + int(d.user.change[t, b]), 0), 100))
                assert d.user.emotion[t, b] == emotion[-1] or t >= d.turns.max()
            assert d.emotions[b].tolist() == emotion


def why_it_ended(fresh, spec, d, b) -> str:
    last = d.turns[b] - 1
    emotion = d.emotions[b, d.turns[b]]
    if last < 0:
        return "context"
    if d.policy.violation[last, b]:
        return "format"
    if emotion >= RULES.ceiling:
        return "success"
    if emotion <= RULES.floor:
        return "failure"
    reply = fresh.tokenizer.decode(fresh.cut(d.user.reply, (last, -1, b))[0])
    if "goodbye" in reply:
        return "goodbye"
    return "turn_limit" if d.turns[b] == spec.max_turns else "context"


def test_dialogues_end_for_the_recorded_reason_and_stay_ended(table, many):
    """No word, no appraisal, no token read after the end; ends of every kind at every turn occur."""
    ends = set()
    for spec, d in many:
        for b, turns in enumerate(d.turns):
            reason = END_REASONS[d.end_reason[b]]
            assert reason == why_it_ended(table(spec).fresh, spec, d, b)
            ends.add((int(turns), reason))
            for counts in (d.policy.completion.count, d.policy.prefilled, d.user.prefilled):
                assert not counts[turns:, b].any()
            assert not d.user.appraisal.count[turns:, :, b].any()
            assert not d.user.reply.count[turns:, :, b].any()
            silent = reason in ("success", "failure", "format", "turn_limit")
            assert d.user.reply.count[turns - 1, -1, b] == 0 if silent else True
            assert all(d.policy.completion.count[t, b] > 0 for t in range(turns))
    assert {turns for turns, _ in ends} >= {1, 2, 3, 4}
    assert {reason for _, reason in ends} >= set(END_REASONS[1:])


def test_a_full_context_ends_a_dialogue_before_it_overflows(table, many):
    ended = [(d, b) for _, d in many for b in range(len(d.turns)) if d.end_reason[b] == CONTEXT]
    assert ended
    for d, b in ended:
        assert 0 < d.turns[b] < DIRECT.max_turns
    for spec, d in many:
        profiles = PROFILES if spec is THINK else make_profiles(4)
        assert max(len(row.ids) for rows in table(spec).rows(d, profiles) for row in rows) < spec.context


def words(d, b) -> list:
    """Everything that the two sides said and felt in one dialogue."""
    generated = [d.policy.completion.tokens[:, b], d.user.appraisal.tokens[:, :, b], d.user.reply.tokens[:, :, b]]
    rest = [d.user.change[:, b], d.emotions[b], d.turns[b], d.end_reason[b], d.first_talk[b]]
    return [np.asarray(x).tolist() for x in (*generated, *rest)]


def test_the_same_key_gives_the_same_bits(table, think):
    again = table(THINK).play(PROFILES, range(16))
    jax.tree.map(np.testing.assert_array_equal, again, think)


def test_seeds_and_group_members_differ(think, many):
    other = many[1][1]
    assert sum(words(think, b) != words(other, b) for b in range(16)) >= 14
    for members in (range(8), range(8, 16)):
        assert len({str(think.policy.completion.tokens[:, b].tolist()) for b in members}) >= 7
        assert len({str(think.first_talk[b].tolist()) for b in members}) == 1


def test_a_dialogue_is_the_same_in_another_row(table, think):
    """Rows permuted within their groups and the groups swapped. Nothing but the place changes."""
    order = [*np.random.default_rng(1).permutation(8) + 8, *np.random.default_rng(2).permutation(8)]
    moved = table(THINK).play(PROFILES[::-1], order)
    for position, b in enumerate(order):
        assert words(moved, position) == words(think, int(b)), f"dialogue {b}"
    assert len(set(think.turns.tolist())) > 1, "rows end at different turns"


@pytest.mark.slow
def test_a_dialogue_is_the_same_in_another_group_and_batch(table, think):
    """Groups of one, five rows instead of sixteen, other company, a row of padding in between."""
    company = dataclasses.replace(make_profiles(3)[2], id="company")
    profiles, ids = [PROFILES[1], company, PROFILES[0], PROFILES[1]], [13, 99, 6, 8]
    moved = table(ALONE).play(profiles, ids, count=5)
    for position, b in ((0, 13), (2, 6), (3, 8)):
        assert words(moved, position) == words(think, b), f"dialogue {b}"
    assert moved.turns[4] == 0, "padding plays nothing"
    assert moved.end_reason[4] == 0


def test_prefilled_tokens_are_those_that_are_new(table, many, bpe):
    """Counted again from the log, message by message: every token is read once, and once a turn what the options need.

    That is every beginning of an option, once: the last token of each is predicted and never read.
    """
    spelled = [tuple(bpe.encode(f"{n:+d}\n" if n else "0\n")) for n in range(-10, 11)]
    options = len({option[:end] for option in spelled for end in range(1, len(option))})
    for spec, d in many:
        fresh = table(spec).fresh
        chat, think = fresh.chat, spec.mode == "think"
        frame = len(chat.open("user") + chat.close + chat.open("assistant"))
        for b, t in itertools.product(range(len(d.turns)), range(spec.max_turns)):
            if t >= d.turns[b]:
                continue
            heard = len(fresh.heard(d, b, t))
            say = int(d.policy.say_count[t - 1, b]) if t else 0
            extra = say * think + len(chat.close) * (t > 0) + len(bpe.encode("<think>\n")) * think
            assert d.policy.prefilled[t, b] == frame + heard + extra
            if d.appraised[t, b]:
                row = fresh.user_rows(d, b, make_profiles(4)[b // spec.group], spec.max_turns)[t]
                spoken = fresh.spoken(fresh.cut(d.policy.completion, (t, b))[1])
                prefill = heard + len(spoken) + frame + len(chat.close)
                texts = sum(len(fresh.cut(d.user.appraisal, (t, f, b))[0]) for f in range(2))
                texts += sum(len(fresh.cut(d.user.reply, (t, f, b))[0]) for f in range(2))
                base = len(row.ids) - self_length(fresh, d, b, t, make_profiles(4)[b // spec.group])
                assert d.user.prefilled[t, b] == prefill + base - texts + options


def self_length(fresh, d, b, t, profile) -> int:
    """Tokens before the reasoning of turn t."""
    chat, total = fresh.chat, len(fresh.opening(profile))
    for i in range(t + 1):
        say = fresh.spoken(fresh.cut(d.policy.completion, (i, b))[1])
        total += len(fresh.heard(d, b, i) + chat.close + chat.open("user") + say + chat.close + chat.open("assistant"))
    return total


def distinct(rows: list[list[int]]) -> int:
    """Nodes of the tree of all contexts: a token counts once for each different past."""
    nodes = {}
    for row in rows:
        node = 0
        for token in row:
            node = nodes.setdefault((node, token), len(nodes) + 1)
    return len(nodes)


def test_hardly_a_token_is_read_twice(table, many, bpe):
    """At most 1.05 x the distinct tokens of a dialogue's two contexts, prefixes counted for each dialogue alone."""
    options = [bpe.encode(f"{n:+d}\n" if n else "0\n") for n in range(-10, 11)]
    for spec, d in many:
        fresh = table(spec).fresh
        for b in range(len(d.turns)):
            profile = make_profiles(4)[b // spec.group]
            mine = fresh.policy_rows(d, b)
            theirs = fresh.user_rows(d, b, profile, spec.max_turns)
            scored = [row.ids[: row.choice_at] + option for row in theirs for option in options]
            tokens = distinct([r.ids for r in mine]) + distinct(
                [r.ids for r in theirs] + scored + [fresh.opening(profile)]
            )
            encoded = table(spec).agents.encode([profile], range(spec.group))
            prefix = int(encoded.prefix_count[0]) + table(spec).agents.tables[0].system.shape[0]
            prefilled = prefix + d.policy.prefilled[:, b].sum() + d.user.prefilled[:, b].sum()
            assert prefilled <= 1.05 * tokens


def test_a_group_prefills_its_profile_once(table, think, bpe):
    prefixes = [table(THINK).agents.prefix(p) for p in PROFILES]
    system = table(THINK).fresh.chat.message("system", "Think, say.")
    assert think.prefix_tokens == sum(map(len, prefixes)) + len(system)
    padded = table(THINK).play(PROFILES[:1], range(8), count=2)
    assert padded.prefix_tokens == len(prefixes[0]) + len(system)


def test_other_profiles_counts_and_limits_compile_once(table, think):
    """And limits are obeyed."""
    compiled = sample_dialogues._cache_size()
    other = [dataclasses.replace(p, persona="my sister", first_talk="and she") for p in PROFILES]
    d = table(THINK).play(other[:1], range(50, 58), 9, 2, max_turns=2, think_tokens=14, say_tokens=5, field=3, reply=2)
    assert sample_dialogues._cache_size() == compiled
    assert d.turns.max() == 2
    assert {END_REASONS[r] for r in d.end_reason[d.turns == 2]} & {"turn_limit"}
    assert d.policy.say_count.max() == 5
    assert d.user.appraisal.count.max() == 3
    assert d.user.reply.count[:, -1].max() == 2
    assert (d.policy.completion.found_at < 14).all()
    assert not d.turns[8:].any()
    greedy = table(THINK).play(PROFILES, range(16), 1, temperature=0)
    assert sample_dialogues._cache_size() == compiled
    same = {str(greedy.policy.completion.tokens[0, b].tolist()) for b in range(8)}
    assert len(same) == 1, "greedy replies to the same words are the same"


HOST = ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv")


def test_no_host_callback_in_the_program(table):
    agents = table(THINK).agents
    encoded = agents.encode(PROFILES, range(16))
    arguments = (agents.policy, agents.user, agents.tables, encoded, jax.random.key(0), limits(THINK))
    text = sample_dialogues.lower(*arguments, spec=THINK).as_text()
    assert not [word for word in HOST if word in text]
    assert "stablehlo.while" in text
    # float32 models: no product may round its operands first, which TPUs do unless told otherwise.
    assert "precision = [HIGHEST" in text
    assert "precision = [DEFAULT" not in text
    seen = jax.jit(lambda x: jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((), jnp.float32), x))
    assert any(word in seen.lower(jnp.float32(0)).as_text() for word in HOST), "a callback would be seen"


def test_a_violation_costs_the_emotion_nothing(many):
    violations = 0
    for _, d in many:
        for b in np.nonzero(d.end_reason == FORMAT)[0]:
            violations += 1
            assert d.violation[b]
            assert d.emotions[b, d.turns[b]] == d.emotions[b, d.turns[b] - 1]
    assert violations


REAL = RolloutConfig("think", True, 1, 2, 640, 32, 24, 20, "argmax", EmotionRules(50), Truncation(20))


def reencoded(chat_tokenizer, tokenizer, ids: list[int]) -> tuple[list[int], list[bool]]:
    """`apply_chat_template` on the messages that `ids` hold, encoded by transformers; which messages come out equal."""
    starts = [i for i, t in enumerate(ids) if t == tokenizer.im_start_id]
    parts = [ids[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    roles, contents = zip(*(tokenizer.decode(p).removesuffix("\n").split("\n", 1) for p in parts), strict=True)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    text = chat_tokenizer.apply_chat_template(messages, tokenize=False)
    again = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = [i for i, t in enumerate(again) if t == tokenizer.im_start_id]
    back = [again[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return again, [a == b for a, b in zip(parts, back, strict=True)]


@pytest.mark.real
def test_a_real_dialogue_equals_its_chat_template(checkpoint, qwen, prompts):
    """Real tokenizer and model: contexts re-encoded from `apply_chat_template`'s text, scored by plain passes."""
    transformers = pytest.importorskip("transformers")
    model = Qwen2(Qwen2Config.from_hf(checkpoint), scan_layers=False)
    lm = LM(load_params(checkpoint, model), model)
    profiles = make_profiles(2)[:1]
    table = Table(lm, lm, qwen, prompts, REAL)
    limit = dataclasses.replace(limits(REAL), think_tokens=jnp.int32(32), initial_emotion=jnp.int32(50))
    d = jax.device_get(table.agents.play(table.agents.encode(profiles, [0]), jax.random.key(0), limit))
    fresh = Fresh(qwen, True, 9, 100)
    mine, theirs = fresh.policy_rows(d, 0), fresh.user_rows(d, 0, profiles[0], 2)
    check_claims(lm, [*mine, *theirs], batch=1)
    chat_tokenizer, equal = transformers.AutoTokenizer.from_pretrained(checkpoint), []
    for row in [*mine, *theirs]:
        heard = row.ids[: len(row.ids) - row.ids[::-1].index(qwen.im_start_id) - 1]
        again, same = reencoded(chat_tokenizer, qwen, heard)
        equal += same
        if all(same):
            assert again == heard
    print(f"{sum(equal)} of {len(equal)} messages re-encode to the ids that were logged")
    assert np.mean(equal) >= 0.8
