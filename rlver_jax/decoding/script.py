"""Guided generation as data: what the simulated user works through before it speaks.

A script file is plain text. Everything is literal except

    {emotion}         the current emotion, 0..100, in digits
    {band}            its band: S, A, B, C or F
    <<free:NAME>>     words that the model writes, to the end of the line
    <<choose:NAME>>   one of a fixed set of options

A field stands last on its line and owns the line end: the model (or the option) writes it, or the runner adds
it where the model ran out of room. The literal after a field therefore begins with the next line's first
character. No space may stand right before a free field: tokenizers join a space to the word after it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from rlver_jax.decoding.cache import LM, Cache, append, rollback
from rlver_jax.decoding.generate import Generated, Limits, generate
from rlver_jax.decoding.grammar import Grammar
from rlver_jax.text.tokenizer import Tokenizer

SLOTS = ("emotion", "band")
_MARK = re.compile(r"<<(?P<mark>[^<>\n]*)>>|\{(?P<slot>[^{}\n]*)\}")
_FIELD = re.compile(r"(free|choose):([a-z][a-z0-9_]*)")


class Part(NamedTuple):
    """One piece of a script: `value` is the literal of a `text`, the name of a `slot`, `free` or `choose`."""

    kind: Literal["text", "slot", "free", "choose"]
    value: str


def parse_script(text: str, source: str = "<script>", slots: Sequence[str] = SLOTS) -> tuple[Part, ...]:
    """Split a script into its parts; the line end after a field belongs to the field.

    `source` names the file in messages, `slots` are those that it may hold. Raises ValueError, with file and line, for
    an unknown slot or mark, a field that isn't last on its line, a space before a free field, or a name used twice.
    """
    text = text.replace("\r\n", "\n").rstrip("\n")
    parts: list[Part] = []
    names: set[str] = set()
    at = 0
    for match in _MARK.finditer(text):
        where = f"{source}, line {text.count(chr(10), 0, match.start()) + 1}"
        if match.start() > at:
            parts.append(Part("text", text[at : match.start()]))
        at = match.end()
        if match["slot"] is not None:
            parts.append(_slot(match["slot"], where, slots))
            continue
        part = _field(match["mark"], where)
        _check_field(part, text, match, names, where)
        parts.append(part)
        names.add(part.value)
        at += 1  # the field owns its line end
    if at < len(text):
        parts.append(Part("text", text[at:]))
    return tuple(parts)


def check_appraisal(parts: tuple[Part, ...], source: str) -> None:
    """Raise ValueError unless the script ends in `<<choose:change>>`, its only choice."""
    choices = [p.value for p in parts if p.kind == "choose"]
    if choices != ["change"] or parts[-1].kind != "choose":
        raise ValueError(
            f"{source}: an appraisal must end with <<choose:change>> and hold no other choice;"
            f" it has choices {choices} and ends with {_end_of(parts)}"
        )


def check_reply(parts: tuple[Part, ...], source: str) -> None:
    """Raise ValueError unless the script holds free fields only and the last part is `<<free:reply>>`."""
    choices = [p.value for p in parts if p.kind == "choose"]
    if choices or not parts or parts[-1] != Part("free", "reply"):
        raise ValueError(
            f"{source}: a reply script must end with <<free:reply>> and hold no choices;"
            f" it has choices {choices} and ends with {_end_of(parts)}"
        )


def _end_of(parts: tuple[Part, ...]) -> str:
    return f"the {parts[-1].kind} {parts[-1].value!r}" if parts else "nothing: it is empty"


def _slot(name: str, where: str, slots: Sequence[str]) -> Part:
    if name not in slots:
        allowed = " and ".join(f"{{{s}}}" for s in slots) or "no slot"
        raise ValueError(f"{where}: unknown slot {{{name}}}; a script knows {allowed} (for plain text avoid braces)")
    return Part("slot", name)


def _field(mark: str, where: str) -> Part:
    field = _FIELD.fullmatch(mark)
    if field is None:
        raise ValueError(
            f"{where}: unknown mark <<{mark}>>; a script knows <<free:NAME>> and <<choose:NAME>>,"
            " NAME in lower-case letters, digits and underscores"
        )
    return Part("free", field[2]) if field[1] == "free" else Part("choose", field[2])


def _check_field(part: Part, text: str, match: re.Match[str], names: set[str], where: str) -> None:
    mark = match[0]
    if part.value in names:
        raise ValueError(f"{where}: {mark} uses a name that the script already has; give each field its own")
    if text[match.end() : match.end() + 1] not in ("", "\n"):
        raise ValueError(f"{where}: {mark} must be the last thing on its line; break the line after it")
    if part.kind == "free" and text[: match.start()].endswith((" ", "\t", "\u3000")):
        raise ValueError(f"{where}: remove the space before {mark}; the tokenizer joins a space to the next word")


_PAD, _FIRST_SLOT = -1, -2  # in a template: padding, and -2 - index into SLOTS


@flax.struct.dataclass
class Script:
    """A script in tokens: for each field the literal that leads to it, with slots to fill.

    `template` holds token ids, -1 for padding and -2 - s for slot s of SLOTS; a slot's value v is
    `values[s, v, : counts[s, v]]`.
    """

    template: Int[Array, "F L"]
    values: Int[Array, "2 101 W"]
    counts: Int[Array, "2 101"]
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def render(self, emotion: Int[Array, "B"], band: Int[Array, "B"]) -> tuple[Int[Array, "F B S"], Int[Array, "F B"]]:
        """Every literal for every row, slots filled, without gaps: (tokens, counts)."""
        fields, length = self.template.shape
        width = self.values.shape[-1]
        tokens = jnp.zeros((fields, emotion.shape[0], length, width), jnp.int32).at[..., 0].set(self.template[:, None])
        mask = jnp.zeros(tokens.shape, bool).at[..., 0].set(self.template[:, None] >= 0)
        for slot, value in enumerate((emotion, band)):
            here = (self.template == _FIRST_SLOT - slot)[:, None, :, None]
            tokens = jnp.where(here, self.values[slot, value][None, :, None], tokens)
            filled = jnp.arange(width) < self.counts[slot, value][:, None]
            mask = jnp.where(here, filled[None, :, None], mask)
        tokens, mask = (x.reshape(fields, emotion.shape[0], length * width) for x in (tokens, mask))
        order = jnp.argsort(~mask, axis=-1, stable=True)[..., : length + len(SLOTS) * (width - 1)]
        return jnp.take_along_axis(tokens, order, axis=-1), mask.sum(axis=-1, dtype=jnp.int32)

    def literals(self, emotion: int, band: int) -> list[list[int]]:
        """What `render` gives one row, on the host; of a script that was fetched from the device."""

        def fill(token: int) -> list[int]:
            if token >= 0:
                return [token]
            if token == _PAD:
                return []
            slot = _FIRST_SLOT - token
            value = (emotion, band)[slot]
            return self.values[slot, value, : self.counts[slot, value]].tolist()

        return [[filled for token in row for filled in fill(token)] for row in self.template.tolist()]


def compile_script(
    parts: Sequence[Part], tokenizer: Tokenizer, slots: Mapping[str, Sequence[str]], before: Sequence[int] = ()
) -> Script:
    """Tokens of a parsed script; `slots` gives the text of every value of every slot, `before` tokens in front of it.

    The line end that a free field owns becomes the beginning of the next literal: whatever ends a field on the device
    is rolled back, so every field ends alike. The options of a choice bring their own.

    Raises:
        ValueError: a slot stands twice in one literal, or has over 101 values.
    """
    rows: list[list[int]] = [[*before]]
    names: list[str] = []
    text = ""
    for part in parts:
        if part.kind == "text":
            text += part.value
            continue
        rows[-1] += tokenizer.encode(text) if text else []
        text = "\n" if part.kind == "free" else ""
        if part.kind == "slot":
            mark = _FIRST_SLOT - SLOTS.index(part.value)
            if mark in rows[-1]:
                raise ValueError(f"slot {{{part.value}}} stands twice before {part}; once in a literal is enough")
            rows[-1].append(mark)
        else:
            names.append(part.value)
            rows.append([])
    del rows[-1]
    template = np.full((len(rows), max(map(len, rows))), _PAD, np.int32)
    for row, tokens in zip(template, rows, strict=True):
        row[: len(tokens)] = tokens
    arrays: tuple[Array, Array, Array] = jax.device_put((template, *_slot_tables(tokenizer, slots)))
    return Script(*arrays, tuple(names))


def _slot_tables(tokenizer: Tokenizer, slots: Mapping[str, Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [[tokenizer.encode(text) for text in slots[name]] for name in SLOTS]
    if any(len(texts) > 101 for texts in encoded):
        raise ValueError("a slot has at most 101 values, 0..100")
    values = np.zeros((len(SLOTS), 101, max(len(t) for texts in encoded for t in texts)), np.int32)
    counts = np.zeros(values.shape[:2], np.int32)
    for slot, texts in enumerate(encoded):
        for value, tokens in enumerate(texts):
            values[slot, value, : len(tokens)] = tokens
            counts[slot, value] = len(tokens)
    return values, counts


def run_fields(
    lm: LM,
    cache: Cache,
    literals: tuple[Int[Array, "F B S"], Int[Array, "F B"]],
    keys: Key[Array, "F B"],
    grammar: Grammar,
    *,
    max_tokens: int,
    limits: Int[Array, "F"],
    temperatures: Array,
    active: Bool[Array, "B"],
) -> tuple[Cache, Generated]:
    """Prefills a literal, generates a field, and so on: one scan compiles the model once for all fields of a script.

    Returns the cache after the last field (its end rolled back) and the fields, each array with F in front.
    """

    def field(cache: Cache, xs: tuple) -> tuple[Cache, Generated]:
        tokens, count, key, limit, temperature = xs
        cache = append(lm, cache, tokens, jnp.where(active, count, 0))
        cache, generated = generate(
            lm,
            cache,
            key,
            grammar,
            max_tokens=max_tokens,
            limits=Limits(limit, jnp.int32(0)),
            temperature=temperature,
            active=active,
        )
        return rollback(cache, cache.length - generated.stopped), generated

    return jax.lax.scan(field, cache, (*literals, keys, limits, temperatures))
