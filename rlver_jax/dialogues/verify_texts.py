"""Where a logged dialogue's texts are not its decoded tokens, or its tokens cannot have been generated.

No model is needed: these are the rules of the grammars and of `rollout.policy_turn`, on bytes, for one dialogue on the
host.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlver_jax.decoding.grammar import CLOSING
from rlver_jax.dialogues.log import thought_of
from rlver_jax.dialogues.trajectory import Message, reactions
from rlver_jax.dialogues.verify_set import Plan
from rlver_jax.dialogues.verify_shape import POLICY, USER, script_names
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.text.automaton import LINE_END, THINK_CLOSE
from rlver_jax.text.tokenizer import Tokenizer

ROUNDING = 1e-3  # nats by which a log-probability may lie above 0, or a sampled one below the model's own


class SplitReply(NamedTuple):
    """A reply of the policy, split."""

    found_at: int  # index of the token that completed `</think>`; -1: none
    say: Sequence[int]
    violation: bool


def split_reply(tokenizer: Tokenizer, tokens: Sequence[int], *, stopped: bool, think: bool) -> SplitReply:
    """The part of a reply that the user reads, and whether it broke the think format (see `rollout.policy_turn`).

    Args:
        tokens: as sampled, with the token that ended them if `stopped`.
    """
    end = len(tokens) - stopped
    if not think:
        return SplitReply(-1, tokens[:end], False)
    found_at, _ = _close_of(tokenizer, tokens)
    say = list(tokens[found_at + 1 : end]) if found_at >= 0 else []
    visible = (i for i, token in enumerate(say) if not _is_blank(tokenizer, token))
    say = say[next(visible, len(say)) :]
    return SplitReply(found_at, say, not say)


def _close_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[int, bytes]:
    """Index of the token that completes `</think>`, and its bytes after the tag; -1: none does."""
    tail = b""
    for i, token in enumerate(tokens):
        piece = tokenizer.token_bytes(token)
        tail = tail[1 - len(THINK_CLOSE) :] + piece if piece else b""  # a special token lies between
        if (at := tail.find(THINK_CLOSE)) >= 0:
            return i, tail[at + len(THINK_CLOSE) :]
    return -1, b""


def _is_blank(tokenizer: Tokenizer, token: int) -> bool:
    piece = tokenizer.token_bytes(token)
    return bool(piece) and not piece.strip()


def opening_faults(
    agents: Agents, profile: Profile, first: Message, reply_tokens: int, endpoints: Collection[str]
) -> Iterator[str]:
    """Checks that the first words are the profile's; where it has none, a line that the user can have generated."""
    words = (profile.first_talk or "").strip()
    if first["generated"] == bool(words):
        yield f"opening: generated is {first['generated']}, but the profile has {'' if words else 'no '}first words"
    if USER in endpoints:
        if words and first["content"] != words:
            yield "the first utterance is not the profile's"
        if not words and first["content"] != " ".join(first["content"].split()):
            yield "opening: the first words are not one line"
        return
    tokens = first["tokens"]
    if words and tokens != agents.tokenizer.encode(words):
        yield "the first utterance is not the profile's"
    if first["content"] != agents.tokenizer.decode(tokens):
        yield "opening: the text of the first utterance is not what its tokens say"
    if not words:
        yield from _made_up_faults(agents.tokenizer, tokens, reply_tokens)


def _made_up_faults(tokenizer: Tokenizer, tokens: Sequence[int], most: int) -> Iterator[str]:
    if not 0 < len(tokens) <= most:
        yield f"opening: {len(tokens)} tokens of first words that the user made up, expected 1 to {most}"
    elif any(_ends_line(tokenizer, token) for token in tokens):
        yield "opening: the first words that the user made up go on after their end"


def _ends_line(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a line of the user ends with this token: a line end or one without text."""
    piece = tokenizer.token_bytes(token)
    return not piece or LINE_END in piece


def reply_faults(agents: Agents, message: Message, reply: SplitReply, temperature: float | None) -> Iterator[str]:
    """Of one reply of a policy on the device."""
    tokenizer, tokens, think = agents.tokenizer, message["tokens"], agents.spec.mode == "think"
    text = tokens[: len(tokens) - message["stopped"]]
    thought = thought_of(tokenizer, text) if think else None
    if message["thought"] != thought:
        yield "the thought is not the one that the policy generated"
    if message["say_tokens"] != list(reply.say):
        yield "the say's tokens are not the end of what the policy generated"
    if message["content"] != tokenizer.decode(reply.say):
        yield "the text of 'say' is not what its tokens say"
    if message["violation"] != reply.violation:
        broken = "broke the format" if reply.violation else "kept to the format"
        yield f"violation is {message['violation']}, but by its tokens the policy {broken}"
    yield from _length_faults(agents, message, reply)
    if agents.spec.enforce_format and think:
        yield from _enforced_faults(tokenizer, agents.spec, message, reply)
    for name in ("logprobs", "raw_logprobs"):
        yield from _logprob_faults(message[name], name)
    yield from _sampled_faults(message, temperature)


def _length_faults(agents: Agents, message: Message, reply: SplitReply) -> Iterator[str]:
    """Checks that the reply ends at a stop token or its limit, and contains no other special token."""
    spec, tokens, tokenizer = agents.spec, message["tokens"], agents.tokenizer
    end, think = len(tokens) - message["stopped"], spec.mode == "think"
    special = [i for i, token in enumerate(tokens) if not tokenizer.token_bytes(token)]
    if special != [len(tokens) - 1] * message["stopped"]:
        yield f"stopped is {message['stopped']}, but tokens that end a reply stand at {special} of {len(tokens)}"
    limit = min(reply.found_at + 1 + spec.say_tokens, spec.policy_tokens) if reply.found_at >= 0 else spec.think_tokens
    limit = limit if think else spec.say_tokens
    late = reply.found_at >= spec.think_tokens if think else False
    if late or not 0 < len(tokens) <= limit or (not message["stopped"] and len(tokens) != limit):
        yield f"{len(tokens)} tokens of a reply, stopped {message['stopped']}, which the limits rule out"
    if think and _close_of(tokenizer, tokens[:end])[1].strip():
        yield "the token that ends the thought holds a part of the say, which none may"


def _enforced_faults(tokenizer: Tokenizer, spec: RolloutConfig, message: Message, reply: SplitReply) -> Iterator[str]:
    """policy.enforce_format: a thought is closed at its limit, and no reply ends before it has visible text."""
    tokens, closing = message["tokens"], tokenizer.encode(CLOSING)
    start = max(spec.think_tokens - len(closing), 0)
    end = reply.found_at + 1 if reply.found_at >= 0 else min(len(tokens), spec.think_tokens)
    skipped = start - (spec.think_tokens - len(closing))
    if list(tokens[start:end]) != closing[skipped : skipped + max(end - start, 0)]:
        yield "the thought ran into its limit, but was not closed as policy.enforce_format does"
    if message["stopped"] and reply.violation:
        yield "the reply ended before something was said, which policy.enforce_format rules out"


def _logprob_faults(logprobs: Sequence[float], name: str) -> Iterator[str]:
    wrong = [(i, x) for i, x in enumerate(logprobs, 1) if not -3.4028235e38 <= x <= ROUNDING]  # NaN is wrong
    if wrong:
        index, value = wrong[0]
        yield f"log-probability {index} of {len(logprobs)} is {value} ({name}), expected a finite number up to 0"


def _sampled_faults(message: Message, temperature: float | None) -> Iterator[str]:
    """Greedy tokens have log-probability 0; at temperature 1 none is below the model's own."""
    logprobs, raw = message["logprobs"], message["raw_logprobs"]
    if temperature == 0 and any(logprobs):
        yield "log-probabilities that are not 0, though the reply was greedy"
    if temperature == 1 and any(one < own - ROUNDING for one, own in zip(logprobs, raw, strict=True)):
        yield "a log-probability below the model's own, though what is ruled out leaves the others likelier"


def remote_reply_faults(agents: Agents, message: Message, user_on_device: bool) -> Iterator[str]:
    """Of one reply of a policy behind an endpoint: the rule of `endpoint_agents`."""
    content, thought, think = message["content"], message["thought"], agents.spec.mode == "think"
    if content != content.strip() or (thought or "") != (thought or "").strip():
        yield "white space around what the policy said"
    if think and thought is None:
        yield "no thought in think mode, not even an empty one"
    if not think and thought is not None:
        yield "a thought in direct mode"
    if message["violation"] != (think and not content):
        yield f"violation is {message['violation']}, but the policy said {'something' if content else 'nothing'}"
    if user_on_device:
        yield from _heard_faults(agents, message)
    elif message["say_tokens"] is not None:
        yield "the say's tokens are not those of its text"


def _heard_faults(agents: Agents, message: Message) -> Iterator[str]:
    """Of the tokens in which a user on the device reads a reply that comes as text."""
    tokens = None if message["violation"] else agents.tokenizer.encode(message["content"])
    if message["say_tokens"] != tokens:
        yield "the say's tokens are not those of its text"


def user_faults(agents: Agents, record: Mapping[str, Any], limits: tuple[int, int], temperature: float):
    """Of the reactions of a user on the device.

    Args:
        limits: tokens of a field, and of the reply.
        temperature: of the reply.
    """
    name_of_reply = script_names(agents.prompts)[1][-1]
    for turn, _, user in reactions(record):
        where = f"turn {turn + 1}"
        yield from (f"{where}: {fault}" for fault in _reaction_faults(agents.tokenizer, user))
        speaks = user["content"] is not None
        lines = [("appraisal", name, limits[0]) for name in user["appraisal_tokens"]]
        lines += [("consideration", name, limits[0]) for name in user["consideration_tokens"]] * speaks
        generated = [
            (name, *(user[f"{kind}_{x}"][name] for x in ("tokens", "stopped")), limit) for kind, name, limit in lines
        ]
        generated += [(name_of_reply, user["all_tokens"], user["stopped"], limits[1])] * speaks
        for name, tokens, stopped, limit in generated:
            yield from (f"{where}, {name!r}: {x}" for x in _line_faults(agents.tokenizer, tokens, stopped, limit))
        for kind, name, _ in lines:
            yield from (f"{where}, {name!r}: {x}" for x in _logprob_faults(user[f"{kind}_logprobs"][name], name))
        for name in ("logprobs", "raw_logprobs", "change_logprobs"):
            yield from (f"{where}: the user's {fault}" for fault in _logprob_faults(user[name], name))
        yield from (f"{where}: the user's {fault}" for fault in _sampled_faults(user, temperature))


def _reaction_faults(tokenizer: Tokenizer, user: Message) -> Iterator[str]:
    """The texts of a reaction, and its reply's two lists of tokens."""
    decode, speaks = tokenizer.decode, user["content"] is not None
    shown = list(user["all_tokens"][: len(user["all_tokens"]) - user["stopped"]])
    if user["tokens"] != shown:
        yield "the reply's tokens are not those that were generated"
    if (user["content"] or "") != decode(user["tokens"]) or (speaks and not user["tokens"]):
        yield "the text of 'reply' is not what its tokens say"
    for kind, texts in (("appraisal", user["appraisal"]), ("consideration", user["considerations"])):
        for name, text in texts.items():
            tokens, stopped = user[f"{kind}_tokens"][name], user[f"{kind}_stopped"][name]
            if text != decode(tokens[: len(tokens) - stopped]):
                yield f"the text of {name!r} is not what its tokens say"
    silent = user["all_tokens"] or user["stopped"] or any(user["consideration_tokens"].values())
    if not speaks and (silent or any(user["consideration_stopped"].values())):
        yield "what the user considered before a reply that is not there"


def _line_faults(tokenizer: Tokenizer, tokens: Sequence[int], stopped: bool, limit: int) -> Iterator[str]:
    """A line ends with its last token, or at its limit."""
    ends = [i for i, token in enumerate(tokens) if _ends_line(tokenizer, token)]
    if not 0 < len(tokens) <= limit or (not stopped and len(tokens) != limit):
        yield f"{len(tokens)} tokens and {'an' if stopped else 'no'} end of line, where {limit} are allowed"
    if ends != [len(tokens) - 1] * stopped:
        yield f"stopped is {stopped}, but tokens that end a line stand at {ends} of {len(tokens)}"


def remote_user_faults(agents: Agents, record: Mapping[str, Any]) -> Iterator[str]:
    """Of the reactions of a user behind an endpoint: each text is one line, as `user.text_forms` reads them.

    Of a user that is asked by SAGE's own prompts the texts are free.
    """
    lines = agents.prompts.sage is None
    considers = len(script_names(agents.prompts)[1]) > 1
    for turn, _, user in reactions(record):
        texts = {**user["appraisal"], **user["considerations"], "reply": user["content"] or ""}
        for name, text in texts.items():
            if lines and (text != text.strip() or "\n" in text):
                yield f"turn {turn + 1}: the text of {name!r} is not one line"
        silent = user["content"] is None
        if user["content"] == "" or (considers and silent == bool(user["considerations"])):
            yield f"turn {turn + 1}: a reply without what was considered before it, or the other way round"


def policy_faults(agents: Agents, record: Mapping[str, Any], splits: Sequence[SplitReply], plan: Plan) -> Iterator[str]:
    """Of the policy's replies, wherever the policy is; `splits` are those of a policy on the device."""
    user_on_device = USER not in plan.endpoints
    for turn, message in enumerate(record["messages"][1::2], 1):
        if POLICY not in plan.endpoints:
            faults = reply_faults(agents, message, splits[turn - 1], plan.temperature)
        elif plan.other_on_device:
            faults = _heard_faults(agents, message)
        else:
            faults = remote_reply_faults(agents, message, user_on_device)
        yield from (f"turn {turn}: {fault}" for fault in faults)
