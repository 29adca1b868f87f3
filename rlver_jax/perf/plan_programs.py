"""The programs of a training step on arrays that don't exist: shapes, dtypes and shardings only, on any topology.

Everything is made by the functions that the trainer calls itself (`training.setup.build_learning`); where these would
load or create arrays, `abstract_weights` gives `ShapeDtypeStruct`s.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlver_jax.decoding.cache import LM
from rlver_jax.learning.loss import Base
from rlver_jax.learning.packing import PackingPlan, RowAssignment
from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.learning.train_step import TrainState, TrainStepConfig, compile_step
from rlver_jax.models.families import Qwen2Config, preset
from rlver_jax.models.lora import abstract_adapter, join, same_arrays, split
from rlver_jax.models.peft_files import read_adapter
from rlver_jax.models.qwen import Params, Qwen2, abstract_params
from rlver_jax.parallel import rules
from rlver_jax.parallel.mesh import sampling_mesh
from rlver_jax.rollout.agents import Agents, limits_of, make_model
from rlver_jax.rollout.ready import adapter_program, is_ready, rollout_model, sampling_params, sampling_program
from rlver_jax.rollout.rewards import Rewards
from rlver_jax.rollout.sampler import Dialogues, Profiles, sample_dialogues
from rlver_jax.rollout.spec import RolloutConfig, check_rows
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.training.learners import Weights
from rlver_jax.training.programs import pack_program, row_sharding
from rlver_jax.training.setup import build_learning, dialogues_an_update, rollout_spec, updates_at_most

USERS_ADAPTER = "user's adapter"  # on the policy's base


@dataclasses.dataclass(frozen=True)
class Texts:
    """What shapes depend on beside the config.

    Attributes:
        tokenizer: that the prompts are measured with.
        language: of the prompts.
        prefix, first_talk: widths of the profiles' longest prefix and first utterance, in tokens.
    """

    tokenizer: Tokenizer
    language: str
    prefix: int
    first_talk: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a run holds, as shapes; fields as in `training.setup.Run`."""

    config: ConfigDict
    mesh: Mesh
    agents: Agents
    profiles: Profiles
    state: TrainState
    setup: TrainStepConfig
    lengths: tuple[int, ...]
    reference: Params | None
    base: Base | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a training step.

    Attributes:
        lower: what the trainer calls, lowered for the arguments that it gets.
        arguments: its large arguments, by name.
        idle: trees that stay in memory beside it, by name.
        again: what it takes as two arguments that lie in the same buffers.
    """

    name: str
    lower: Callable[[], Any]
    arguments: dict[str, Any]
    idle: dict[str, Any]
    again: Any = None


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def bytes_per_chip(tree: Any) -> int:
    """Bytes of a tree of shapes on each chip; what has no sharding is whole on each."""
    part = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
    return sum(math.prod(part(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def architecture(config: ConfigDict, name: str, otherwise: ConfigDict | None = None) -> Qwen2Config:
    """Of `config.NAME`: of the folder that it names, else of its size, else that of the model `otherwise`.

    Raises:
        ValueError, OSError: nothing is named, or what is named is not a Qwen2.5 or Qwen3 model, or reads fewer tokens
            than rollout.context.
    """
    for c in (config[name], otherwise):
        if c is not None and (c.get("path") or c.get("size")):
            qwen = Qwen2Config.from_hf(c.path) if c.get("path") else preset(c.size)
            check_rows(qwen, name, config.rollout.context)
            return qwen
    raise ValueError(
        f"{name}.path and {name}.size are empty; set --config.{name}.size to a published size, e.g. 7b or qwen3-8b, or "
        f"--config.{name}.path to a model's folder, of which a plan reads config.json and the tokenizer"
    )


def params_of(model: Qwen2, mesh: Mesh | None) -> Params:
    """A model's parameters as shapes with their shardings; without a mesh they have none."""
    shapes, axes = abstract_params(model)
    return shapes if mesh is None else placed(shapes, rules.tree_shardings(axes, shapes, mesh))


def abstract_weights(config: ConfigDict, tokenizer: Tokenizer) -> Weights:
    """Models and initial values as shapes; models that have neither path nor size are as large as the policy."""

    def load(section: ConfigDict, name: str, mesh: Mesh | None, weights: None = None) -> tuple[LM, Tokenizer]:
        otherwise = config.policy if name in ("critic", "reference") else None
        model = make_model(section, name, architecture(config, name, otherwise))
        return LM(params_of(model, mesh), model), tokenizer

    def make(function: Callable, shardings: Any, *args: Any) -> Any:
        shapes = jax.eval_shape(function, *args)
        one = isinstance(shardings, jax.sharding.Sharding)
        return placed(shapes, jax.tree.map(lambda _: shardings, shapes) if one else shardings)

    return Weights(load, make)


def shapes_of(config: ConfigDict, mesh: Mesh, texts: Texts) -> Shapes:
    """What `training.setup.build_run` makes, as shapes.

    Args:
        mesh: of training.

    Raises:
        ValueError: an array can't be divided over the mesh, or a model is not named.
    """
    playing = sampling_mesh(mesh, config.mesh_sampling)
    agents = abstract_agents(config, texts.tokenizer, texts.language, rollout_spec(config), mesh)
    agents = dataclasses.replace(agents, mesh=playing, tables=_whole(agents.tables, playing))
    weights = abstract_weights(config, texts.tokenizer)
    made = build_learning(config, agents, texts.first_talk, mesh, weights)
    profiles = _whole(_profiles(config, texts), playing)
    return Shapes(config, mesh, agents, profiles, made.state, made.setup, made.lengths, made.reference, made.base)


def abstract_agents(
    config: ConfigDict, tokenizer: Tokenizer, language: str, spec: RolloutConfig, mesh: Mesh | None = None
) -> Agents:
    """Agents whose parameters are shapes, on a mesh or on none, and whose tables are arrays.

    Raises:
        ValueError, OSError: as `architecture`.
    """
    config = config.copy_and_resolve_references()
    config.data.language = language
    playing = None if mesh is None else sampling_mesh(mesh, config.mesh_sampling)

    def adapt(folder: str, model: Qwen2, _: None) -> Params:
        lora = read_adapter(folder, model)[0]
        return adapter_program(model, lora, playing).lower(abstract_adapter(model, lora)[0]).out_info

    return Agents.load(config, spec, rest=mesh, load=abstract_weights(config, tokenizer).load, adapt=adapt)


def _whole(tree: Any, mesh: Mesh | None) -> Any:
    assert mesh is not None, "a plan is for a mesh"
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _profiles(config: ConfigDict, texts: Texts) -> Profiles:
    rows, count = config.rollout.batch, config.rollout.batch // config.rollout.group
    shape: Any = jax.ShapeDtypeStruct
    return Profiles(
        shape((count, texts.prefix), jnp.int32), shape((count,), jnp.int32),
        shape((count, texts.first_talk), jnp.int32), shape((count,), jnp.int32),
        shape((rows,), jnp.uint32), shape((rows,), jnp.bool_),
    )  # fmt: skip


def programs_of(shapes: Shapes) -> list[Program]:
    """The programs of one step, in order; see `training.loop.Trainer.step`."""
    resident = _resident(shapes)
    programs: list[Program] = []
    ready: dict[str, Params] = {}
    copies: dict[str, Params] = {}
    shared = "user" not in resident
    for name in ("policy",) if shared else ("policy", "user"):
        ready[name] = resident[name]
        like = sampling_params(_playing_model(shapes, name), shapes.agents.mesh)
        if not is_ready(resident[name], like):  # otherwise the sampler reads the model itself
            programs.append(_copy(name, like, resident, copies))
            ready[name] = copies[f"{name}'s copy"] = like
    inputs = {name: tree for name, tree in resident.items() if ready.get(name) is tree}
    inputs |= {name: resident[name] for name in ("adapters", USERS_ADAPTER) if name in resident}
    again = ready["policy"] if shared else None
    ready["user"] = ready["policy"] if shared else ready["user"]
    user = {name: resident[name] for name in ("user", USERS_ADAPTER) if name in resident}
    return [
        *programs,
        Program("play", lambda: _lower_play(shapes, ready), inputs | copies, _without(resident, inputs), again),
        Program("pack", lambda: _lower_pack(shapes, ready), {}, resident),
        Program("learn", lambda: _lower_learn(shapes), _without(resident, user), user),
    ]


def _playing_model(shapes: Shapes, name: str) -> Qwen2:
    """The module of policy or user as it plays dialogues of training."""
    model = getattr(shapes.agents, name).model
    return rollout_model(shapes.config, model) if name == "policy" else model


def _without(trees: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: tree for name, tree in trees.items() if name not in names}


def _resident(shapes: Shapes) -> dict[str, Any]:
    """What is there from the beginning of a run to its end, by name."""
    state = shapes.state
    if shapes.base is not None:
        return _resident_with_adapters(shapes, shapes.base)
    trees = {"policy": state.params["policy"], "policy's moments": state.opt_state["policy"]}
    if "critic" in state.params:
        trees |= {"critic": state.params["critic"], "critic's moments": state.opt_state["critic"]}
    if shapes.reference:
        trees["reference"] = shapes.reference
    return trees | {"user": shapes.agents.user.params}


def _resident_with_adapters(shapes: Shapes, base: Base) -> dict[str, Any]:
    """With LoRA: models that share a base are there once, as the policy's."""
    state = shapes.state
    trees = {"policy": base.policy, "adapters": state.params, "adapters' moments": state.opt_state}
    user, adapter = split(shapes.agents.user.params)
    others = {"critic": base.critic, "reference": shapes.reference, "user": user, USERS_ADAPTER: adapter}
    return trees | {name: tree for name, tree in others.items() if tree and not same_arrays(tree, base.policy)}


def _copy(name: str, like: Params, resident: dict[str, Any], made: dict[str, Any]) -> Program:
    """A model's copy for the sampler, beside those made before."""
    lower = lambda: sampling_program(like).lower(resident[name])  # type: ignore[attr-defined]  # noqa: E731
    return Program(f"copy {name}", lower, {name: resident[name]}, _without(resident, [name]) | made)


def _key(mesh: Mesh | None) -> Any:
    return _whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)


def _limits(shapes: Shapes) -> Any:
    agents, temperature = shapes.agents, shapes.config.rollout.temperature
    return _whole(jax.eval_shape(lambda: limits_of(shapes.config, agents.spec, temperature)), agents.mesh)


def _ready(shapes: Shapes, params: dict[str, Params]) -> tuple[LM, LM]:
    """Policy and user as the sampler gets them."""
    agents, policy, lora = shapes.agents, params["policy"], shapes.setup.models.lora
    if lora is not None:
        program = adapter_program(agents.policy.model, lora, agents.mesh)
        policy = join(policy, program.lower(shapes.state.params["policy"]).out_info)
    user = join(params["user"], split(agents.user.params)[1])
    return LM(policy, _playing_model(shapes, "policy")), LM(user, agents.user.model)


def _lower_play(shapes: Shapes, params: dict[str, Params]) -> Any:
    agents = shapes.agents
    args = (agents.tables, shapes.profiles, _key(agents.mesh), _limits(shapes))
    with jax.set_mesh(agents.mesh):
        return sample_dialogues.lower(*_ready(shapes, params), *args, spec=agents.spec)


def _dialogues(shapes: Shapes, params: dict[str, Params]) -> Dialogues:
    """What play returns. Its shardings are the compiler's choice; whole on every chip is the most they take."""
    agents, mesh = shapes.agents, shapes.agents.mesh
    with jax.set_mesh(mesh):
        dialogues = jax.eval_shape(
            lambda *args: sample_dialogues(*args, spec=agents.spec),
            *_ready(shapes, params), agents.tables, shapes.profiles, _key(mesh), _limits(shapes),
        )  # fmt: skip
    return _whole(dialogues, mesh)


def _lower_pack(shapes: Shapes, params: dict[str, Params]) -> Any:
    agents = shapes.agents
    with jax.set_mesh(agents.mesh):
        return pack_program(shapes.mesh).lower(
            _dialogues(shapes, params), agents.tables[0], agents.spec, _limits(shapes), shapes.lengths[-1]
        )


def _lower_learn(shapes: Shapes) -> Any:
    config, mesh, rows = shapes.config, shapes.mesh, shapes.config.rollout.batch

    def array(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=row_sharding(mesh))

    dtypes = {"mask": jnp.bool_, "logprob": jnp.float32}
    names = [field.name for field in dataclasses.fields(PackedBatch) if field.name != "count"]
    arrays = {name: array(dtypes.get(name, jnp.int32), rows, shapes.lengths[-1]) for name in names}
    packed = PackedBatch(count=array(jnp.int32, rows), **arrays)
    rewards = Rewards(array(jnp.float32, rows), array(jnp.float32, rows, config.rollout.max_turns))
    grammar = _whole(shapes.agents.tables[0].grammar, mesh)
    plan = _whole(_packing_plan(config), mesh) if config.train.share_rows else None
    with jax.set_mesh(mesh):
        step = compile_step(shapes.setup, shapes.state)
        arguments = (packed, rewards, grammar, _key(mesh), shapes.reference, plan, shapes.base)
        return step.lower(shapes.state, *arguments)  # type: ignore[attr-defined]


def _packing_plan(config: ConfigDict) -> PackingPlan:
    """Which dialogue lies where is data: any plan has these shapes."""

    def assignment(*sizes: int) -> RowAssignment:
        shape: Any = jax.ShapeDtypeStruct
        return RowAssignment(shape(sizes, jnp.int32), shape(sizes, jnp.int32), shape(sizes[:-1], jnp.int32))

    rows, updates = config.rollout.batch, updates_at_most(config)
    if config.train.turns_per_update:
        members = jax.ShapeDtypeStruct((updates, rows), jnp.bool_)
        return PackingPlan(assignment(rows), assignment(updates, rows), members, jax.ShapeDtypeStruct((), jnp.int32))
    return PackingPlan(assignment(rows), assignment(updates, dialogues_an_update(config)))
