"""What is wrong in a log by itself: arithmetic, and texts that are not their tokens. No model is needed."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlver_jax import rewards
from rlver_jax.players import Players
from rlver_jax.profiles.schema import Profile
from rlver_jax.runs.trajectory import emotion_faults, emotions_of, reactions
from rlver_jax.user.emotion import CHANGES, HIGHEST, LOWEST
from rlver_jax.user.packed import LoggedTurn, Said


def logged_turns(record: Mapping[str, Any]) -> list[LoggedTurn]:
    """The log's turns as the derivation wants them."""
    turns, emotion = [], record["messages"][0]["emotion"]
    for turn, spoken, user in reactions(record):
        appraisal = [Said(user["appraisal_tokens"][n], user["appraisal_stopped"][n]) for n in user["appraisal_tokens"]]
        reply = [
            Said(user["consideration_tokens"][n], user["consideration_stopped"][n])
            for n in user["consideration_tokens"]
        ]
        if user["content"] is None:
            reply = []
        else:
            reply.append(Said(user["all_tokens"], user["stopped"]))
        turns.append(LoggedTurn(turn, emotion, user["emotion"], spoken["say_tokens"], appraisal, user["change"], reply))
        emotion = user["emotion"]
    return turns


def misfits(players: Players, record: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a dialogue from being derived: values that none can have."""
    size = players.tokenizer.vocab_size
    first = record["messages"][0]
    yield from _misfit("opening", first["emotion"], 0, {"first utterance": (first["tokens"], None)}, size)
    for turn, spoken, user in reactions(record):
        lines = {"say": (spoken["say_tokens"], None), "reply": (user["all_tokens"], user["raw_logprobs"])}
        tables, speaks = players.tables[1], user["content"] is not None
        for kind, names in (("appraisal", tables.appraisal.names), ("consideration", tables.reply.names * speaks)):
            tokens, logprobs, stopped = (user[f"{kind}_{what}"] or {} for what in ("tokens", "logprobs", "stopped"))
            lines |= {name: (tokens.get(name), logprobs.get(name, ())) for name in names[:-1]}
            if not set(names[:-1]) == set(stopped) == set(tokens) and names:
                yield f"turn {turn + 1}: {kind} has the fields {sorted(tokens)}, expected {sorted(names[:-1])}"
        yield from _misfit(f"turn {turn + 1}", user["emotion"], user["change"], lines, size)


def _misfit(where: str, emotion: int, change: int, lines: Mapping[str, tuple[Any, Any]], size: int) -> Iterator[str]:
    if not LOWEST <= emotion <= HIGHEST or not CHANGES[0] <= change <= CHANGES[-1]:
        yield f"{where}: emotion {emotion} after {change:+d}, expected 0 to 100 after -10 to +10"
    for name, (tokens, logprobs) in lines.items():
        if tokens is None or not all(isinstance(token, int) and 0 <= token < size for token in tokens):
            yield f"{where}: tokens of {name!r} are not ids from 0 to {size - 1}"
        elif logprobs is not None and len(logprobs) != len(tokens):
            yield f"{where}: {len(tokens)} tokens of {name!r}, but {len(logprobs)} log-probabilities"


def derived_rewards(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> np.ndarray:
    """[N] float32: every dialogue's reward by its formula; `settings` are `rewards.reward`'s."""
    emotions = [emotions_of(record) for record in records]
    longest = max(max(map(len, emotions)), *(record["turns"] + 1 for record in records))
    padded = np.array([row + row[-1:] * (longest - len(row)) for row in emotions], np.int32)
    turns, violation = (np.array([record[name] for record in records]) for name in ("turns", "violation"))
    formula = jax.jit(functools.partial(rewards.reward, **settings))
    return np.asarray(formula(emotions=padded, n_turns=turns, violation=violation).reward)


def own_faults(players: Players, profile: Profile, record: Mapping[str, Any], reward: np.float32) -> Iterator[str]:
    """Faults of one dialogue.

    Args:
        reward: the derived one.
    """
    rules, decode = players.spec.rules, players.tokenizer.decode
    first = record["messages"][0]
    if profile.first_talk and first["tokens"] != players.tokenizer.encode(profile.first_talk.strip()):
        yield "the first utterance is not the profile's"
    yield from emotion_faults(record, rules)
    for turn, spoken, user in reactions(record):
        where = f"turn {turn + 1}"
        texts = [("say", spoken["content"], spoken["say_tokens"]), ("reply", user["content"] or "", user["tokens"])]
        for kind in ("appraisal", "consideration"):
            fields = user["appraisal"] if kind == "appraisal" else user["considerations"]
            for name, text in fields.items():
                said = Said(user[f"{kind}_tokens"][name], user[f"{kind}_stopped"][name])
                texts.append((name, text, said.text_tokens))
        for name, text, tokens in texts:
            if text != decode(tokens):
                yield f"{where}: the text of {name!r} is not what its tokens say"
        if list(user["all_tokens"][: len(user["tokens"])]) != list(user["tokens"]):
            yield f"{where}: the reply's tokens are not those that were generated"
    yield from _policy_faults(players, record)
    if record["turns"] != sum(m["role"] == "assistant" for m in record["messages"]):
        yield f"{record['turns']} turns, but another number of policy messages"
    if np.float32(record["reward"]) != reward:
        yield f"reward {record['reward']}, but its formula gives {float(reward)}"


def _policy_faults(players: Players, record: Mapping[str, Any]) -> Iterator[str]:
    """Say tokens are a run of the generated tokens, up to the end."""
    turn = 0
    for message in record["messages"]:
        if message["role"] != "assistant":
            continue
        turn += 1
        if message["tokens"] is None:  # said at an endpoint; what the user read of it are its say tokens
            continue
        tokens, say = list(message["tokens"]), list(message["say_tokens"])
        end = len(tokens) - message["stopped"]
        if not message["violation"] and tokens[end - len(say) : end] != say:
            yield f"turn {turn}: the say's tokens are not the end of what the policy generated"
        thought = message["thought"]
        if thought is not None and thought.strip() not in players.tokenizer.decode(tokens):
            yield f"turn {turn}: the thought is not in what the policy generated"
