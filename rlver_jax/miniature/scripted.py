"""The simulated user on replies that are given: recorded ones, or attacks on it."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax.decoding.cache import append, init_cache
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.spec import RolloutLimits
from rlver_jax.text.padding import pad_rows
from rlver_jax.user.turn import dialogue_key, user_turn

SAY_TOKENS = 64  # longest reply that can be given


class Heard(NamedTuple):
    """What became of one dialogue."""

    emotions: list[int]  # the initial one first
    changes: list[int]
    says: list[str]
    answers: list[str]  # what the person said before each reply


def play_scripted(
    agents: Agents,
    profiles: Sequence[Profile],
    limits: RolloutLimits,
    reply: Callable[[int, int, str], str | None],
    seed: int = 0,
) -> list[Heard]:
    """Plays the user against given replies, until each dialogue ends.

    Args:
        reply: (dialogue, turn, what the person said last) -> the reply's text; None: there is none, and the dialogue
            ends here.
    """
    user, batch = agents.user, len(profiles)
    wanted = agents.tokens(profiles).batch(range(batch), range(batch), batch)
    cache = append(user, init_cache(user, batch, agents.spec.context), wanted.prefix, wanted.prefix_count)
    keys = jax.vmap(lambda i: dialogue_key(jax.random.key(seed), i))(wanted.dialogue_ids)
    found = [Heard([int(limits.initial_emotion)], [], [], [p.first_talk or ""]) for p in profiles]
    last = (wanted.first_talk, wanted.first_count)
    turns, rules = int(limits.max_turns), agents.spec.rules
    for turn in range(turns):
        going = [len(h.changes) == turn and not rules.ended(h.emotions[-1]) for h in found]
        given = [reply(i, turn, h.answers[-1]) if going[i] else None for i, h in enumerate(found)]
        active, says = np.array([text is not None for text in given]), [text or "" for text in given]
        emotion = jnp.asarray([h.emotions[-1] for h in found], jnp.int32)
        turn_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
        flags = (jnp.asarray(active), jnp.asarray(turn + 1 < turns))
        how = {"rules": rules, "readout": agents.spec.readout, "max_tokens": agents.spec.user_tokens}
        say = _padded(agents, says)
        cache, result = _turn(user, agents.tables[1], cache, last, say, emotion, turn_keys, limits.user, *flags, **how)
        said = jax.tree.map(lambda x: x[-1], result.reply)
        last = (said.tokens, said.text_count)
        for i, h in enumerate(found):
            if active[i]:
                h.emotions.append(int(result.emotion[i]))
                h.changes.append(int(result.change[i]))
                h.says.append(says[i])
                h.answers.append(agents.tokenizer.decode(said.tokens[i, : said.text_count[i]].tolist()))
    return found


@functools.partial(jax.jit, static_argnames=("rules", "readout", "max_tokens"))
def _turn(lm, tables, cache, last, say, emotion, keys, limits, active, may_reply, *, rules, readout, max_tokens):
    return user_turn(
        lm, tables, cache, last, say, emotion, keys, rules=rules, readout=readout, limits=limits,
        max_tokens=max_tokens, active=active, may_reply=may_reply,
    )  # fmt: skip


def _padded(agents: Agents, texts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    rows = [agents.tokenizer.encode(text)[:SAY_TOKENS] for text in texts]
    tokens, count = pad_rows(rows, SAY_TOKENS)
    return jnp.asarray(tokens), jnp.asarray(count)
