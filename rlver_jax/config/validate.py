"""A config's fields as flat names, and their validation, each and across one another, before anything is compiled.

Every fault is reported at once; each message names the field, its value, what is allowed, and a remedy.
"""

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlver_jax.config import hub, paths
from rlver_jax.config.credentials import without_credentials
from rlver_jax.config.datasets import DEFAULT_SPLITS, DatasetSpecError, is_dataset, locate, profile_files
from rlver_jax.config.endpoint_values import is_address, object_fault
from rlver_jax.config.fields import FIELDS, PATHS, get_config
from rlver_jax.config.lora_fields import CONFIG_FILE, rounding_faults, target_faults
from rlver_jax.parallel.mesh import ATTENTION_DATA, AXES, resolve_mesh_shape, resolve_sampling_shape

MODELS = ("policy", "user", "critic", "reference")  # that a `path` names: a folder, or a name on the Hugging Face hub
PLAYED = ("rollout", "eval")  # sections of dialogues with limits of their own
SHOWN = 5  # faults of a config that was not given by hand
INT32, FLOAT32 = 2**31 - 1, 3.4028235e38  # the largest of each


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


def unflatten(flat: dict[str, Any]) -> ConfigDict:
    """The config that `flatten` flattened, also when it has been through JSON.

    Fields that `flat` lacks have their defaults. Paths are not looked at.

    Raises:
        ConfigError: a field that doesn't exist, or a value that it can't have.
    """
    values = _defaults() | {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}
    faults = list(_names_and_types(values))
    if not faults:
        faults = [*dict(_choices_and_ranges(values)).values(), *_emotion(values)]
    if faults:
        raise ConfigError(f"the config is of another version of rlver_jax, or no config: {'; '.join(faults[:SHOWN])}")
    config = get_config()
    config.update_from_flattened_dict(values)
    return config


def validate(
    config: ConfigDict,
    num_devices: int | None = None,
    needs: Sequence[str] = MODELS,
    plays: Sequence[str] = PLAYED,
) -> None:
    """Checks each field of a config against the table of `config.fields`, and fields against each other.

    Args:
        config: what will run.
        num_devices: of the mesh; None skips what depends on it.
        needs: models that will be loaded; the folders of others may be gone.
        plays: sections whose dialogues are played; none skips all that limits and batches of rollouts can get wrong.

    Raises:
        ConfigError: with one line for every fault.
    """
    values = flatten(config)
    faults = list(_names_and_types(values))
    if not faults:  # the other checks may rely on names and types
        alone = dict(_choices_and_ranges(values))
        # Fields beyond their ranges are left out of the checks across fields, which may divide by them.
        sound = values | {name: FIELDS[name].default for name in alone}
        across = [*_emotion(sound), *_mesh(sound, num_devices)]
        across += [*_lengths(sound, plays), *_learning(sound)] if plays else []
        across += [*_local(sound)] or [*_paths(sound, needs)]
        across += [*_remote(sound), *target_faults(sound)]
        faults = [*alone.values(), *(fault for fault in across if not any(name in fault for name in alone))]
    if faults:
        raise ConfigError("the config cannot be run:\n" + "\n".join(f"  - {fault}" for fault in faults))


def unknown_field(name: str) -> str:
    """What to say of a field, or a part of a config, that doesn't exist."""
    close = difflib.get_close_matches(name, FIELDS, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown field; {hint}configs/base.py has all fields"


def _defaults() -> dict[str, Any]:
    return {name: field.default for name, field in FIELDS.items()}


def _names_and_types(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if name not in FIELDS:
            yield f"{name}={shown(value)}: {unknown_field(name)}"
            continue
        wanted = type(FIELDS[name].default)
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            yield f"{name}={shown(value)}: is {type(value).__name__}, expected {wanted.__name__} as in configs/base.py"
    missing = [name for name in FIELDS if name not in values]
    for name in missing[:SHOWN]:
        yield f"{name}: missing; start from configs/base.py:get_config(), which has it as {FIELDS[name].default!r}"
    if missing[SHOWN:]:
        yield f"{missing[SHOWN]} and {len(missing) - SHOWN - 1} more: missing as well"


def shown(value: Any) -> str:
    """A value as a message holds it: cut short where it is long, without passwords of addresses."""
    return shortened(without_credentials(repr(value)))


def shortened(text: str, most: int = 300) -> str:
    """A text without its middle, where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _choices_and_ranges(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, fault) of each field that is wrong by itself."""
    for name, value in values.items():
        if (choices := FIELDS[name].choices) and (fault := choice_fault(name, value, choices)):
            yield name, fault
        if isinstance(value, int | float) and (expected := _beyond(name, value)):
            yield name, f"{name}={shown(value)}: expected {expected}"


def choice_fault(name: str, value: str, choices: Iterable[str]) -> str:
    """What is wrong with a field that holds a name of several; empty: nothing."""
    names = list(choices)
    if value in names:
        return ""
    close = difflib.get_close_matches(value, names, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name}={shown(value)}: expected one of {', '.join(names)}{hint}"


def _beyond(name: str, value: float) -> str:
    """What a number should be instead; empty where it is that. It is computed with as an int32 or a float32."""
    (low, high), unit = FIELDS[name].range, FIELDS[name].unit
    most = INT32 if isinstance(value, int) else FLOAT32
    if (-most if low is None else low) <= value <= (most if high is None else high):
        return ""
    if low is not None and high is not None:
        wanted = f"{low} to {high}"
    else:
        wanted = " and ".join([f"at least {low}"] * (low is not None) + [f"at most {most}"] * (not value <= most))
    return f"{wanted} {unit}".rstrip()


def _emotion(values: dict[str, Any]) -> Iterator[str]:
    thresholds = tuple(values["emotion.thresholds"])
    whole = len(thresholds) == 4 and all(type(border) is int for border in thresholds)
    if not whole or any(high <= low for high, low in itertools.pairwise((101, *thresholds, 0))):
        yield (
            f"emotion.thresholds={shown(thresholds)}: expected four falling whole numbers of 1 to 100, the lower "
            f"bounds of bands S, A, B, C; SAGE's are (100, 70, 40, 10)"
        )
    floor, ceiling = values["emotion.floor"], values["emotion.ceiling"]
    for name in ("emotion.initial", "eval.initial_emotion"):
        if not floor < values[name] < ceiling:
            yield (
                f"{name}={values[name]}: must lie above emotion.floor={floor} and below emotion.ceiling={ceiling}, or "
                f"every dialogue ends before its first turn; choose e.g. {(max(floor, 0) + min(ceiling, 100)) // 2}"
            )


def _lengths(values: dict[str, Any], plays: Sequence[str]) -> Iterator[str]:
    context, say = values["rollout.context"], values["rollout.say_tokens"]
    think = values["rollout.think_tokens"] if values["policy.mode"] == "think" else 0
    reply = values["user.reply_tokens"]
    for name in (f"{section}.max_turns" for section in plays):
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
    batch, group = values["rollout.batch"], values["rollout.group"]
    if batch % group:
        yield (
            f"rollout.batch={batch}: must be a multiple of rollout.group={group} (profiles x group); "
            f"choose {max(batch // group, 1) * group}"
        )
    parts = values["train.minibatches"] * values["train.microbatches"]
    if batch % parts:
        yield (
            f"rollout.batch={batch}: must be a multiple of train.minibatches x train.microbatches = {parts}; choose "
            f"{-(-batch // parts) * parts}, or fewer parts"
        )
    if values["train.turns_per_update"] and (parts > 1 or not values["train.share_rows"]):
        yield (
            f"train.turns_per_update={values['train.turns_per_update']}: says how a batch is cut into updates; set "
            f"train.minibatches and train.microbatches to 1, and train.share_rows"
        )
    if values["loss.importance_cap"] and not values["loss.recompute"]:
        yield (
            f"loss.importance_cap={values['loss.importance_cap']}: weighs the trainer's log-probs against the "
            f"sampler's; set loss.recompute as well"
        )
    if 0 < values["loss.dual_clip"] <= 1:
        yield f"loss.dual_clip={values['loss.dual_clip']}: expected above 1, e.g. 3, or 0 for none"
    if 0 < values["alarms.ratio_max"] <= 1:
        yield f"alarms.ratio_max={values['alarms.ratio_max']}: every ratio is above; expected e.g. 100, or 0 for none"


def _mesh(values: dict[str, Any], num_devices: int | None) -> Iterator[str]:
    if num_devices is None:
        return
    batch = values["rollout.batch"]
    mesh = {axis: values[f"mesh.{axis}"] for axis in AXES}
    sampling = {axis: values[f"mesh_sampling.{axis}"] for axis in (*AXES, ATTENTION_DATA)}
    try:
        training_shape = resolve_mesh_shape(**mesh, num_devices=num_devices)
        sampling_shape = resolve_sampling_shape(sampling, training_shape)
    except ValueError as error:
        yield str(error)
        return
    checks: list[tuple[str, str, tuple[int, ...]]] = [("rollout.batch", "mesh", training_shape[:2])]
    if sampling_shape != (*training_shape[:2], 1, training_shape[2]):
        checks.append(("rollout.batch", "mesh_sampling", sampling_shape[:3]))
    played_on = checks[-1][1:]
    checks += [(field, *played_on) for field in ("rollout.rows", "eval.batch", "eval.rows")]
    parts = values["train.minibatches"] * values["train.microbatches"]
    rows = training_shape[0] * training_shape[1]
    if not batch % parts and not batch % rows and batch // parts % rows:
        yield (
            f"train.minibatches x train.microbatches = {parts}: leaves {batch // parts} of rollout.batch={batch} "
            f"dialogues for mesh.replica x mesh.fsdp = {rows} devices at a time, which can't share them evenly; choose "
            f"fewer parts, a larger mesh.tensor, or rollout.batch={parts * rows}"
        )
    for field, name, shape in checks:
        rows, axes = math.prod(shape), f"{name}.replica x {name}.fsdp"
        if values[field] % rows:
            axes += f" x {name}.{ATTENTION_DATA}" if math.prod(shape[2:]) > 1 else ""
            yield (
                f"{field}={values[field]}: must be a multiple of {axes} = {rows}, which split the batch; choose "
                f"{-(-values[field] // rows) * rows}, or a larger {name}.tensor"
            )


def _local(values: dict[str, Any]) -> Iterator[str]:
    for name in PATHS:
        for path in values[name].split(","):
            if fault := paths.fault(path):
                yield f"{name}={shown(values[name])}: {fault}"


def _paths(values: dict[str, Any], needs: Sequence[str]) -> Iterator[str]:
    for name in (f"{model}.path" for model in needs):
        if values[name] and (fault := hub.fault(values[name])):
            yield f"{name}={shown(values[name])}: {fault}"
    for name in (f"{model}.adapter" for model in needs if f"{model}.adapter" in values):
        if values[name] and not _is(Path.is_file, f"{values[name]}/{CONFIG_FILE}"):
            yield f"{name}={shown(values[name])}: no folder with {CONFIG_FILE}; expected one that peft has saved"
    if values["user.prompts"] and not is_folder(values["user.prompts"]):
        close = paths.nearest(values["user.prompts"], Path.is_dir)
        hint = f"did you mean {close}?" if close else "expected a folder with prompts of your own (docs/profiles.md)"
        yield f"user.prompts={shown(values['user.prompts'])}: no such folder; {hint}"
    elif values["user.prompts"] and "user" in needs and paths.sage_folder(values["user.prompts"]):
        yield from _sage(values)
    for name, split in DEFAULT_SPLITS.items():
        if is_dataset(values[name]):
            try:
                locate(values[name], values["data.dir"], split)
            except DatasetSpecError as error:
                yield f"{name}={shown(values[name])}: {error}"
            continue
        yield from _files(name, values[name], "JSONL profiles, comma-separated, or a data set")
    yield from _files("sft.data", values["sft.data"], "dialogues, of ours, SAGE's or RLVER's, comma-separated")


def _files(name: str, value: str, expected: str) -> Iterator[str]:
    for file in profile_files(value):
        if not _is(Path.is_file, file):
            close = paths.nearest(file)
            hint = f"did you mean {close}?" if close else f"expected {expected}"
            yield f"{name}={shown(value)}: {shortened(file)} is not a file; {hint}"


def _sage(values: dict[str, Any]) -> Iterator[str]:
    """What SAGE's own prompts can't do."""
    clone = f"user.prompts={shown(values['user.prompts'])} is a clone of SAGE's repository"
    if not values["remote.user.url"]:
        yield (
            f"{clone}, whose user answers in free text to prompts that hold the whole dialogue each time; guided "
            f"scripts on the device can't be that user: set remote.user.url, or leave the clone out"
        )
    for name, only in (("user.style", "vanilla"), ("user.scenario", "heart_to_heart")):
        if values[name] != only:
            yield f"{name}={values[name]!r}: {clone}, which has {only} alone; set that, or leave the clone out"


def is_folder(path: str) -> bool:
    """Whether there is a folder; also of a name that the system refuses, too long or with a null."""
    return bool(path) and _is(Path.is_dir, path)


def _is(kind: Callable[[Path], bool], path: str) -> bool:
    try:
        return kind(Path(path))
    except (OSError, ValueError):
        return False


def _remote(values: dict[str, Any]) -> Iterator[str]:
    for side in ("policy", "user"):
        url, model, extra = (values[f"remote.{side}.{name}"] for name in ("url", "model", "extra"))
        if not url:
            continue
        name = f"remote.{side}.url"
        if set("@?#") & set(url):
            # Not repeated here, since it may hold a secret.
            yield f"{name}: holds a user, a password or a query; name an API key's variable in remote.{side}.key_env"
        elif not is_address(url):
            yield f"{name}={shown(url)}: expected the base address of a server, such as http://127.0.0.1:8000/v1"
        if not model:
            yield f"remote.{side}.model is empty; set it to the model's name at the endpoint"
        if extra and (fault := object_fault(extra)):
            # Nor this.
            yield f"remote.{side}.extra: {fault}; expected a JSON object of fields for each request, or nothing"
        if side == "policy" and values["rollout.top_k"]:
            yield "rollout.top_k: the protocol of remote.policy.url has none; set it to 0, or use remote.policy.extra"


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
    if values["remote.policy.url"]:
        faults.append(
            f"remote.policy.url={shown(values['remote.policy.url'])}: training needs the policy on the device; leave "
            f"it out (remote.user.url may be an endpoint)"
        )
    if values["remote.budget"] and not (values["remote.user.price_in"] or values["remote.user.price_out"]):
        faults.append(
            f"remote.budget={values['remote.budget']}: nothing costs anything; set --config.remote.user.price_in and "
            f"price_out, of a million tokens each"
        )
    faults += rounding_faults(values)
    if values["rollout.overlap"]:
        faults += _overlap(values)
    if not values["rollout.temperature"]:
        faults.append("rollout.temperature=0: greedy replies have no log-probs to learn from; RLVER's is 1")
    if (values["rollout.top_k"] or values["rollout.top_p"] < 1) and not values["loss.recompute"]:
        faults.append(
            f"rollout.top_k={values['rollout.top_k']}, rollout.top_p={values['rollout.top_p']}: the sampler's "
            f"log-probs are then of another distribution than the trainer's; set loss.recompute"
        )
    if faults:
        raise ConfigError("the config cannot be trained with:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _overlap(values: dict[str, Any]) -> Iterator[str]:
    if not values["remote.user.url"]:
        yield (
            "rollout.overlap=1: nothing is waited for with a user on the device; set it to 0, or name the user's "
            "endpoint in remote.user.url"
        )
    if not (values["loss.recompute"] and values["loss.importance_cap"]):
        yield (
            "rollout.overlap=1: batches are one step off-policy; set loss.recompute=True and loss.importance_cap, "
            "e.g. 2, which correct that"
        )


def reward_settings(config: ConfigDict) -> dict[str, Any]:
    """The config's reward as keywords of `rewards.reward`, whose `weight` is that of the per-turn changes."""
    c = config.reward
    return {"name": c.kind, "gamma": c.discount, "weight": 1.0 - c.final_weight}
