"""Gradients of whole dialogues: packed, each in one row with a branch a turn, against one row for every turn.

Dialogues of eight turns with random tokens and a small Qwen2.5, in think mode (a reply's thought is seen by that reply
alone) and direct mode. Rows of turns come in two forms: each as long as it is (`turns`; what packing at its best can do
for them), and all padded to the longest (`padded`). All are read one row at a time.
"""

import functools
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax.learning.loss import LossConfig, LossInputs, TrainedModels, loss
from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.qwen import Params, Qwen2, init_params
from rlver_jax.perf.bench_rollout import free_grammar
from rlver_jax.perf.bench_timing import Tell, alternate, difference, ratios

MODEL = Qwen2Config(8_000, 256, 704, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, tie_embeddings=True)
DIALOGUES, TURNS = 4, 8
SYSTEM, USER, THOUGHT, REPLY = 100, 50, 120, 60  # tokens; those of the user include its template


class Row(NamedTuple):
    """Arrays [L] of one row, or [N, L] of several; on the host, or on the device where they are read."""

    tokens: Any
    positions: Any
    branch: Any
    target: Any
    mask: Any  # at the positions that predict an action


def measure(repeats: int, tell: Tell) -> dict[str, Any]:
    """Seconds a dialogue of each form in both modes, and by how much the gradients differ."""
    model = Qwen2(MODEL, scan_layers=False, attention="chunked", attention_chunk=128)
    params = init_params(model, jax.random.key(0))
    results: dict[str, Any] = {"dialogues": DIALOGUES, "turns": TURNS}
    for mode, thought in (("think", THOUGHT), ("direct", 0)):
        forms = _forms(thought)
        ways = {name: functools.partial(_gradients, model, params, groups) for name, groups in forms.items()}
        tell(f"{mode}: compiling")
        gradients = {name: jax.block_until_ready(way()) for name, way in ways.items()}
        seconds = alternate(ways, repeats, tell)
        tokens = {name: sum(g.tokens.size for g in groups) for name, groups in forms.items()}
        results[mode] = {
            "ways": {
                name: {
                    "s_per_dialogue": statistics.median(times) / DIALOGUES,
                    "positions": tokens[name],
                    "seconds": times,
                }
                for name, times in seconds.items()
            },
            "turns_over_packed": ratios(seconds["turns"], seconds["packed"]),
            "padded_over_packed": ratios(seconds["padded"], seconds["packed"]),
            "largest_difference": max(difference(gradients[name], gradients["packed"]) for name in ways),
        }
    return results


def lines(results: dict[str, Any]) -> list[str]:
    """The results as text."""
    text = []
    for mode in ("think", "direct"):
        comparison = results[mode]
        text.append(f"{mode}: {results['dialogues']} dialogues of {results['turns']} turns")
        for name, way in comparison["ways"].items():
            text.append(f"  {name:7} {way['positions']:6} positions, {way['s_per_dialogue']:6.2f} s a dialogue")
        for other in ("turns", "padded"):
            r = comparison[f"{other}_over_packed"]
            text.append(f"  packed is {r['median']:.2f} x as fast as {other} ({r['least']:.2f} to {r['most']:.2f})")
        text.append(f"  gradients differ by {comparison['largest_difference']:.1e} of the largest")
    return text


def _forms(thought: int) -> dict[str, list[Row]]:
    """{form: groups of rows of one length, arrays [N, L]}."""
    draw = np.random.default_rng(0)
    dialogues = [_dialogue(draw, thought) for _ in range(DIALOGUES)]
    turns = [[_turn_row(system, turns[: t + 1]) for system, turns in dialogues] for t in range(TURNS)]
    longest = max(len(rows[0].tokens) for rows in turns)
    padded = [_padded(row, longest) for rows in turns for row in rows]
    packed = [_packed_row(system, turns, bool(thought)) for system, turns in dialogues]
    return {"packed": [_stack(packed)], "turns": [_stack(rows) for rows in turns], "padded": [_stack(padded)]}


def _dialogue(draw: np.random.Generator, thought: int):
    """(system tokens, [(user, thought, reply) of each turn])."""
    words = lambda n: draw.integers(0, MODEL.vocab_size, n).tolist()  # noqa: E731
    return words(SYSTEM), [(words(USER), words(thought), words(REPLY)) for _ in range(TURNS)]


def _turn_row(system: list[int], turns: list[tuple[list[int], ...]]) -> Row:
    """The last turn as a row of its own; thoughts of earlier ones are not in its context."""
    history = list(system)
    for user, _, reply in turns[:-1]:
        history += user + reply
    user, thought, reply = turns[-1]
    history += user
    tokens = history + thought + reply[:-1]
    return _row(tokens, range(len(tokens)), [0] * len(tokens), [(len(history), thought + reply)])


def _packed_row(system: list[int], turns: list[tuple[list[int], ...]], think: bool) -> Row:
    """A whole dialogue: in think mode each reply is a branch, and its text follows once more as history."""
    tokens, positions, branch = list(system), list(range(len(system))), [0] * len(system)
    actions, history = [], len(system)

    def add(more: list[int], of: int, position: int) -> None:
        tokens.extend(more)
        positions.extend(range(position, position + len(more)))
        branch.extend([of] * len(more))

    for turn, (user, thought, reply) in enumerate(turns):
        add(user, 0, history)
        history += len(user)
        actions.append((len(tokens), thought + reply))
        if think:
            add(thought + reply[:-1], (turn + 1) * BRANCH_RADIX, history)
        last = turn + 1 == len(turns)
        add(reply if not last else [] if think else reply[:-1], 0, history)
        history += len(reply)
    return _row(tokens, positions, branch, actions)


def _row(tokens, positions, branch, actions: list[tuple[int, list[int]]]) -> Row:
    """`actions`: (position of the first token, tokens), each predicted at the position before its own."""
    target, mask = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), bool)
    for first, action_tokens in actions:
        at = slice(first - 1, first - 1 + len(action_tokens))
        target[at], mask[at] = action_tokens, True
    tokens, positions, branch = (np.asarray(list(x), np.int32) for x in (tokens, positions, branch))
    return Row(tokens, positions, branch, target, mask)


def _padded(row: Row, length: int) -> Row:
    return Row(*(np.pad(x, (0, length - len(x))) for x in row))


def _stack(rows: list[Row]) -> Row:
    return Row(*(np.stack(x) for x in zip(*rows, strict=True)))


def _gradients(model: Qwen2, params: Params, groups: list[Row]) -> Params:
    """Of the loss over all dialogues' actions; groups of one length share a program."""
    total = jax.tree.map(jnp.zeros_like, params)
    for group in groups:
        total = _add_gradients(model, params, group, total)
    return total


@functools.partial(jax.jit, static_argnums=0)
def _add_gradients(model: Qwen2, params: Params, rows: Row, total: Params) -> Params:
    unclipped = LossConfig(clip_low=1.0, clip_high=float("inf"))
    trained, grammar = TrainedModels(model, None, None, unclipped), free_grammar(model.config.vocab_size)

    def one(total: Params, row: Row) -> tuple[Params, None]:
        tokens, positions, branch, target, mask = (x[None] for x in row)
        zeros, none = jnp.zeros(mask.shape), jnp.zeros_like(target)
        count = jnp.full(1, target.shape[1], jnp.int32)
        batch = PackedBatch(tokens, positions, branch, count, mask, target, zeros, none, none)
        weight = mask / (DIALOGUES * TURNS * REPLY)
        inputs = LossInputs(batch, jnp.full(mask.shape, -9.0), jnp.ones(mask.shape), weight, weight)
        gradient = jax.grad(loss, argnums=1, has_aux=True)(trained, {"policy": params}, inputs, grammar)[0]["policy"]
        return jax.tree.map(jnp.add, total, gradient), None

    return jax.lax.scan(one, total, rows)[0]
