"""Random dialogues of 0..T turns in the sampler's arrays, and the same dialogues as one plain row a turn."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.generate import Generated
from rlver_jax.learning.sequences import PackedBatch, build_sequences
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.qwen import Qwen2
from rlver_jax.rollout.policy_turn import PolicyTurn, build_policy_tables
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.user.turn import UserLimits, UserTurn
from tests.conftest import random_params

LENGTH = 320  # enough for eight turns
SPARE = 9  # embedding rows without a token


def spec_for(mode: str, enforce: bool = False, turns: int = 8) -> RolloutConfig:
    return RolloutConfig(
        mode=mode,
        enforce_format=enforce,
        group=1,
        max_turns=turns,
        context=600,
        think_tokens=9,
        say_tokens=7,
        user_tokens=6,
    )


def limits_for(spec: RolloutConfig) -> RolloutLimits:
    user = UserLimits(jnp.int32(6), jnp.int32(6), jnp.float32(1))
    return RolloutLimits(
        *map(jnp.int32, (spec.max_turns, spec.think_tokens, spec.say_tokens)), jnp.float32(1), jnp.int32(30), user
    )


class Turn(NamedTuple):
    heard: list[int]
    completion: list[int]  # as sampled, the stop token included
    stopped: bool
    say: list[int]  # what history keeps
    logprob: np.ndarray


class World(NamedTuple):
    spec: RolloutConfig
    tables: object
    dialogues: Dialogues
    turns: list[list[Turn]]  # of each dialogue


def _turn(draw, tables, tokenizer, spec, heard) -> Turn:
    """A reply whose tokens the grammar allows, one by one; its border of thought and say is where we put it."""
    close = tokenizer.encode("</think>\n\n")
    table, forbidden = np.asarray(tables.grammar.table), np.asarray(tables.grammar.forbidden)
    stops = [tokenizer.im_end_id, tokenizer.pad_id]

    def words(state: int, count: int) -> tuple[list[int], int]:
        tokens = []
        for _ in range(count):
            allowed = np.setdiff1d(np.flatnonzero(~forbidden[state]), stops)
            tokens.append(int(draw.choice(allowed)))
            state = int(table[state, tokens[-1]])
        return tokens, state

    think = spec.mode == "think"
    thought, state = words(tables.grammar.begin, draw.integers(0, 4)) if think else ([], tables.grammar.begin)
    if think:
        thought += close
        for token in close:
            state = int(table[state, token])
    say, _ = words(state, draw.integers(1, spec.say_tokens))
    stopped = bool(draw.random() < 0.7)
    completion = thought + say + ([int(draw.choice(stops))] if stopped else [])
    return Turn(heard, completion, stopped, say, draw.normal(-2, 1, len(completion)).astype(np.float32))


def make_world(tokenizer, prompts, mode: str, *, seed: int = 0, batch: int = 5, turns: int = 8) -> World:
    draw, spec = np.random.default_rng(seed), spec_for(mode, turns=turns)
    tables = build_policy_tables(tokenizer, prompts, tokenizer.vocab_size + SPARE, spec)
    plain = [t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t).isalpha()]
    counts = [0, turns, *draw.integers(0, turns + 1, batch - 2)]
    dialogues = []
    for count in counts:
        heard = [draw.choice(plain, draw.integers(1, spec.user_tokens)).tolist() for _ in range(count)]
        dialogues.append([_turn(draw, tables, tokenizer, spec, h) for h in heard])
    return World(spec, tables, to_arrays(spec, dialogues, draw), dialogues)


def to_arrays(spec: RolloutConfig, dialogues: list[list[Turn]], draw) -> Dialogues:
    """The sampler's arrays; whatever nobody should look at holds random tokens."""
    batch, turns = len(dialogues), spec.max_turns
    noise = lambda *shape: draw.integers(0, 400, shape).astype(np.int32)  # noqa: E731
    zero = lambda *shape: np.zeros(shape, np.int32)  # noqa: E731
    size = spec.policy_tokens
    tokens, logprob, count = (
        noise(turns, batch, size),
        np.full((turns, batch, size), 7.0, np.float32),
        zero(turns, batch),
    )
    stopped, say, say_count = np.zeros((turns, batch), bool), noise(turns, batch, spec.say_tokens), zero(turns, batch)
    found_at, first, first_count = zero(turns, batch), noise(batch, 12), zero(batch)
    reply, reply_count = noise(turns, 2, batch, spec.user_tokens), zero(turns, 2, batch)
    for b, dialogue in enumerate(dialogues):
        for t, turn in enumerate(dialogue):
            tokens[t, b, : len(turn.completion)], logprob[t, b, : len(turn.completion)] = turn.completion, turn.logprob
            count[t, b], stopped[t, b] = len(turn.completion), turn.stopped
            say[t, b, : len(turn.say)], say_count[t, b] = turn.say, len(turn.say)
            found_at[t, b] = len(turn.completion) - len(turn.say) - turn.stopped - 1
            if t == 0:
                first[b, : len(turn.heard)], first_count[b] = turn.heard, len(turn.heard)
            else:
                reply[t - 1, -1, b, : len(turn.heard)], reply_count[t - 1, -1, b] = turn.heard, len(turn.heard)
    no = lambda *shape: np.zeros(shape, np.float32)  # noqa: E731
    policy = Generated(tokens, count, logprob, no(turns, batch, size), found_at, stopped)
    shape = (turns, 2, batch)
    user = Generated(reply, reply_count, no(*shape, 6), no(*shape, 6), zero(*shape), np.zeros(shape, bool))
    flat = (turns, batch)
    arrays = Dialogues(
        turns=np.array([len(d) for d in dialogues], np.int32),
        end_reason=zero(batch),
        violation=np.zeros(batch, bool),
        emotions=draw.integers(0, 101, (batch, turns + 1)).astype(np.int32),
        first_talk=first,
        first_count=first_count,
        policy=PolicyTurn(policy, say, say_count, np.zeros(flat, bool), zero(*flat)),
        user=UserTurn(user, no(*flat, 21), zero(*flat), zero(*flat), user, np.zeros(flat, bool), zero(*flat)),
        appraised=np.ones(flat, bool),
        prefix_tokens=np.int32(0),
        row_turns=np.int32(batch * turns),
        row_steps=np.int32(batch * turns * size),
    )
    return jax.tree.map(jnp.asarray, arrays)


_pack = jax.jit(build_sequences, static_argnums=(2, 4))


def packed(world: World, length: int = LENGTH) -> PackedBatch:
    return _pack(world.dialogues, world.tables, world.spec, limits_for(world.spec), length)


class PlainRow(NamedTuple):
    """One turn as a row of its own: said[j] is predicted at place start - 1 + j."""

    dialogue: int
    turn: int
    ids: list[int]
    start: int
    completion: list[int]
    states: list[int]


def plain_rows(world: World, tokenizer) -> list[PlainRow]:
    """By concatenating messages, as a chat template would; thoughts of earlier turns are not kept."""
    lists = [np.asarray(x).tolist() for x in (world.tables.system, world.tables.open_user, world.tables.open_assistant)]
    system, open_user, open_assistant = lists
    close, opener = np.asarray(world.tables.close).tolist(), np.asarray(world.tables.think_open).tolist()
    rows, table = [], np.asarray(world.tables.grammar.table)
    for b, dialogue in enumerate(world.turns):
        history = list(system)
        for t, turn in enumerate(dialogue):
            history += open_user + turn.heard + close + open_assistant
            ids = history + opener + turn.completion
            states = [world.tables.grammar.begin]
            for token in turn.completion[:-1]:
                states.append(int(table[states[-1], token]))
            rows.append(PlainRow(b, t, ids, len(ids) - len(turn.completion), turn.completion, states))
            history += turn.say + close
    return rows


def small_lm(tokenizer, seed: int = 3, layers: int = 2, **fields) -> LM:
    config = Qwen2Config(tokenizer.vocab_size + SPARE, 32, 48, layers, num_heads=4, num_kv_heads=2, head_dim=8)
    model = Qwen2(config, **fields)
    return LM(jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, random_params(model, seed)), model)


@pytest.fixture(scope="session", params=["think", "direct"])
def world(request, bpe, prompts) -> World:
    return make_world(bpe, prompts, request.param)
