"""Finished dialogues -> packed sequences, on the device: the training format (docs/architecture.md).

Each dialogue becomes one row. What history keeps is branch 0. Where replies begin with what later turns don't see (a
thought, or an empty one: `PolicyTables.branched`) each turn's whole reply is a branch of its own right after the prefix
that it was generated from, and the say follows once more as history. With `models.attention`'s masks this equals one
row per turn exactly, at the cost of the distinct tokens.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlver_jax.decoding.grammar import Grammar
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.parallel import rules
from rlver_jax.rollout.policy_turn import PolicyTables
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits


@flax.struct.dataclass
class PackedBatch:
    """B dialogues in rows of L positions. What belongs to an action stands at the position that predicts it."""

    tokens: Int[Array, "B L"]  # 0 beyond a row's count
    positions: Int[Array, "B L"]  # rotary; a branch continues its prefix
    branch: Int[Array, "B L"]  # 0: history; (turn + 1) * BRANCH_RADIX: the reply of that turn, thought included
    count: Int[Array, "B"]  # tokens of each row
    mask: Bool[Array, "B L"]  # an action was drawn from what this position predicts
    target: Int[Array, "B L"]  # that action
    logprob: Float[Array, "B L"]  # its behaviour log-prob
    state: Int[Array, "B L"]  # of the policy's grammar before it
    turn: Int[Array, "B L"]  # its turn, from 0; 0 where there is no action


class _Segment(NamedTuple):
    """Tokens that every turn of every row has at this point: the first `width` of them."""

    tokens: Int[Array, "B T S"]
    width: Int[Array, "B T"]
    branched: bool = False


def max_length(tables: PolicyTables, spec: RolloutConfig, first_width: int) -> int:
    """Tokens that the longest possible row may have.

    Args:
        first_width: of the first utterances, as the sampler gets them.
    """
    heard = max(first_width, spec.user_tokens)
    marks = tables.open_user.shape[0] + 2 * tables.close.shape[0] + tables.open_assistant.shape[0]
    history = tables.system.shape[0] + spec.max_turns * (marks + heard + spec.say_tokens)
    branches = spec.max_turns * (tables.think_open.shape[0] + spec.policy_tokens) if tables.branched else 0
    return min(history, spec.context) + branches


def row_lengths(dialogues: Dialogues, tables: PolicyTables, spec: RolloutConfig) -> Int[Array, "B"]:
    """Tokens of each dialogue's row: what decides how long the packed rows must be."""
    counts = jnp.stack([segment.width for segment in _segments(dialogues, tables, spec)])
    return tables.system.shape[0] + counts.sum((0, 2))


def build_sequences(
    dialogues: Dialogues, tables: PolicyTables, spec: RolloutConfig, limits: RolloutLimits, length: int
) -> PackedBatch:
    """Packs dialogues into rows of `length` positions, at least the longest of `row_lengths`.

    Tokens that the grammar forced on the policy (the closing of a thought at its limit) are no actions.
    """
    segments = _segments(dialogues, tables, spec)
    batch = dialogues.turns.shape[0]
    system = jnp.broadcast_to(tables.system, (batch, tables.system.shape[0]))
    tokens, valid, branched = _side_by_side(segments, system)
    turn = jnp.repeat(jnp.arange(spec.max_turns), tokens.shape[1] // spec.max_turns)
    pad = ((0, 0), (system.shape[1], 0))
    tokens = jnp.concatenate([system, tokens], axis=1)
    valid = jnp.pad(valid, pad, constant_values=True)
    branch = jnp.pad(jnp.where(branched, (turn + 1) * BRANCH_RADIX, 0), (system.shape[1], 0))
    positions = _positions(valid, branch)
    order = jnp.argsort(~valid, axis=1, stable=True)[:, :length]
    count = valid.sum(1, dtype=jnp.int32)

    def dense(x: Array) -> Array:
        x = jnp.take_along_axis(jnp.broadcast_to(x, valid.shape), order, axis=1)
        x = jnp.where(jnp.arange(x.shape[1]) < count[:, None], x, 0)
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))

    position = jnp.cumsum(valid, axis=1) - valid
    reply_at = system.shape[1] + sum(segment.tokens.shape[2] for segment in segments[:-2])
    width = sum(segment.tokens.shape[2] for segment in segments)
    first = position[:, reply_at::width][:, : spec.max_turns]  # position of each turn's first action
    actions = _actions(dialogues, tables.grammar, spec, limits, first, length)
    return rules.constrain_rows(PackedBatch(dense(tokens), dense(positions), dense(branch), count, **actions))


def _segments(dialogues: Dialogues, tables: PolicyTables, spec: RolloutConfig) -> list[_Segment]:
    """What one turn adds to a row, in order. The reply stands next to last, the say as history last."""
    d, branched = dialogues, tables.branched
    batch, turns = d.turns.shape[0], spec.max_turns
    played = jnp.arange(turns) < d.turns[:, None]
    reply = d.policy.completion
    heard, heard_count = _heard(d)

    def constant(tokens: Array, where: Array = played, branched: bool = False) -> _Segment:
        shape = (batch, turns, tokens.shape[0])
        return _Segment(jnp.broadcast_to(tokens, shape), where * tokens.shape[0], branched)

    later = played & (jnp.arange(turns) > 0)
    followed = played & (jnp.arange(turns) + 1 < d.turns[:, None])
    by_row = lambda x: jnp.moveaxis(x, 0, 1)  # noqa: E731
    # Of a branch, the last token is predicted but never read; without branches the text is also the history.
    text_count = jnp.maximum(reply.count - 1, 0) if branched else reply.text_count
    return [
        constant(tables.close, later),
        constant(tables.open_user),
        _Segment(heard, heard_count * played),
        constant(tables.close),
        constant(tables.open_assistant),
        constant(tables.think_open, branched=branched),
        _Segment(by_row(reply.tokens), by_row(text_count) * played, branched=branched),
        _Segment(by_row(d.policy.say), by_row(d.policy.say_count) * (followed & branched)),
    ]


def _heard(dialogues: Dialogues) -> tuple[Int[Array, "B T R"], Int[Array, "B T"]]:
    """What the policy hears before each turn: the first utterance, then the user's replies."""
    replies = jax.tree.map(lambda x: x[:-1, -1], dialogues.user.reply)
    tokens, first = jnp.moveaxis(replies.tokens, 0, 1), dialogues.first_talk[:, None]
    width = max(tokens.shape[2], first.shape[2])
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2])))  # noqa: E731
    count = jnp.concatenate([dialogues.first_count[:, None], replies.text_count.T], axis=1)
    return jnp.concatenate([pad(first), pad(tokens)], axis=1), count


def _side_by_side(segments: list[_Segment], system: Array) -> tuple[Array, Array, Array]:
    """(tokens, valid) [B, T * W] with gaps, and [T * W] whether a position belongs to a branch."""
    batch, turns = system.shape[0], segments[0].tokens.shape[1]
    tokens = jnp.concatenate([segment.tokens for segment in segments], axis=2).reshape(batch, -1)
    masks = [jnp.arange(segment.tokens.shape[2]) < segment.width[:, :, None] for segment in segments]
    branched = jnp.concatenate([jnp.full(segment.tokens.shape[2], segment.branched) for segment in segments])
    return tokens, jnp.concatenate(masks, axis=2).reshape(batch, -1), jnp.tile(branched, turns)


def _positions(valid: Bool[Array, "B W"], branch: Int[Array, "W"]) -> Int[Array, "B W"]:
    """History counts on as if no branch were there; a branch counts on from the history before it."""
    history = valid & (branch == 0)
    before = jnp.cumsum(history, axis=1) - history
    inside = valid & (branch > 0)
    total = jnp.cumsum(inside, axis=1) - inside
    # What earlier branches held: `total` where this branch began, the last position outside any branch.
    begun = jax.lax.cummax(jnp.where(branch == 0, total, 0), axis=1)
    return before + jnp.where(branch > 0, total - begun, 0)


def _actions(
    dialogues: Dialogues,
    grammar: Grammar,
    spec: RolloutConfig,
    limits: RolloutLimits,
    first: Int[Array, "B T"],
    length: int,
) -> dict[str, Array]:
    """The fields of the actions, each at the position before its token's."""
    reply = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), dialogues.policy.completion)
    batch, turns, width = reply.tokens.shape
    step = jnp.arange(width)
    drawn = (step < reply.count[:, :, None]) & (jnp.arange(turns) < dialogues.turns[:, None])[:, :, None]
    if grammar.closing.shape[0] and spec.mode == "think":
        forced = step >= limits.think_tokens - grammar.closing.shape[0]
        drawn &= ~(forced & (step <= reply.found_at[:, :, None]))
    position = jnp.where(drawn, first[:, :, None] - 1 + step, length).reshape(batch, -1)
    rows = jnp.arange(batch)[:, None]

    def put(x: Array) -> Array:
        x = jnp.broadcast_to(x, reply.tokens.shape).reshape(batch, -1)
        return jnp.zeros((batch, length), x.dtype).at[rows, position].set(x, mode="drop")

    return {
        "mask": put(drawn),
        "target": put(reply.tokens),
        "logprob": put(reply.logprob),
        "state": put(_states(grammar, reply.tokens)),
        "turn": put(jnp.arange(turns)[:, None]),
    }


def _states(grammar: Grammar, tokens: Int[Array, "B T M"]) -> Int[Array, "B T M"]:
    """The grammar's state before each token of a reply."""
    begin = jnp.full(tokens.shape[:2], grammar.begin, jnp.int32)

    def step(state: Array, token: Array) -> tuple[Array, Array]:
        return grammar.table[state, token].astype(jnp.int32), state

    return jnp.moveaxis(jax.lax.scan(step, begin, jnp.moveaxis(tokens, 2, 0))[1], 0, 2)
