"""Derives a simulated user's appraisals, changes and replies again, from a finished dialogue, in one forward pass.

The whole dialogue becomes one packed row (see `models.attention`): plain messages are branch 0; what the user reasoned
in turn t is branch t * BRANCH_RADIX, and each option of its change a twig of that branch. One pass of the user gives
every distribution that the sampler drew from, so each token can be held against the user's own choice. The prefix is
read apart, once for all dialogues of a profile, as the sampler does.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.models.qwen2 import logits
from rlver_jax.sampling.cache import LM, Cache, append, init_cache, repeat_rows
from rlver_jax.sampling.decode import gumbel, score_options
from rlver_jax.user.emotion import CHANGES
from rlver_jax.user.simulated import KEY_APPRAISAL, KEY_REPLY, UserTables

LENGTH_STEP = 128  # rows are padded to multiples of it, so that few lengths are compiled
QUERY_STEP = 32  # tokens whose whole distributions are held at once
QUERIES_STEP = 128  # numbers of queries and of choices are padded likewise
CHOICE_STEP = 4


@dataclasses.dataclass(frozen=True)
class Said:
    """One generated line: its tokens, the one that ended it included if `stopped`."""

    tokens: Sequence[int]
    stopped: bool

    @property
    def text_tokens(self) -> Sequence[int]:
        """Without the token that only ended the line."""
        return self.tokens[: len(self.tokens) - self.stopped]


@dataclasses.dataclass(frozen=True)
class LoggedTurn:
    """What a log says of one turn that the user appraised."""

    turn: int
    emotion_before: int
    emotion_after: int
    say: Sequence[int]
    appraisal: Sequence[Said]
    change: int
    reply: Sequence[Said]  # the reply script's fields, the reply last; empty if the dialogue ended before


class Query(NamedTuple):
    """A generated token to hold against the distribution it came from."""

    place: int  # index of the token before it
    token: int
    state: int  # of the grammar before it
    part: int  # which key of the turn
    step: int
    turn: int
    field: int  # position in appraisal + reply
    spoken: bool  # sampled at the reply's temperature rather than greedily


@dataclasses.dataclass
class Packed:
    """One packed dialogue under construction (host lists)."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    branch: list[int] = dataclasses.field(default_factory=list)
    queries: list[Query] = dataclasses.field(default_factory=list)
    choices: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (last token before, first option token)

    def add(self, tokens: Sequence[int], branch: int, position: int) -> int:
        """Adds tokens of one branch from `position` on; returns the position after them."""
        self.tokens += tokens
        self.branch += [branch] * len(tokens)
        self.positions += range(position, position + len(tokens))
        return position + len(tokens)


@dataclasses.dataclass(frozen=True)
class Rederived:
    """What the user says itself: for each query and each choice of a packed dialogue."""

    margin: np.ndarray  # [Q] how far the logged token lies below the likeliest (noise added where it was sampled)
    logprob: np.ndarray  # [Q] raw log-probability of the logged token
    change_logprobs: np.ndarray  # [choices, 21]


def pack_dialogue(
    tables: UserTables, start: int, first_talk: Sequence[int], turns: Sequence[LoggedTurn], band
) -> Packed:
    """Packs what follows a prefix of `start` tokens; `band` maps an emotion to the index of its band."""
    packed, marks = Packed(), [np.asarray(x).tolist() for x in (tables.close, tables.open_user, tables.open_assistant)]
    close, open_user, open_assistant = marks
    position = start
    last_reply = list(first_talk)
    for index, turn in enumerate(turns):
        base = [*last_reply, *close, *open_user, *turn.say, *close, *open_assistant]
        position = packed.add(base, 0, position)
        _pack_branch(packed, tables, turn, (index + 1) * BRANCH_RADIX, position, band)
        last_reply = list(turn.reply[-1].text_tokens) if turn.reply else []
    return packed


def _pack_branch(packed: Packed, tables: UserTables, turn: LoggedTurn, branch: int, position: int, band) -> None:
    """The reasoning of one turn: appraisal, options on their twigs, the chosen one, reply script."""
    literals = _literals(tables.appraisal, turn.emotion_before, band)
    for i, said in enumerate(turn.appraisal):
        position = packed.add(literals[i], branch, position)
        position = _pack_said(packed, tables, said, branch, position, turn.turn, i, KEY_APPRAISAL + i, False)
    position = packed.add(literals[-1], branch, position)
    packed.choices.append((len(packed.tokens) - 1, len(packed.tokens)))
    for token, twig, offset in zip(*(np.asarray(x).tolist() for x in _options(tables)), strict=True):
        packed.add([token], branch + twig, position + offset)
    if not turn.reply:
        return
    option = turn.change - CHANGES[0]
    count = int(tables.options.counts[option])
    literals = _literals(tables.reply, turn.emotion_after, band)
    literals[0] = [*np.asarray(tables.options.padded[option, :count]).tolist(), *literals[0]]
    last = len(turn.reply) - 1
    for i, said in enumerate(turn.reply):
        position = packed.add(literals[i], branch, position)
        field = len(turn.appraisal) + i
        position = _pack_said(packed, tables, said, branch, position, turn.turn, field, KEY_REPLY + i, i == last)


def _options(tables: UserTables):
    return tables.options.tokens, tables.options.branch, tables.options.offset


def _literals(script, emotion: int, band) -> list[list[int]]:
    tokens, counts = script.render(jnp.array([emotion]), jnp.array([band(emotion)]))
    return [row[:n].tolist() for row, n in zip(np.asarray(tokens[:, 0]), np.asarray(counts[:, 0]), strict=True)]


def _pack_said(packed, tables: UserTables, said: Said, branch, position, turn, field, part, spoken) -> int:
    """One line: its text tokens, and a query for each token, the ending one included."""
    state = tables.grammar.begin
    before = len(packed.tokens) - 1
    position = packed.add(list(said.text_tokens), branch, position)
    for step, token in enumerate(said.tokens):
        packed.queries.append(Query(before + step, token, state, part, step, turn, field, spoken))
        state = int(tables.grammar.table[state, token])
    return position


def read_prefix(lm: LM, prefix: Sequence[int], width: int = 0) -> Cache:
    """The user's context before the first turn, to be shared by all dialogues of a profile.

    Args:
        width: tokens to pad it to at least, so that all prefixes of a log compile once.
    """
    return _append(lm, _row(prefix, width), jnp.array([len(prefix)]))


def _row(values: Sequence[int], width: int) -> Int[np.ndarray, "1 L"]:
    """Padded to `width` or more, in steps of LENGTH_STEP."""
    size = -(-max(len(values), width) // LENGTH_STEP) * LENGTH_STEP
    return np.pad(np.array(values, np.int32), (0, size - len(values)))[None]


@jax.jit
def _append(lm: LM, tokens: Int[Array, "1 L"], count: Int[Array, "1"]) -> Cache:
    return append(lm, init_cache(lm, 1, tokens.shape[1]), tokens, count)


def rederive(
    lm: LM,
    tables: UserTables,
    prefix: Cache,
    packed: Packed,
    row_key: Key[Array, ""],
    temperature: float,
    width: int = 0,
) -> Rederived:
    """Runs the user once over a packed dialogue and holds every logged token against it.

    Args:
        prefix: what `read_prefix` made of the dialogue's profile.
        row_key: the dialogue's key, as the sampler folded it.
        temperature: of the user's spoken replies; 0: greedy.
        width: tokens to pad the row to at least.
    """
    hidden = _read(lm, prefix, *(_row(x, width) for x in (packed.tokens, packed.positions, packed.branch)))
    queries = _pad_queries(packed.queries)
    margin, logprob = _hold(lm, tables, hidden, queries, row_key, jnp.float32(temperature))
    count, turns = len(packed.queries), len(packed.choices)
    choices = np.zeros((-(-turns // CHOICE_STEP) * CHOICE_STEP, 2), np.int32)
    choices[:turns] = packed.choices
    return Rederived(
        np.asarray(margin).reshape(-1)[:count],
        np.asarray(logprob).reshape(-1)[:count],
        np.asarray(_change_logprobs(lm, tables, hidden, choices))[:turns],
    )


@jax.jit
def _read(lm: LM, prefix: Cache, tokens: Int[Array, "1 L"], positions: Int[Array, "1 L"], branch: Int[Array, "1 L"]):
    room = repeat_rows(prefix, 1, prefix.capacity + tokens.shape[1])
    return lm.read(tokens, positions, branch, room)[0][0]


def _pad_queries(queries: Sequence[Query]) -> Int[Array, "n k 8"]:
    """Queries as rows of integers, in groups of QUERY_STEP, padded with zeros to a multiple of QUERIES_STEP."""
    array = np.array([list(map(int, q)) for q in queries], np.int32).reshape(-1, len(Query._fields))
    array = np.pad(array, ((0, -len(array) % QUERIES_STEP), (0, 0)))
    return jnp.asarray(array.reshape(-1, QUERY_STEP, array.shape[1]))


@jax.jit
def _hold(lm: LM, tables: UserTables, hidden: Float[Array, "L D"], queries, row_key, temperature):
    """(margin, raw log-prob) of every query, QUERY_STEP distributions at a time."""

    def some(group: Int[Array, "k 8"]):
        place, token, state, part, step, turn, _, spoken = group.T
        scores = logits(lm.params, hidden[place])
        logprob = jnp.take_along_axis(scores, token[:, None], 1)[:, 0] - jax.nn.logsumexp(scores, axis=-1)
        allowed = jnp.where(tables.grammar.forbidden[state], -jnp.inf, scores)
        drawn = (spoken == 1) & (temperature > 0)

        def with_noise() -> Array:
            keys = jax.vmap(lambda t, p: jax.random.fold_in(jax.random.fold_in(row_key, t), p))(turn, part)
            noise = jax.vmap(gumbel, (0, 0, None))(keys, step, scores.shape[1])
            return jnp.where(drawn[:, None], allowed / jnp.maximum(temperature, 1e-9) + noise, allowed)

        allowed = jax.lax.cond(drawn.any(), with_noise, lambda: allowed)
        return allowed.max(-1) - jnp.take_along_axis(allowed, token[:, None], 1)[:, 0], logprob

    return jax.lax.map(some, queries)


@jax.jit
def _change_logprobs(
    lm: LM, tables: UserTables, hidden: Float[Array, "L D"], choices: Int[Array, "N 2"]
) -> Float[Array, "N 21"]:
    """log p of every option of each choice from the hidden states of its twig; what `choose` computes from a cache."""
    options = tables.options
    places = jnp.where(options.contexts == 0, choices[:, :1], choices[:, 1:] + options.contexts - 1)
    return score_options(lm, options, hidden[places])
