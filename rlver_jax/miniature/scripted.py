"""The simulated user on scripted replies: recorded ones, or attacks on it."""

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

MAX_REPLY_TOKENS = 64  # of a scripted reply


class ScriptedDialogue(NamedTuple):
    """One dialogue, played."""

    emotions: list[int]  # the initial one first
    changes: list[int]
    replies: list[str]
    answers: list[str]  # the person's words before each reply


def play_scripted(
    agents: Agents,
    profiles: Sequence[Profile],
    limits: RolloutLimits,
    reply: Callable[[int, int, str], str | None],
    seed: int = 0,
) -> list[ScriptedDialogue]:
    """Plays the user against scripted replies, until each dialogue ends.

    Args:
        reply: (dialogue, turn, the person's last words) -> the reply's text; None: there is none, and the dialogue
            ends here.
    """
    user, batch = agents.user, len(profiles)
    tokens = agents.tokens(profiles).batch(range(batch), range(batch), batch)
    cache = append(user, init_cache(user, batch, agents.spec.context), tokens.prefix, tokens.prefix_count)
    keys = jax.vmap(lambda i: dialogue_key(jax.random.key(seed), i))(tokens.dialogue_ids)
    dialogues = [ScriptedDialogue([int(limits.initial_emotion)], [], [], [p.first_talk or ""]) for p in profiles]
    last = (tokens.first_talk, tokens.first_count)
    turns, spec, rules = int(limits.max_turns), agents.spec, agents.spec.rules
    static = {"rules": rules, "readout": spec.readout, "max_tokens": spec.user_tokens}
    user_step = functools.partial(_turn, user, agents.tables[1], **static)
    for turn in range(turns):
        unfinished = [len(d.changes) == turn and not rules.ended(d.emotions[-1]) for d in dialogues]
        texts = [reply(i, turn, d.answers[-1]) if unfinished[i] else None for i, d in enumerate(dialogues)]
        active, replies = np.array([text is not None for text in texts]), [text or "" for text in texts]
        emotion = jnp.asarray([d.emotions[-1] for d in dialogues], jnp.int32)
        turn_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
        inputs = (last, _padded(agents, replies), emotion, turn_keys, limits.user)
        cache, result = user_step(cache, *inputs, jnp.asarray(active), jnp.asarray(turn + 1 < turns))
        answer = jax.tree.map(lambda x: x[-1], result.reply)
        last = (answer.tokens, answer.text_count)
        for i, d in enumerate(dialogues):
            if active[i]:
                d.emotions.append(int(result.emotion[i]))
                d.changes.append(int(result.change[i]))
                d.replies.append(replies[i])
                d.answers.append(agents.tokenizer.decode(answer.tokens[i, : answer.text_count[i]].tolist()))
    return dialogues


@functools.partial(jax.jit, static_argnames=("rules", "readout", "max_tokens"))
def _turn(lm, tables, cache, last, reply, emotion, keys, limits, active, may_reply, *, rules, readout, max_tokens):
    return user_turn(
        lm, tables, cache, last, reply, emotion, keys, rules=rules, readout=readout, limits=limits,
        max_tokens=max_tokens, active=active, may_reply=may_reply,
    )  # fmt: skip


def _padded(agents: Agents, texts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    encoded = [agents.tokenizer.encode(text)[:MAX_REPLY_TOKENS] for text in texts]
    tokens, count = pad_rows(encoded, MAX_REPLY_TOKENS)
    return jnp.asarray(tokens), jnp.asarray(count)
