"""Keys, tokens and passwords: what is wrong with one, and texts without them.

Servers repeat what they were sent, in errors and in answers, and in spellings of their own: escaped for JSON, URLs or
HTML, as base64, hex or numbers, spaced out. `Secrets` finds a known secret in all of them. `without_credentials` and
`redacted` know no secret, but where one is likely: behind a name such as api_key, or before the @ of an address.
"""

import base64
import bisect
import codecs
import functools
import html.entities
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

MASK = "***"
# Shorter ones, such as "none" or "EMPTY" for servers that want any key, are words and no secrets.
_SHORTEST, _SHORTEST_MIXED = 8, 6  # characters; the latter with letters and digits
_SHORTEST_BARE = 12  # letters and digits, where what stands between them doesn't count
_WORDS = frozenset(  # longer, and still words
    {"anything", "whatever", "something", "placeholder", "undefined"}
    | {"lm-studio", "not-needed", "not-used", "dummy-key", "no-key-required", "sk-no-key-required"}
)
# Characters without a width: they hide a secret from a search, but not from a reader.
_UNSEEN = "\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
_SECRET_NAMES = (
    *(f"{kind}key" for kind in ("api", "access", "account", "auth", "function", "master", "private", "secret")),
    *(f"{kind}key" for kind in ("functions", "service", "signing", "subscription", "license")),
    *("password", "passwd", "passphrase", "pwd", "secret", "credential", "authorization", "authentication", "auth"),
    *("cookie", "jwt", "bearer"),
)
# Names that end in "token" and are a tokenizer's: stop_token, eos_token …
_PLAIN_TOKENS = frozenset(
    {"stop", "eos", "bos", "pad", "unk", "sep", "cls", "mask", "special", "end", "start", "begin", "think", "image"}
    | {"bad", "max", "min", "skip", "logit", "thinking", "reasoning", "allowed"}
)


class Secret(str):
    """A text that tracebacks and logs, which show `repr`, don't hold; otherwise as any other."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"'{MASK}'"


def key_fault(key: str) -> str:
    """What is wrong with an API key, without a character of it; empty: nothing."""
    if not key:
        return "is empty"
    if key.isspace():
        return "is nothing but white space"
    if key.startswith("\ufeff"):
        return "begins with a byte order mark; save the file that it comes from without one"
    if key[-1] in "\r\n":
        return 'ends with a line end; mounted secrets often do: export it without, as "$(cat FILE)" gives it'
    for position, char in (("begins", key[0]), ("ends", key[-1])):
        if char.isspace():
            return f"{position} with white space; export it without"
    if any(char.isspace() for char in key):
        scheme = key.split()[0].lower() in ("bearer", "basic", "authorization:")
        return "holds white space; " + (f"give the key alone, without {key.split()[0]}" if scheme else "a key has none")
    if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in key):
        return "holds a control character; a key has none"
    return "" if key.isascii() else "holds a character that is not ASCII; a key has none"


class Secrets:
    """Known secrets, to be hidden from texts."""

    def __init__(self, values: Iterable[str], whole: Iterable[str] = ()):
        """Remembers what to look for.

        Args:
            values: hidden in every spelling, unless they are mere words.
            whole: hidden as they are, however short.
        """
        long = sorted({value for value in values if _is_secret(value)}, key=len, reverse=True)
        patterns = [re.escape(text) for text in whole if text] + [one for value in long for one in _spellings(value)]
        self._plain = re.compile("|".join(patterns), re.IGNORECASE) if patterns else None
        escaped = [_escaped(value) for value in long]
        self._escaped = re.compile("|".join(escaped), re.IGNORECASE) if escaped else None
        bare = {one for value in long for one in _bare_spellings(value) if len(one) >= _SHORTEST_BARE}
        self._bare = sorted(bare, key=len, reverse=True)

    def hide(self, text: str) -> str:
        """The text with *** in the place of each secret."""
        if self._escaped and _ESCAPES.search(text):
            text = self._escaped.sub(MASK, text)
        text = self._plain.sub(MASK, text) if self._plain else text
        return self._hide_bare(text) if self._bare else text

    def _hide_bare(self, text: str) -> str:
        """Looks at letters and digits alone, since anything may stand between them."""
        bare = {char: _bare(char) for char in set(text)}
        whole = "".join(map(bare.__getitem__, text))
        patterns = [re.escape(one) for one in self._bare if one in whole]
        if not patterns:
            return text
        ends = list(itertools.accumulate(len(bare[char]) for char in text))
        pieces, at = [], 0
        for match in re.finditer("|".join(patterns), whole):
            pieces += [text[at : bisect.bisect_right(ends, match.start())], MASK]
            at = bisect.bisect_left(ends, match.end()) + 1
        return "".join([*pieces, text[at:]])

    def hide_in(self, value: Any) -> Any:
        """A value of JSON with all its strings, those of names too, hidden; a `Secret` is one however short it is."""
        if isinstance(value, str):
            return MASK if isinstance(value, Secret) else self.hide(value)
        if isinstance(value, dict):
            return {self.hide(name): self.hide_in(one) for name, one in value.items()}
        return [self.hide_in(one) for one in value] if isinstance(value, list) else value


_ESCAPES = re.compile(f"[\\\\%&={_UNSEEN}]")


def _is_secret(value: str) -> bool:
    mixed = re.search(r"\d", value) and re.search(r"[A-Za-z]", value)
    return len(value) >= (_SHORTEST_MIXED if mixed else _SHORTEST) and value.lower() not in _WORDS


def _spellings(value: str) -> Iterator[str]:
    """Patterns of a secret as it is, backwards, in hex and in base64, alone or within longer ones."""
    yield re.escape(value)
    yield re.escape(value[::-1])
    yield r"[\s:,;-]{0,2}(?:00|0x)?".join(f"{byte:02x}" for byte in value.encode())
    for data in (value.encode(), value.encode("utf-16-le")):
        for before, first in enumerate((0, 2, 3)):  # bytes before it; characters that depend on them
            text = base64.b64encode(b"\0" * before + data).decode()
            last, rest = divmod(8 * (before + len(data)), 6)
            chars = [{"+": "[+-]", "/": r"(?:\\?/|_)"}.get(char, char) for char in text[first:last]]
            yield r"(?:\\r|\\n|\s)*".join(chars) + ("[A-Za-z0-9+/_-]?" if rest else "") + "={0,2}"


def _bare_spellings(value: str) -> Iterator[str]:
    """Letters and digits, in small letters, of a secret in other spellings: whatever stood between them is left out."""
    for one in (value, value[::-1]):
        data = one.encode()
        for text in (one, codecs.encode(one, "rot13")):
            spelling = "".join(map(_bare, text))
            if not spelling.isalpha() and not spelling.isdecimal():
                yield spelling
        for form in ("d", "o", "03o", "08b", "02x", "04x", "08x"):
            yield "".join(format(byte, form) for byte in data)
        yield "".join(f"u{byte:04x}" for byte in data)
        yield "".join(f"u{byte:08x}" for byte in data)
        yield "".join(f"0x{byte:02x}" for byte in data)
        for inner in (data, *map(str.encode, _in_base(64, data))):
            yield from ("".join(map(_bare, text)) for text in _in_base(64, inner))
        yield from ("".join(map(_bare, text)) for text in _in_base(32, data))


def _in_base(base: int, data: bytes) -> Iterator[str]:
    """Base 64 or 32 of bytes, alone or within longer ones: the characters that depend on nothing else."""
    bits, encode = {64: (6, base64.b64encode), 32: (5, base64.b32encode)}[base]
    for before in range(bits // math.gcd(bits, 8)):  # bytes before them
        yield encode(bytes(before) + data).decode()[-(-8 * before // bits) : 8 * (before + len(data)) // bits]


@functools.cache
def _bare(char: str) -> str:
    """The letter or digit of ASCII that a character is or looks like, in small letters; empty: none."""
    if char.isascii():
        return char.lower() if char.isalnum() else ""
    if 0xE0000 <= ord(char) < 0xE0080:  # tags: ASCII that is not seen
        return _bare(chr(ord(char) - 0xE0000))
    return "".join(c for c in unicodedata.normalize("NFKD", char).lower() if c.isascii() and c.isalnum())


def _escaped(value: str) -> str:
    """A pattern of a secret whose characters may each be escaped, or stand among others that are not seen."""
    return f"[{_UNSEEN}]*".join(map(_any_escape, value))


def _any_escape(char: str) -> str:
    code = ord(char)
    # However many backslashes there are, only so many are looked at: each may be where a secret begins.
    ways = [rf"\\{{0,8}}{re.escape(char)}", rf"\\{{1,8}}(?:u00{code:02x}|u\{{0*{code:x}\}}|x{code:02x}|0?{code:03o})"]
    ways += [f"%(?:25)*{code:02x}", f"&(?:amp;)*#(?:0*{code}|x0*{code:x});?", f"={code:02x}"]
    ways += [f"&(?:amp;)?{name}" for name, named in html.entities.html5.items() if named == char and name[-1] == ";"]
    return f"(?:{'|'.join(ways)})"


def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret: api_key, Authorization, accessToken …, but not max_tokens."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    if not words:
        return False
    if words[-1] in ("token", "tokens"):
        return words[0] not in _PLAIN_TOKENS
    return words in (["key"], ["keys"]) or "".join(words).removesuffix("s").endswith(_SECRET_NAMES)


def secret_values(value: Any, secret: bool = False) -> Iterator[str]:
    """What the secret fields of a value of JSON hold, and the credentials of the addresses in it."""
    if isinstance(value, str):
        if secret:
            yield value
            yield from value.split()[1:]  # Bearer KEY
        yield from _of_addresses(value)
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from secret_values(one, secret or is_secret_name(name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from secret_values(one, secret)


def basic(url: str) -> str:
    """User and password of an address as they are sent, in base64; empty without."""
    match = _USER.search(url)
    return base64.b64encode(unquote(match[0][:-1]).encode("utf-8", "replace")).decode() if match else ""


def guarded(value: Any, secret: bool = False) -> Any:
    """A value of JSON in which secret strings are `Secret`."""
    if isinstance(value, dict):
        return {name: guarded(one, secret or is_secret_name(name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [guarded(one, secret) for one in value]
    return Secret(value) if isinstance(value, str) and (secret or [*_of_addresses(value)]) else value


def redacted(text: str, secrets: Secrets | None = None) -> str:
    """A JSON text with *** for what its secret fields hold; the very same text where there are none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return without_credentials(text)
    hidden = _masked(secrets.hide_in(parsed) if secrets else parsed)
    return text if hidden == parsed else json.dumps(hidden, ensure_ascii=False)


def _masked(value: Any, secret: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _masked(one, secret or is_secret_name(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [_masked(one, secret) for one in value]
    if isinstance(value, str):
        return MASK if secret else without_credentials(value)
    return value


# `user:password@`; a password may hold what should have been escaped in it.
_USER = re.compile(r"(?<=://)[^\s'\"<>]{0,4096}@")
# `name=value` or `"name": "value"`, as queries, options and settings have them; the value perhaps in quotes.
_NAMED = re.compile(
    r"(?<![\w.-])([\w.-]+)(\\?[\"']?\s*[=:]\s*(?!//))(\\?[\"'][^\"'\\]*|(?:(?:bearer|basic)\s+)?[^\s&\"',;}\])]+)", re.I
)


def without_credentials(text: str) -> str:
    """A text with *** for users and passwords in addresses, and for what stands behind the name of a secret."""

    def mask(match: re.Match[str]) -> str:
        name, between, value = match.groups()
        quote = re.match(r"\\?[\"']|", value)
        hidden = is_secret_name(name.rpartition(".")[2])
        return f"{name}{between}{quote[0] if quote else ''}{MASK}" if hidden else match[0]

    return _NAMED.sub(mask, _USER.sub(f"{MASK}@", text))


def _of_addresses(text: str) -> Iterator[str]:
    """Passwords and secret queries of the addresses in a text."""
    for match in _USER.finditer(text):
        user, _, password = match[0].rstrip("@").partition(":")
        yield from {password or user, unquote(password or user)}
    if "://" in text:
        for name, value in re.findall(r"[?&#;]([\w.-]+)=([^&#\s]+)", text):
            if is_secret_name(name):
                yield value
