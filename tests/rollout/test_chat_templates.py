"""Dialogues of models with Qwen3's chat template, against contexts that transformers' `apply_chat_template` renders.

The golden models play them with a tokenizer in which a thought's tags are tokens. Contents are put into the rendered
text as tokens: a model that is not trained on it writes what would be split in another way.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from rlver_jax.decoding.replay_sequence import Completion
from rlver_jax.learning.sequences import build_sequences, row_lengths
from rlver_jax.models.qwen import logits
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.policy_replay_sequence import PolicyPacker, Reply
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.turn import UserLimits
from tests.conftest import SHORT_PROMPTS, Fresh, Row, check_claims, make_profiles, plain
from tests.text.conftest import write_qwen3

pytestmark = pytest.mark.slow
RULES = EmotionRules(initial=30, floor=20, ceiling=42)
SPECS = {
    mode: RolloutConfig(mode, mode == "think", 2, 3, 704, 24, 24, 20, "argmax", RULES) for mode in ("think", "direct")
}
LIMITS = RolloutLimits(
    *map(jnp.int32, (3, 24, 24)),
    jnp.float32(1),
    jnp.int32(30),
    UserLimits(jnp.int32(20), jnp.int32(20), jnp.float32(0)),
)
PROFILES = make_profiles(3)  # the user of the second makes up its first words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen3(tmp_path_factory.mktemp("qwen3"))


@dataclasses.dataclass(frozen=True)
class Rendered(Fresh):
    """Contexts as transformers renders them."""

    reference: object = None

    def ids(self, messages, think: bool) -> list[int]:
        """Of (role, content, thought), each a text or tokens, up to what is generated next."""
        held: dict[str, list[int]] = {}

        def mark(content) -> str:
            if isinstance(content, str):
                return content
            held[name := f"@{len(held)}@"] = list(content)
            return name

        conversation = [
            {"role": role, "content": mark(content)} | ({} if thought is None else {"reasoning_content": mark(thought)})
            for role, content, thought in messages
        ]
        text = self.reference.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, enable_thinking=think
        )
        parts = re.split(r"(@\d+@)", text)
        return [token for part in parts for token in (held[part] if part in held else self.reference.encode(part))]

    def policy_rows(self, d, b: int) -> list[Row]:
        messages, rows = [("system", SHORT_PROMPTS[f"policy_{'think' if self.think else 'direct'}.j2"], None)], []
        for t in range(d.turns[b]):
            messages.append(("user", self.heard(d, b, t), None))
            opened = self.ids(messages, self.think) + (self.reference.encode("<think>\n") if self.think else [])
            text, tokens = self.cut(d.policy.completion, (t, b))
            rows.append(Row(opened + tokens, self.claims(d.policy.completion, (t, b), len(opened))))
            messages.append(("assistant", self.spoken(tokens), text if self.think else None))  # thoughts are dropped
        return rows

    def user_rows(self, d, b: int, profile, max_turns: int) -> list[Row]:
        messages, rows = [("system", self.system(profile), None), ("user", "Go.", None)], []
        for t in range(d.turns[b]):
            if d.policy.violation[t, b]:
                break
            say = self.spoken(self.cut(d.policy.completion, (t, b))[1])
            messages += [("assistant", self.heard(d, b, t), None), ("user", say, None)]
            emotions = d.emotions[b, t : t + 2]
            rows.append(self.reasoning(self.ids(messages, False), d.user, (t,), b, *emotions, t + 1 < max_turns))
        return rows


@pytest.fixture(scope="module", params=["think", "direct"])
def played(request, folder, policy_lm, user_lm, prompts):
    """(agents, oracle, dialogues) of a mode."""
    tokenizer, spec = load_tokenizer(folder), SPECS[request.param]
    options = {"style": "vanilla", "scenario": "heart_to_heart"}
    agents = Agents.build(policy_lm, user_lm, tokenizer, prompts, spec, **options)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    oracle = Rendered(tokenizer, spec.mode == "think", RULES.floor, RULES.ceiling, reference)
    encoded = agents.encode(PROFILES, range(6))
    return agents, oracle, agents.play(encoded, jax.random.key(3), LIMITS)


def test_log_probs_are_those_of_rendered_contexts(played, policy_lm, user_lm):
    agents, oracle, d = played
    d = jax.device_get(d)
    policy_rows = [row for b in range(6) for row in oracle.policy_rows(d, b)]
    user_rows = [row for b in range(6) for row in oracle.user_rows(d, b, PROFILES[b // 2], agents.spec.max_turns)]
    assert d.turns.max() > 1, "history is read"
    assert check_claims(policy_lm, policy_rows) == d.policy.completion.count.sum() > 100
    assert check_claims(user_lm, user_rows) == d.user.appraisal.count.sum() + d.user.reply.count.sum() > 100


def test_first_words_that_a_user_makes_up_follow_an_empty_thought(played, user_lm):
    """Greedy: each token is the likeliest of those that a line may hold there."""
    _, oracle, d = played
    opened = oracle.ids([("system", oracle.system(PROFILES[1]), None), ("user", "Go.", None)], False)
    words = np.asarray(d.first_talk)[2, : d.first_count[2]].tolist()
    assert words
    assert oracle.tokenizer.decode(opened).endswith("assistant\n<think>\n\n</think>\n\n")
    ((logp,),) = [plain(user_lm, [[*opened, *words]])[1]]
    tokens = [oracle.tokenizer.token_bytes(i) for i in range(oracle.tokenizer.vocab_size)]
    for i, token in enumerate(words):
        may = np.array([bool(p.strip() if i == 0 else p) and p.find(b"\n") <= 0 for p in tokens])
        here = np.where(may, logp[len(opened) - 1 + i][: len(may)], -np.inf)
        assert here[token] > here.max() - 1e-4


def test_a_packed_row_gives_what_was_sampled(played, policy_lm):
    """The training row: every action's log-prob at the position before it, no thought seen by a later turn."""
    agents, _, d = played
    tables, spec = agents.tables[0], agents.spec
    length = int(np.asarray(row_lengths(d, tables, spec)).max())
    rows = jax.jit(build_sequences, static_argnums=(2, 4))(d, tables, spec, LIMITS, length)
    hidden, _ = policy_lm.model.apply({"params": policy_lm.params}, rows.tokens, rows.positions, rows.branch)
    scores = jnp.where(tables.grammar.forbidden[rows.state], -jnp.inf, logits(policy_lm.params, hidden))
    actual = jnp.take_along_axis(jax.nn.log_softmax(scores), rows.target[..., None], -1)[..., 0]
    mask = np.asarray(rows.mask)
    assert mask.sum() > 100
    np.testing.assert_allclose(np.asarray(actual)[mask], np.asarray(rows.logprob)[mask], atol=1e-4)


def test_a_replayed_row_reads_what_is_rendered(played):
    """Each query's context, the packed tokens that its branch sees, against transformers."""
    agents, oracle, d = played
    d = jax.device_get(d)
    packer = PolicyPacker(agents.tables[0], think_tokens=agents.spec.think_tokens)
    for b in range(6):
        replies = []
        for t in range(d.turns[b]):
            tokens = oracle.cut(d.policy.completion, (t, b))[1]
            completion = Completion(tokens, bool(d.policy.completion.stopped[t, b]))
            replies.append(Reply(oracle.heard(d, b, t), completion, oracle.spoken(tokens)))
        packed = packer.dialogue(replies)
        branch = np.array(packed.branch)
        for t, row in enumerate(oracle.policy_rows(d, b)):
            last = [query for query in packed.queries if query.turn == t][-1]
            seen = np.flatnonzero(
                (branch[: last.previous + 1] == 0) | (branch[: last.previous + 1] == branch[last.previous])
            )
            assert [packed.tokens[i] for i in seen] == row.ids[:-1]
            assert [packed.positions[i] for i in seen] == list(range(len(seen)))
