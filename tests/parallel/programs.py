"""The programs of a training step, compiled from shapes alone, and what their optimized HLO says."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlver_jax.decoding.cache import LM, Cache, append, init_cache, share_rows
from rlver_jax.decoding.generate import Limits, generate
from rlver_jax.decoding.grammar import Grammar
from rlver_jax.learning.advantages import AdvantageConfig
from rlver_jax.learning.loss import LossConfig, TrainedModels
from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.packing import PackingPlan, RowAssignment
from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.learning.train_step import TrainStepConfig, UpdateConfig, compile_step, init_state
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.qwen import Qwen2
from rlver_jax.models.value_head import ValueHead
from rlver_jax.parallel.rules import sharding
from rlver_jax.perf.hlo import COLLECTIVES, Module
from rlver_jax.perf.plan_programs import params_of, placed
from rlver_jax.rollout.ready import sampling_params, sampling_program
from rlver_jax.rollout.rewards import Rewards
from rlver_jax.training.setup import state_shardings

# Sizes that no two axes share, so that a shape in the HLO says what it is.
CONFIG = Qwen2Config(
    vocab_size=2176, hidden_size=320, intermediate_size=704, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=128,
    rope_theta=1e4,
)  # fmt: skip
VOCAB_CHUNK = 136
MODEL = Qwen2(
    CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.float32, remat="full", attention="chunked", attention_chunk=96
)


def whole(mesh: Mesh, shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def rows(mesh: Mesh, shape, dtype) -> jax.ShapeDtypeStruct:
    axes = ("batch", *(None,) * (len(shape) - 1))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(axes, shape, mesh))


def key_of(*shape: int):
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), shape))


def grammar_of(mesh: Mesh) -> Grammar:
    shape = (7, CONFIG.vocab_size)
    return Grammar(whole(mesh, shape, jnp.int16), whole(mesh, shape, jnp.bool_), 3, 5, 6, whole(mesh, (0,), jnp.int32))


def lower_update(
    mesh: Mesh, *, batch: int, length: int, ppo: bool, microbatches: int = 1, model: Qwen2 = MODEL, shared: bool = False
):
    """GRPO; or PPO with a critic of its own, and a KL penalty. With `shared`, rows hold several dialogues each."""
    shards = mesh.shape["tensor"]
    options = LossConfig(kl=0.1 if ppo else 0.0)
    trunk, head = (model, ValueHead()) if ppo else (None, None)
    models = TrainedModels(model, trunk, head, options, vocab_chunk=VOCAB_CHUNK, vocab_shards=shards)
    adam = make_optimizer(
        learning_rate=1e-4, warmup_steps=3, grad_clip=1.0, beta1=0.9, beta2=0.99, weight_decay=0.0,
        moment_dtype="bfloat16",
    )  # fmt: skip
    advantage = AdvantageConfig() if ppo else AdvantageConfig("grpo", group=4)
    setup = TrainStepConfig(
        models, advantage, UpdateConfig(microbatches=microbatches), Optimizers(adam, adam if ppo else None)
    )
    params = params_of(model, mesh)
    value_head = {"kernel": whole(mesh, (CONFIG.hidden_size,), jnp.float32), "bias": whole(mesh, (), jnp.float32)}
    trained = {"policy": params} | ({"critic": {"trunk": params, "head": value_head}} if ppo else {})
    shapes = jax.eval_shape(lambda p: init_state(p, setup.optimizers), trained)
    state = placed(shapes, state_shardings(trained, setup.optimizers, mesh))
    grid = {"mask": jnp.bool_, "logprob": jnp.float32}
    names = ("tokens", "positions", "branch", "mask", "target", "logprob", "state", "turn")
    arrays = {name: rows(mesh, (batch, length), grid.get(name, jnp.int32)) for name in names}
    packed = PackedBatch(count=rows(mesh, (batch,), jnp.int32), **arrays)
    rewards = Rewards(rows(mesh, (batch,), jnp.float32), rows(mesh, (batch, 4), jnp.float32))
    reference, layout = params if ppo else None, layout_of(mesh, batch) if shared else None
    with jax.set_mesh(mesh):
        return compile_step(setup, state).lower(state, packed, rewards, grammar_of(mesh), key_of(), reference, layout)


def layout_of(mesh: Mesh, batch: int) -> PackingPlan:
    """One update of all dialogues."""

    def assignments(*sizes: int) -> RowAssignment:
        return RowAssignment(*(whole(mesh, shape, jnp.int32) for shape in (sizes, sizes, sizes[:-1])))

    return PackingPlan(assignments(batch), assignments(1, batch))


def lower_decode(mesh: Mesh, *, batch: int, capacity: int, dtype=jnp.bfloat16):
    """One generation: the decode loop."""
    model = MODEL.clone(dtype=dtype)
    lm = LM(sampling_params(model, mesh), model)

    def speak(lm: LM, keys, grammar: Grammar, lengths):
        cache = init_cache(lm, batch, capacity).replace(length=lengths)
        limits = Limits(jnp.int32(20), jnp.int32(20))
        return generate(
            lm, cache, keys, grammar, max_tokens=40, limits=limits, temperature=jnp.float32(1),
            active=jnp.ones(batch, bool),
        )  # fmt: skip

    with jax.set_mesh(mesh):
        return jax.jit(speak).lower(lm, key_of(batch), grammar_of(mesh), rows(mesh, (batch,), jnp.int32))


def lower_turns(mesh: Mesh, model: Qwen2, *, batch: int, capacity: int, group: int = 1):
    """Turns of a dialogue, one loop after the other: texts are read in pieces, replies are decoded.

    `group` neighbours share what is read first.
    """
    lm = LM(sampling_params(model, mesh), model)

    def decode(lm: LM, cache: Cache) -> Cache:
        def step(state):
            left, cache = state
            token = lm.logits(cache.hidden).argmax(-1).astype(jnp.int32)
            return left - 1, append(lm, cache, token[:, None], jnp.ones(batch, jnp.int32))

        return jax.lax.while_loop(lambda state: state[0] > 0, step, (cache.length.min(), cache))[1]

    def play(lm: LM, tokens, count):
        def turn(_, cache: Cache) -> Cache:
            for width in (tokens.shape[1] // 2, tokens.shape[1] // 4):
                cache = decode(lm, append(lm, cache, tokens[:, :width], count))
            return cache

        prefix = append(lm, init_cache(lm, batch // group, capacity), tokens[::group], count[::group])
        cache = prefix if group == 1 else share_rows(lm, prefix, group, capacity)
        return jax.lax.fori_loop(0, count.min(), turn, cache).hidden

    with jax.set_mesh(mesh):
        return jax.jit(play).lower(lm, rows(mesh, (batch, 512), jnp.int32), rows(mesh, (batch,), jnp.int32))


class Op(NamedTuple):
    """An instruction of an optimized program, on one device."""

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, sizes) of the results
    inside: bool  # of a loop's body, or of what that calls
    line: str

    @property
    def largest(self) -> int:
        """Elements of the largest result."""
        return max((int(np.prod(dims)) for _, dims in self.shapes), default=0)


CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?([%\w.\-, ]+)\}?")


def operations(text: str) -> list[Op]:
    """All instructions of a compiled program (`compiled.as_text()`)."""
    bodies = Module.parse(text).computations
    called = {name: {c.strip(" %") for op in ops for m in CALLED.finditer(op.rest) for c in m[1].split(",")}
              for name, ops in bodies.items()}  # fmt: skip
    looped = {op.attribute("body") for ops in bodies.values() for op in ops if op.kind == "while"}
    unseen = list(looped)
    while unseen:
        new = called.get(unseen.pop(), set()) - looped
        looped |= new
        unseen += new
    return [
        Op(op.kind, op.shapes, name in looped, f"{op.name} = {op.shapes} {op.kind}({op.rest}")
        for name, ops in bodies.items()
        for op in ops
    ]


def collectives(ops: list[Op]) -> list[Op]:
    return [op for op in ops if op.kind.removesuffix("-start") in COLLECTIVES]


def lower_copy(training: Mesh, sampling: Mesh, model: Qwen2 = MODEL):
    """The policy's way from the training mesh to the sampling mesh."""
    return sampling_program(sampling_params(model, sampling)).lower(params_of(model, training))
