"""A config's fields as flat names, and their validation, each and across one another, before anything is compiled.

Every fault is reported at once; each message names the field, its value, what is allowed, and a remedy.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ml_collections import ConfigDict

from rlver_jax import hub
from rlver_jax.parallel.mesh import AXES, resolve_mesh_shape, resolve_sampling_shape

SIZES = ("", "0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")
CHOICES: dict[str, tuple[str, ...]] = {
    "policy.size": SIZES,
    "user.size": SIZES,
    "critic.size": SIZES,
    "policy.dtype": ("bfloat16", "float32"),
    "policy.param_dtype": ("bfloat16", "float32"),
    "policy.attention": ("dense", "chunked", "splash"),
    "policy.remat": ("none", "dots", "full"),
    "policy.mode": ("think", "direct"),
    "user.dtype": ("bfloat16", "float32"),
    "user.param_dtype": ("bfloat16", "float32", "int8"),
    "user.attention": ("dense", "chunked"),
    "user.style": ("vanilla", "challenging"),
    "user.scenario": ("heart_to_heart", "chit_chat"),
    "user.readout": ("argmax", "sample", "mean"),
    "data.language": ("zh", "en"),
    "reward.kind": ("final", "per_turn", "mixed"),
    "policy.init": ("path", "random"),
    "user.init": ("path", "random"),
    "critic.init": ("path", "random"),
    "critic.dtype": ("bfloat16", "float32"),
    "critic.param_dtype": ("bfloat16", "float32"),
    "critic.attention": ("dense", "chunked", "splash"),
    "critic.remat": ("none", "dots", "full"),
    "critic.kind": ("separate", "shared"),
    "algorithm.estimator": ("gae", "grpo", "rloo", "reinforce_pp"),
    "algorithm.credit": ("dialogue", "turn"),
    "loss.ratio": ("token", "sequence"),
    "loss.normalization": ("token_mean", "dialogue_mean", "dr_grpo"),
    "loss.kl_estimator": ("k1", "k2", "k3"),
    "train.moment_dtype": ("bfloat16", "float32"),
    "eval.gold": ("", "miniature"),
}
# field: (lowest, highest or None, unit)
RANGES: dict[str, tuple[float, float | None, str]] = {
    "policy.attention_chunk": (1, None, "queries"),
    "user.attention_chunk": (1, None, "queries"),
    "user.reply_temperature": (0, None, ""),
    "user.field_tokens": (1, None, "tokens"),
    "user.reply_tokens": (1, None, "tokens"),
    "rollout.batch": (1, None, "dialogues"),
    "rollout.rows": (0, None, "dialogues"),
    "rollout.group": (1, None, "dialogues"),
    "rollout.max_turns": (1, None, "turns"),
    "rollout.context": (1, None, "tokens"),
    "rollout.think_tokens": (16, None, "tokens"),
    "rollout.say_tokens": (1, None, "tokens"),
    "rollout.temperature": (0, None, ""),
    "rollout.top_k": (0, None, "tokens"),
    "rollout.top_p": (0, 1, ""),
    "emotion.initial": (0, 100, "points"),
    "emotion.floor": (-1, 100, "points"),
    "emotion.ceiling": (0, 100, "points"),
    "emotion.max_change": (1, 10, "points"),
    "reward.discount": (0, 1, ""),
    "reward.final_weight": (0, 1, ""),
    "critic.attention_chunk": (1, None, "queries"),
    "critic.learning_rate": (0, None, ""),
    "critic.warmup_steps": (0, None, "steps"),
    "algorithm.gamma": (0, 1, ""),
    "algorithm.lam": (0, 1, ""),
    "algorithm.turn_discount": (0, 1, ""),
    "loss.clip_low": (0, 1, ""),
    "loss.clip_high": (0, None, ""),
    "loss.dual_clip": (0, None, ""),
    "loss.entropy": (0, None, ""),
    "loss.kl": (0, None, ""),
    "loss.value_clip": (0, None, "units of reward"),
    "loss.value_weight": (0, None, ""),
    "loss.importance_cap": (0, None, ""),
    "loss.vocab_chunk": (1, None, "tokens"),
    "train.steps": (1, None, "steps"),
    "train.seed": (0, 2**32 - 1, ""),
    "train.learning_rate": (0, None, ""),
    "train.warmup_steps": (0, None, "updates"),
    "train.grad_clip": (0, None, ""),
    "train.beta1": (0, 1, ""),
    "train.beta2": (0, 1, ""),
    "train.adam_eps": (0, None, ""),
    "train.weight_decay": (0, None, ""),
    "train.epochs": (1, None, "passes"),
    "train.minibatches": (1, None, "updates"),
    "train.microbatches": (1, None, "parts"),
    "train.padding": (0, 1, ""),
    "train.length_buckets": (1, None, "lengths"),
    "checkpoint.every": (1, None, "steps"),
    "checkpoint.keep_last": (1, None, "checkpoints"),
    "checkpoint.keep_best": (0, None, "checkpoints"),
    "log.dialogues_every": (0, None, "steps"),
    "alarms.readable_min": (0, 1, ""),
    "alarms.reply_tokens_min": (0, None, "tokens"),
    "alarms.reply_tokens_max": (0, None, "tokens"),
    "alarms.entropy_min": (0, None, "nats"),
    "alarms.entropy_max": (0, None, "nats"),
    "alarms.ratio_max": (0, None, ""),
    "alarms.kl_max": (0, None, "nats"),
    "eval.every": (0, None, "steps"),
    "eval.num_profiles": (1, None, "profiles"),
    "eval.initial_emotion": (0, 100, "points"),
    "eval.max_turns": (1, None, "turns"),
    "eval.batch": (1, None, "dialogues"),
    "eval.rows": (0, None, "dialogues"),
    "eval.temperature": (0, None, ""),
    "remote.policy.price_in": (0, None, "a million tokens"),
    "remote.policy.price_out": (0, None, "a million tokens"),
    "remote.user.price_in": (0, None, "a million tokens"),
    "remote.user.price_out": (0, None, "a million tokens"),
    "remote.concurrency": (1, None, "requests"),
    "remote.timeout": (0.001, None, "seconds"),
    "remote.deadline": (0.001, None, "seconds"),
    "remote.asks": (1, None, "requests"),
}

# Fields that say where things lie; the hosts of a run may keep the same things in different places.
MODELS = ("policy.path", "user.path", "critic.path", "reference.path")  # folders, or names on the Hugging Face hub
PATHS = (*MODELS, "user.prompts", "data.train", "data.eval", "remote.cache")


class ConfigError(ValueError):
    """A config that cannot be run; the message lists every fault."""


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"a.b": value} of every leaf."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: dict[str, Any], base: ConfigDict) -> ConfigDict:
    """The config that `flatten` flattened, also when it has been through JSON; `base` has the same fields.

    Raises:
        ConfigError: a field that `base` doesn't have, or a value of another type.
    """
    unknown = sorted(set(flat) - set(flatten(base)))
    if unknown:
        raise ConfigError(f"the config is of another version of rlver_jax: {', '.join(unknown)}: unknown field")
    config = base.copy_and_resolve_references()
    try:
        config.update_from_flattened_dict(flat)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config is of another version of rlver_jax: {error}") from error
    return config


def validate(config: ConfigDict, base: ConfigDict, num_devices: int | None = None) -> None:
    """Checks a config against `base` (the documented fields) and its fields against each other.

    Args:
        config: what will run.
        base: `configs/base.py:get_config()`; its leaves are the fields that exist, their types the allowed ones.
        num_devices: of the mesh; None skips what depends on it.

    Raises:
        ConfigError: with one line for every fault.
    """
    values, fields = flatten(config), flatten(base)
    faults = list(_names_and_types(values, fields))
    if not faults:  # the other checks may rely on names and types
        faults += list(_choices_and_ranges(values))
        faults += list(_emotion(values))
        faults += list(_lengths(values))
        faults += list(_learning(values))
        faults += list(_mesh(values, num_devices))
        faults += list(_paths(values))
        faults += list(_remote(values))
    if faults:
        raise ConfigError("the config cannot be run:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _names_and_types(values: dict[str, Any], fields: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1, 0.5)
            hint = f"did you mean {close[0]}?" if close else "see configs/base.py for all fields"
            yield f"{name}={value!r}: unknown field; {hint}"
            continue
        wanted = type(fields[name])
        whole = wanted is float and isinstance(value, int) and not isinstance(value, bool)
        if type(value) is not wanted and not whole:
            yield f"{name}={value!r}: is {type(value).__name__}, expected {wanted.__name__} as in configs/base.py"
    for name in fields:
        if name not in values:
            yield f"{name}: missing; start from configs/base.py:get_config(), which has it as {fields[name]!r}"


def _choices_and_ranges(values: dict[str, Any]) -> Iterator[str]:
    for name, allowed in CHOICES.items():
        if values[name] not in allowed:
            close = difflib.get_close_matches(values[name], allowed, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            yield f"{name}={values[name]!r}: expected one of {', '.join(allowed)}{hint}"
    for name, (low, high, unit) in RANGES.items():
        if not low <= values[name] <= (float("inf") if high is None else high):
            allowed_range = f"at least {low}" if high is None else f"{low} to {high}"
            yield f"{name}={values[name]!r}: expected {allowed_range} {unit}".rstrip()


def _emotion(values: dict[str, Any]) -> Iterator[str]:
    thresholds = tuple(values["emotion.thresholds"])
    if len(thresholds) != 4 or list(thresholds) != sorted(set(thresholds), reverse=True):
        yield (
            f"emotion.thresholds={thresholds}: expected four falling numbers, the lower bounds of bands S, A, B, C; "
            f"SAGE's are (100, 70, 40, 10)"
        )
    floor, ceiling = values["emotion.floor"], values["emotion.ceiling"]
    for name in ("emotion.initial", "eval.initial_emotion"):
        if not floor < values[name] < ceiling:
            yield (
                f"{name}={values[name]}: must lie above emotion.floor={floor} and below emotion.ceiling={ceiling}, or "
                f"every dialogue ends before its first turn; choose e.g. {(max(floor, 0) + min(ceiling, 100)) // 2}"
            )


def _lengths(values: dict[str, Any]) -> Iterator[str]:
    context, say = values["rollout.context"], values["rollout.say_tokens"]
    think = values["rollout.think_tokens"] if values["policy.mode"] == "think" else 0
    reply = values["user.reply_tokens"]
    for name in ("rollout.max_turns", "eval.max_turns"):
        # History keeps says and replies; one thought at a time lies on top of it.
        least = values[name] * (say + reply) + think
        if least > context:
            fits = max((context - think) // values[name] - reply, 0)
            yield (
                f"rollout.context={context}: {name}={values[name]} turns of rollout.say_tokens={say} and "
                f"user.reply_tokens={reply} and one thought of {think} may need {least} tokens before any profile; "
                f"raise rollout.context or lower rollout.say_tokens below {fits}"
            )


def _learning(values: dict[str, Any]) -> Iterator[str]:
    estimator, group, batch = values["algorithm.estimator"], values["rollout.group"], values["rollout.batch"]
    if estimator in ("grpo", "rloo") and group < 2:
        yield (
            f"algorithm.estimator={estimator!r} compares dialogues of one profile, but rollout.group={group}; raise "
            f"rollout.group (RLVER: 4 with GRPO), or use gae or reinforce_pp"
        )
    parts = values["train.minibatches"] * values["train.microbatches"]
    if batch % parts:
        yield (
            f"rollout.batch={batch}: must be a multiple of train.minibatches x train.microbatches = {parts}; choose "
            f"{-(-batch // parts) * parts}, or fewer parts"
        )
    if values["loss.importance_cap"] and not values["loss.recompute"]:
        yield "loss.importance_cap weighs the trainer's log-probs against the sampler's: set loss.recompute as well"
    if 0 < values["loss.dual_clip"] <= 1:
        yield f"loss.dual_clip={values['loss.dual_clip']}: expected above 1, e.g. 3, or 0 for none"
    if 0 < values["alarms.ratio_max"] <= 1:
        yield f"alarms.ratio_max={values['alarms.ratio_max']}: every ratio is above; expected e.g. 100, or 0 for none"


def _mesh(values: dict[str, Any], num_devices: int | None) -> Iterator[str]:
    batch, group = values["rollout.batch"], values["rollout.group"]
    if batch % group:
        yield (
            f"rollout.batch={batch}: must be a multiple of rollout.group={group} (profiles x group); "
            f"choose {max(batch // group, 1) * group}"
        )
    if num_devices is None:
        return
    mesh, sampling = ({axis: values[f"{name}.{axis}"] for axis in AXES} for name in ("mesh", "mesh_sampling"))
    try:
        training_shape = resolve_mesh_shape(**mesh, num_devices=num_devices)
        sampling_shape = resolve_sampling_shape(sampling, training_shape)
    except ValueError as error:
        yield str(error)
        return
    checks = [("rollout.batch", "mesh", training_shape)]
    if sampling_shape != training_shape:
        checks.append(("rollout.batch", "mesh_sampling", sampling_shape))
    played_on = checks[-1][1]
    checks += [(field, played_on, sampling_shape) for field in ("rollout.rows", "eval.batch", "eval.rows")]
    parts = values["train.minibatches"] * values["train.microbatches"]
    rows = training_shape[0] * training_shape[1]
    if not batch % parts and not batch % rows and batch // parts % rows:
        yield (
            f"train.minibatches x train.microbatches = {parts}: leaves {batch // parts} of rollout.batch={batch} "
            f"dialogues for mesh.replica x mesh.fsdp = {rows} devices at a time, which can't share them evenly; choose "
            f"fewer parts, a larger mesh.tensor, or rollout.batch={parts * rows}"
        )
    for field, name, shape in checks:
        rows = shape[0] * shape[1]
        if values[field] % rows:
            yield (
                f"{field}={values[field]}: must be a multiple of {name}.replica x {name}.fsdp = {rows}, which split "
                f"the batch; choose {-(-values[field] // rows) * rows}, or a larger {name}.tensor"
            )


def _paths(values: dict[str, Any]) -> Iterator[str]:
    for name in MODELS:
        if values[name] and (fault := hub.fault(values[name])):
            yield f"{name}={values[name]!r}: {fault}"
    if values["user.prompts"] and not Path(values["user.prompts"]).is_dir():
        yield f"user.prompts={values['user.prompts']!r}: no such folder"
    for name in ("data.train", "data.eval"):
        for file in profile_files(values[name]):
            if not Path(file).is_file():
                yield f"{name}={values[name]!r}: {file} is not a file; expected JSONL profiles, comma-separated"


def _remote(values: dict[str, Any]) -> Iterator[str]:
    for side in ("policy", "user"):
        url, model, extra = (values[f"remote.{side}.{name}"] for name in ("url", "model", "extra"))
        if not url:
            continue
        name = f"remote.{side}.url"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"{name}={url!r}: expected the base address of a server, such as http://127.0.0.1:8000/v1"
        elif parts.username or parts.password or parts.query:
            # Not repeated here, since it may hold a secret.
            yield f"{name}: holds a user, a password or a query; name an API key's variable in remote.{side}.key_env"
        if not model:
            yield f"remote.{side}.model is empty; set it to the model's name at {parts.hostname}"
        if extra and not _is_object(extra):
            yield f"remote.{side}.extra={extra!r}: expected a JSON object of fields for each request, or nothing"
        if side == "policy" and values["rollout.top_k"]:
            yield "rollout.top_k: the protocol of remote.policy.url has none; set it to 0, or use remote.policy.extra"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def endpoint_sides(config: ConfigDict) -> list[str]:
    """Which of "policy" and "user" are behind an endpoint."""
    return [side for side in ("policy", "user") if config.remote[side].url]


def check_training(config: ConfigDict) -> None:
    """What only training needs, of a valid config.

    Raises:
        ConfigError: with one line for every fault.
    """
    values = flatten(config)
    faults = []
    if not values["data.train"]:
        faults.append("data.train is empty; set --config.data.train to a JSONL file of profiles")
    faults += [
        f"remote.{side}.url={values[f'remote.{side}.url']!r}: training needs both models on the device; endpoints are "
        f"for evaluate"
        for side in endpoint_sides(config)
    ]
    if not values["rollout.temperature"]:
        faults.append("rollout.temperature=0: greedy replies have no log-probs to learn from; RLVER's is 1")
    if (values["rollout.top_k"] or values["rollout.top_p"] < 1) and not values["loss.recompute"]:
        faults.append(
            f"rollout.top_k={values['rollout.top_k']}, rollout.top_p={values['rollout.top_p']}: the sampler's "
            f"log-probs are then of another distribution than the trainer's; set loss.recompute"
        )
    if faults:
        raise ConfigError("the config cannot be trained with:\n" + "\n".join(f"  - {fault}" for fault in faults))


def profile_files(*fields: str) -> list[str]:
    """The files that comma-separated fields such as `data.train` name, in order."""
    return [file for field in fields for file in field.split(",") if file]


def reward_settings(config: ConfigDict) -> dict[str, Any]:
    """The config's reward as keywords of `rewards.reward`, whose `weight` is that of the per-turn changes."""
    c = config.reward
    return {"name": c.kind, "gamma": c.discount, "weight": 1.0 - c.final_weight}
