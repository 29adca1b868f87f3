"""First words that a user made up are those that the profile's key draws, to their end.

Held against plain forward passes and NumPy: the prompt is put together from messages, the key from its tokens.
"""

import copy

import jax
import numpy as np
import pytest

from rlver_jax.text.chat import ChatTemplate
from tests.conftest import make_profiles, plain
from tests.test_verify import SEED, check, make_agents, play

pytestmark = pytest.mark.slow

REPLY_TOKENS, TEMPERATURE = 16, 0.9  # of test_verify's users


@pytest.fixture(scope="module")
def log(policy_lm, user_lm, bpe, prompts):
    """(agents, profiles, records) of which one profile in three has no first words."""
    agents, profiles = make_agents(policy_lm, user_lm, bpe, prompts, "argmax"), make_profiles(3)
    return agents, profiles, play(agents, profiles)


def made_up(log) -> dict:
    return copy.deepcopy(next(r for r in log[2] if r["messages"][0]["generated"]))


def drawn(log, record) -> list[int]:
    """What the user says in plain passes, its end included."""
    agents, profiles, _ = log
    tokenizer, chat = agents.tokenizer, ChatTemplate(agents.tokenizer)
    profile = next(p for p in profiles if p.id == record["profile"])
    system = f"{profile.persona}\n{profile.background}\n{profile.hidden_intention}"
    prefix = chat.message("system", system) + chat.message("user", "Go.") + chat.open("assistant")
    mark, weight = 0, 1
    for token in prefix:
        weight = weight * 0x01000193 % 2**32
        mark = (mark + (token + 1) * weight) % 2**32
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(record["seed"]), 1), np.uint32(mark))
    pieces = [tokenizer.token_bytes(t) for t in range(tokenizer.vocab_size)]
    tokens: list[int] = []
    while len(tokens) < REPLY_TOKENS:
        scores = plain(agents.user, [prefix + tokens], batch=1)[1][0][-1].astype(np.float64)
        for token in range(len(scores)):
            piece = pieces[token] if token < len(pieces) else b""
            stop = token in tokenizer.stop_ids
            if (not piece and not stop) or piece.find(b"\n") > 0 or (not tokens and not piece.strip()):
                scores[token] = -np.inf
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, len(tokens)), (len(scores),)))
        tokens.append(int(np.argmax(scores / TEMPERATURE + noise)))
        if tokens[-1] in tokenizer.stop_ids or b"\n" in pieces[tokens[-1]]:
            break
    return tokens


def openings(faults) -> list[str]:
    return [fault for fault in faults if "opening, token" in fault]


def test_honest_first_words_are_those_of_plain_passes(log):
    record = made_up(log)
    tokens, logged = drawn(log, record), record["messages"][0]["tokens"]
    assert tokens[: len(logged)] == logged
    assert len(tokens) == min(len(logged) + 1, REPLY_TOKENS)
    report = check(log, record)
    assert report.faults == []
    queries = sum(len(t) for m in record["messages"][2::2] for t in lines(m))
    assert report.tokens - queries == len(tokens), "each word and the end"
    assert report.unchecked == {"the policy's words and log-probs (--policy=…)": None}


def lines(message):
    spoken = message["content"] is not None
    return [
        *message["appraisal_tokens"].values(),
        *[*message["consideration_tokens"].values(), message["all_tokens"]] * spoken,
    ]


def another_word(tokens, agents):
    tokens[0] = next(t for t in range(300) if t != tokens[0] and agents.tokenizer.token_bytes(t).isalpha())


def stops_sooner(tokens, agents):
    tokens.pop()


def goes_on(tokens, agents):
    tokens.append(next(t for t in range(300) if agents.tokenizer.token_bytes(t).isalpha()))


@pytest.mark.parametrize("edit", [another_word, stops_sooner, goes_on])
def test_other_first_words_are_found(log, edit):
    record = made_up(log)
    first = record["messages"][0]
    assert 1 < len(first["tokens"]) < REPLY_TOKENS
    edit(first["tokens"], log[0])
    first["content"] = log[0].tokenizer.decode(first["tokens"])
    assert openings(check(log, record).faults)


def test_first_words_of_another_seed_are_found(log):
    record = made_up(log)
    assert record["seed"] == SEED
    assert openings(check(log, record | {"seed": SEED + 1}).faults)


def test_first_words_are_recomputed_where_the_first_reply_ended_the_dialogue(log):
    """Nothing was appraised, so nothing else is the user's."""
    record = made_up(log)
    del record["messages"][2:]
    honest = check(log, record)
    assert openings(honest.faults) == []
    assert 0 < honest.tokens <= REPLY_TOKENS
    another_word(record["messages"][0]["tokens"], log[0])
    assert openings(check(log, record).faults)
