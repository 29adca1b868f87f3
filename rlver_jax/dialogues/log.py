"""Dialogues as JSON lines: complete enough to recompute every reward, plain enough to read.

One dialogue a line. `emotions` begins with the initial one. `messages` opens with the user's first words; then each
turn is the policy's message and, unless it broke the think format, the user's reaction: its appraisal, the change with
the unnormalized log-probabilities of all 21 options, what it considered, and its reply (content null, and all fields of
the reply script empty, where the dialogue ended before one). `tokens` are ids of the very tokens that were sampled: of
the policy with the stop token, of the user's reply without it (`all_tokens`: with it). `logprobs` belong to the
distribution really sampled (0 for greedy), `raw_logprobs` to the model itself.

Floats have the fewest digits that read back as the same float32.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from rlver_jax.decoding.generate import Generated
from rlver_jax.dialogues.lines import each_line
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.end_reason import END_REASONS
from rlver_jax.rollout.rewards import reward as compute_reward
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.runs.files import json_line
from rlver_jax.text.automaton import THINK_CLOSE
from rlver_jax.text.tokenizer import Tokenizer

Record = dict[str, Any]  # of one dialogue, as on its line
UNREADABLE = "unreadable"  # end reason: an endpoint's answer couldn't be read, however often it was asked for
UNANSWERED = "unanswered"  # end reason in training: an endpoint gave no answer, so that nothing is learned from it
ALL_END_REASONS = (*END_REASONS, UNREADABLE)

# What a reaction holds by field of the two scripts.
SCRIPT_FIELDS = tuple(
    f"{script}_{what}" for script in ("appraisal", "consideration") for what in ("tokens", "stopped", "logprobs")
)
# What only a model on the device has in its message, null of others.
TOKEN_FIELDS = ("tokens", "logprobs", "raw_logprobs")
REACTION_FIELDS = ("tokens", "all_tokens", "logprobs", "raw_logprobs", "change_logprobs", "stopped", *SCRIPT_FIELDS)
_NUMBER, _TEXT, _NO = (int, float), (str,), (type(None),)
# What a line must hold. Null where SAGE's files have nothing (`sage`).
_RECORD: dict[str, tuple[type, ...]] = {
    "dialogue": (int,),
    "profile": _TEXT,
    "seed": (int, *_NO),
    "mode": _TEXT,
    "language": _TEXT + _NO,
    "style": _TEXT + _NO,
    "scenario": _TEXT + _NO,
    "readout": _TEXT + _NO,
    "initial_emotion": (int,),
    "hidden_intention": _TEXT,
    "end_reason": _TEXT,
    "turns": (int,),
    "violation": (bool,),
    "reward": _NUMBER,
    "emotion": (int,),
    "emotions": (list,),
    "messages": (list,),
}
_OPENING: dict[str, tuple[type, ...]] = {
    "content": _TEXT,
    "tokens": (list, *_NO),
    "emotion": (int,),
    "generated": (bool, *_NO),
}
_ASSISTANT: dict[str, tuple[type, ...]] = {
    "thought": _TEXT + _NO,
    "content": _TEXT,
    "violation": (bool,),
    "stopped": (bool, *_NO),
} | dict.fromkeys(("tokens", "say_tokens", "logprobs", "raw_logprobs"), (list, *_NO))
_REACTION: dict[str, tuple[type, ...]] = (
    {"content": _TEXT + _NO, "stopped": (bool, *_NO), "change": (int,), "emotion": (int,)}
    | dict.fromkeys(("appraisal", "considerations"), (dict,))
    | dict.fromkeys(("tokens", "all_tokens", "logprobs", "raw_logprobs", "change_logprobs"), (list, *_NO))
    | dict.fromkeys(SCRIPT_FIELDS, (dict, *_NO))
)


REMEDY = "restore the line, or remove it to go on without this dialogue"


class DialogueLogError(ValueError):
    """A log that cannot be used; the message names file, line and what to do."""


class Turns(Protocol):
    """The part of `Dialogues` that is logged; arrays on the host, with [T, B] in front."""

    @property
    def policy(self) -> Any:
        """A `PolicyTurn`."""

    @property
    def user(self) -> Any:
        """A `UserTurn`."""


class _Generation(NamedTuple):
    """One generation of one row, on the host."""

    tokens: list[int]
    length: int  # of the text: without a last token that only ends it
    stopped: bool
    logprobs: list[float]
    raw: list[float]


def dialogue_records(
    dialogues: Dialogues,
    agents: Agents,
    profiles: Sequence[Profile],
    dialogue_ids: Sequence[int],
    *,
    seed: int,
    rewards: np.ndarray,
) -> list[Record]:
    """Records of a batch, in its order, without the rows that only pad it.

    Args:
        dialogues: of `Agents.play`, on the device or the host.
        profiles: that were played, each for `agents.spec.group` dialogues.
        dialogue_ids: one for each dialogue, as given to `Agents.encode`.
        seed: of the key that they were played with.
        rewards: float32 [B], on the host: see `rewards_of`. Nothing here runs on the device, which may be busy for
            minutes with the next batch.

    Raises:
        ValueError: another number of ids than profiles and groups make.
    """
    group = agents.spec.group
    if len(dialogue_ids) != len(profiles) * group:
        raise ValueError(f"{len(dialogue_ids)} dialogue ids for {len(profiles)} profiles in groups of {group}")
    log: Dialogues = jax.device_get(dialogues)
    return [
        _record(log, agents, profiles[row // group], row, dialogue=int(number), seed=seed, reward=rewards[row])
        for row, number in enumerate(dialogue_ids)
    ]


def rewards_of(dialogues: Dialogues, reward: Mapping[str, Any]) -> np.ndarray:
    """float32 [B] of finished dialogues; `reward` holds `name`, `gamma` and `weight`, see `config.reward_settings`."""
    d = dialogues
    return np.asarray(compute_reward(emotions=d.emotions, n_turns=d.turns, violation=d.violation, **reward).reward)


def _record(log: Dialogues, agents: Agents, profile: Profile, row: int, **settings: Any) -> Record:
    turns = int(log.turns[row])
    emotions = log.emotions[row, : turns + 1].tolist()
    return {
        "dialogue": settings["dialogue"],
        "profile": profile.id,
        "seed": settings["seed"],
        "mode": agents.spec.mode,
        "language": agents.prompts.language,
        "style": agents.style,
        "scenario": agents.scenario,
        "readout": agents.spec.readout,
        "initial_emotion": emotions[0],
        "hidden_intention": profile.hidden_intention,
        "end_reason": END_REASONS[int(log.end_reason[row])],
        "turns": turns,
        "violation": bool(log.violation[row]),
        "reward": _floats([settings["reward"]])[0],
        "emotion": emotions[-1],
        "emotions": emotions,
        "messages": list(_messages(log, agents, profile, row)),
    }


def _messages(log: Dialogues, agents: Agents, profile: Profile, row: int) -> Iterator[Record]:
    decode = agents.tokenizer.decode
    first = log.first_talk[row, : int(log.first_count[row])].tolist()
    emotion, generated = int(log.emotions[row, 0]), not profile.first_talk
    yield {"role": "user", "content": decode(first), "tokens": first, "emotion": emotion, "generated": generated}
    for turn in range(int(log.turns[row])):
        yield policy_message(log, agents, turn, row)
        if log.appraised[turn, row]:
            yield user_message(log, agents, turn, row)


def policy_message(log: Turns, agents: Agents, turn: int, row: int) -> Record:
    """A reply of the policy as in a record."""
    generation = _generation(log.policy.completion, turn, row)
    say = log.policy.say[turn, row, : int(log.policy.say_count[turn, row])].tolist()
    think = agents.spec.mode == "think"
    return {
        "role": "assistant",
        "thought": thought_of(agents.tokenizer, generation.tokens[: generation.length]) if think else None,
        "content": agents.tokenizer.decode(say),
        "tokens": generation.tokens,
        "say_tokens": say,
        "logprobs": generation.logprobs,
        "raw_logprobs": generation.raw,
        "stopped": generation.stopped,
        "violation": bool(log.policy.violation[turn, row]),
    }


def thought_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """What was thought: the text before the first `</think>` (all of it where there is none), trimmed."""
    return tokenizer.decode(tokens).partition(THINK_CLOSE.decode())[0].strip()


def user_message(log: Turns, agents: Agents, turn: int, row: int) -> Record:
    """A reaction of the user as in a record."""
    tables, reaction, decode = agents.tables[1], log.user, agents.tokenizer.decode

    def fields(names: Sequence[str], generated: Generated) -> dict[str, _Generation]:
        return {name: _generation(generated, turn, index, row) for index, name in enumerate(names)}

    appraisal = fields(tables.appraisal.names[:-1], reaction.appraisal)  # the last one is the choice
    considered = fields(tables.reply.names, reaction.reply)
    reply = considered.pop(tables.reply.names[-1])
    tokens = reply.tokens[: reply.length]
    return {
        "role": "user",
        "content": decode(tokens) if tokens else None,
        "tokens": tokens,
        "stopped": reply.stopped,
        "logprobs": reply.logprobs,
        "raw_logprobs": reply.raw,
        "all_tokens": reply.tokens,
        "appraisal": {name: decode(one.tokens[: one.length]) for name, one in appraisal.items()},
        "appraisal_tokens": {name: one.tokens for name, one in appraisal.items()},
        "appraisal_stopped": {name: one.stopped for name, one in appraisal.items()},
        "appraisal_logprobs": {name: one.raw for name, one in appraisal.items()},
        "change": int(reaction.change[turn, row]),
        "change_logprobs": _floats(reaction.change_logprobs[turn, row]),
        "considerations": {name: decode(one.tokens[: one.length]) for name, one in considered.items()},
        "consideration_tokens": {name: one.tokens for name, one in considered.items()},
        "consideration_stopped": {name: one.stopped for name, one in considered.items()},
        "consideration_logprobs": {name: one.raw for name, one in considered.items()},
        "emotion": int(reaction.emotion[turn, row]),
    }


def _generation(generated: Generated, *index: int) -> _Generation:
    count, stopped = int(generated.count[index]), bool(generated.stopped[index])
    tokens = generated.tokens[index][:count].tolist()
    logprobs, raw = (_floats(x[index][:count]) for x in (generated.logprob, generated.raw_logprob))
    return _Generation(tokens, count - stopped, stopped, logprobs, raw)


def _floats(values: Iterable[Any]) -> list[float]:
    """Python floats of few digits, each the same float32 as its origin.

    The shortest decimal reads back through float64, which could round twice in a rare unlucky case: then all digits.
    """
    singles = [np.float32(value) for value in values]
    shorts = [float(str(single)) for single in singles]
    return [
        short if np.float32(short) == single else float(single) for short, single in zip(shorts, singles, strict=True)
    ]


def generated_tokens(record: Record) -> int:
    """Tokens of a dialogue that the two models generated, stop tokens included (that of a first utterance excepted)."""
    first, *messages = record["messages"]
    count = len(first["tokens"] or ()) if first["generated"] else 0
    for message in messages:
        parts = [message["tokens"] if message["role"] == "assistant" else message["all_tokens"]]
        for kind in ("appraisal_tokens", "consideration_tokens"):
            parts += (message.get(kind) or {}).values()
        count += sum(len(part or ()) for part in parts)
    return count


def write_dialogues(path: str | os.PathLike[str], records: Iterable[Record], *, append: bool = False) -> None:
    """Writes records, one a line: a whole new file at once, or after the lines of an old one.

    A new file takes the place of an old one only when it is complete. What is appended is flushed to disk; a last line
    that an interrupted process left unfinished is cut off first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path if append else path.with_name(path.name + ".tmp")
    try:
        with target.open("r+b" if append and path.exists() else "wb") as file:
            if append:
                file.seek(_whole_lines(path))
                file.truncate()
            file.writelines(json_line(record, separators=(",", ":")) for record in records)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        if not append:
            target.unlink(missing_ok=True)
        raise
    if not append:
        target.replace(path)


def _whole_lines(path: Path) -> int:
    """Bytes of a file up to its last line end."""
    return path.read_bytes().rfind(b"\n") + 1


def read_dialogues(path: str | os.PathLike[str], *, unfinished: bool = False) -> list[Record]:
    """Reads and checks a log; see `iter_dialogues`."""
    return list(iter_dialogues(path, unfinished=unfinished))


def iter_dialogues(
    path: str | os.PathLike[str], *, unfinished: bool = False, check: Callable[[Record], Iterator[str]] | None = None
) -> Iterator[Record]:
    """Reads and checks a log, a line at a time.

    Args:
        unfinished: pass over a last line without an end, which an interrupted process left.
        check: finds further faults of a dialogue.

    Raises:
        DialogueLogError: no such file, or a line that is not a dialogue; with file and line.
    """
    lines = lines_of(path, unfinished=unfinished)
    yield from (parse_dialogue(line, f"{path}:{number}", check) for number, line in enumerate(lines, start=1))


def lines_of(path: str | os.PathLike[str], *, unfinished: bool = False) -> Iterator[bytes]:
    """The lines of a log, without their ends; see `iter_dialogues`.

    Raises:
        DialogueLogError: no such file.
    """
    try:
        file = Path(path).open("rb")  # noqa: SIM115
    except OSError as error:
        raise DialogueLogError(f"{path}: {error.strerror}; expected a file of dialogues, as evaluate writes") from None
    with file:
        yield from (line for _, line in each_line(file, unfinished=unfinished))


def parse_dialogue(line: bytes, where: str, check: Callable[[Record], Iterator[str]] | None = None) -> Record:
    """The dialogue on a line; DialogueLogError, which names the place, where there is none or `check` finds a fault."""
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DialogueLogError(f"{where}: not a JSON object ({error}); {REMEDY}") from None
    fault = next(record_faults(record), None) or (check and next(check(record), None))
    if fault:
        raise DialogueLogError(f"{where}: {fault}; {REMEDY}")
    return record


def record_faults(record: Any) -> Iterator[str]:
    """What keeps a JSON value from being a dialogue, the first thing first."""
    if not isinstance(record, dict):
        yield f"found {type(record).__name__}, expected an object"
        return
    yield from _field_faults(record, _RECORD, "")
    if not record["messages"]:
        yield "messages is empty, expected the user's first words at least"
    expected = "user"
    for index, message in enumerate(record["messages"]):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role != expected:
            yield f"{where} has role {role!r}, expected {expected!r}: user and assistant take turns"
            return
        fields = _OPENING if index == 0 else _ASSISTANT if role == "assistant" else _REACTION
        yield from _field_faults(message, fields, where + ".")
        expected = "assistant" if role == "user" else "user"
    replies = sum(message["role"] == "assistant" for message in record["messages"])
    if record["turns"] != replies or len(record["emotions"]) != replies + 1:
        yield (
            f"turns is {record['turns']} with {len(record['emotions'])} emotions, "
            f"but its messages hold {replies} replies of the policy (and so {replies + 1} emotions)"
        )
    if record["end_reason"] not in (*ALL_END_REASONS, UNANSWERED):
        yield f"end_reason is {record['end_reason']!r}, expected one of {', '.join(ALL_END_REASONS)}"


def known_fields(index: int | None) -> set[str]:
    """Names of the fields of a record (None), or of its message of that index."""
    if index is None:
        return {*_RECORD, "remote", "source", "functions"}
    return {"role", *(_OPENING if index == 0 else _ASSISTANT if index % 2 else _REACTION)}


def _field_faults(obj: dict[str, Any], fields: dict[str, tuple[type, ...]], where: str) -> Iterator[str]:
    for name, types in fields.items():
        if name not in obj:
            yield f"no field {where}{name}"
        # bool is an int in Python, not in a log
        elif not isinstance(obj[name], types) or (isinstance(obj[name], bool) and bool not in types):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            yield f"field {where}{name} holds {type(obj[name]).__name__}, expected {expected}"
