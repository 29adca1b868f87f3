"""What hides keys: every spelling of a known one, and likely places of unknown ones. Ordinary text stays."""

import base64
import codecs
import json
import time
import urllib.parse

import pytest

from rlver_jax.config.credentials import (
    Secret,
    Secrets,
    guarded,
    is_secret_name,
    key_fault,
    redacted,
    secret_values,
    without_credentials,
)

KEY = "sk-s3cret/Key+0123456789"


def hexed(text, form):
    return "".join(form % byte for byte in text.encode())


SPELLINGS = {
    "plain": KEY,
    "upper": KEY.upper(),
    "lower": KEY.lower(),
    "backwards": KEY[::-1],
    "json": json.dumps(KEY)[1:-1].replace("/", "\\/"),
    "utf-16 escapes": hexed(KEY, "\\u%04x"),
    "utf-16 escapes, upper": hexed(KEY, "\\u%04X"),
    "escaped twice": hexed(KEY, "\\\\u%04x"),
    "one escape": KEY.replace("3", "\\u0033"),
    "braces": hexed(KEY, "\\u{%x}"),
    "python": hexed(KEY, "\\x%02x"),
    "octal": hexed(KEY, "\\%03o"),
    "url": urllib.parse.quote(KEY, safe=""),
    "url, all": hexed(KEY, "%%%02x"),
    "url, twice": urllib.parse.quote(urllib.parse.quote(KEY, safe=""), safe=""),
    "html": hexed(KEY, "&#%d;"),
    "html, hex": hexed(KEY, "&#x%x;"),
    "quoted-printable": hexed(KEY, "=%02X"),
    "hex": KEY.encode().hex(),
    "hex, upper": KEY.encode().hex().upper(),
    "hex, spaced": KEY.encode().hex(" "),
    "hex, colons": KEY.encode().hex(":"),
    "hex of utf-16": KEY.encode("utf-16-le").hex(),
    "unseen characters": "\u200b".join(KEY),
    "soft hyphens": "\u00ad".join(KEY),
    "spaced": " ".join(KEY),
    "lines": f"{KEY[:9]}\n{KEY[9:]}",
    "bold": "**".join(KEY),
    "full width": KEY.translate({code: code + 0xFEE0 for code in range(33, 127)}),
    "accents": "\u0301".join(KEY),
    "tags": KEY.translate({code: code + 0xE0000 for code in range(33, 127)}),
    "html, named": KEY.replace("/", "&sol;").replace("+", "&plus;"),
    "rot13": codecs.encode(KEY, "rot13"),
    "numbers": ", ".join(map(str, KEY.encode())),
    "octal numbers": " ".join(format(byte, "o") for byte in KEY.encode()),
    "bits": " ".join(format(byte, "08b") for byte in KEY.encode()),
    "code points": " ".join(f"U+{byte:04X}" for byte in KEY.encode()),
    "long escapes": hexed(KEY, "\\U%08x"),
    "base32": base64.b32encode(KEY.encode()).decode(),
    "base64, twice": base64.b64encode(base64.b64encode(KEY.encode())).decode(),
    "base64, backwards inside": base64.b64encode(KEY[::-1].encode()).decode(),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_hidden(name):
    hidden = Secrets([KEY]).hide(f"before, {SPELLINGS[name]}, after")
    assert "***" in hidden
    assert hidden.startswith("before, ")
    assert hidden.endswith(", after")
    assert len(hidden) < 30, hidden


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
@pytest.mark.parametrize("before", ["", "a", "ab", "Bearer ", "Basic ", "user:", '{"k":"'])
@pytest.mark.parametrize("after", ["", "x", "xy", "\r\nHost: x", " and much more that stands behind it"])
def test_base64_in_every_phase(encode, before, after):
    """What is left of it decodes to less than three characters of the key."""
    text = encode((before + KEY + after).encode()).decode()
    hidden = Secrets([KEY]).hide(text)
    assert "***" in hidden
    left = "".join(hidden.replace("\n", "").partition("***")[::2])
    for start in range(4):
        piece = left[start:]
        piece = piece[: len(piece) // 4 * 4].replace("-", "+").replace("_", "/")
        decoded = base64.b64decode(piece + "=" * (-len(piece) % 4))
        assert not any(KEY[i : i + 3].encode() in decoded for i in range(len(KEY) - 2))


@pytest.mark.parametrize(
    "word", ["EMPTY", "none", "None", "x", "token", "dummy", "anything", "", "lm-studio", "not-needed"]
)
def test_a_word_is_no_secret(word):
    text = f"There is none, anything is EMPTY; None of it is a token {word}. " + codecs.encode(word, "rot13")
    assert Secrets([word]).hide(text) == text


def test_ordinary_text_stays():
    text = "50 % off & more = less \\n \u200b 😀 c2stc2 736b2d " * 50
    assert Secrets([KEY]).hide(text) == text
    text = "我很难过，👩‍👩‍👧 ﬁne\r\n\tdef f(x): return [115, 107, 45, x]  # ｓｋ s k - s 3 c r e t\n" * 50
    assert Secrets([KEY, "abc123"]).hide(text) == text, "a part of a key is none, nor is what looks like a short one"


def test_only_what_spells_a_key_is_taken_out():
    """Of two that touch, and with characters before and after that stand for several letters."""
    text = f"ﬁ {' '.join(KEY)}, ﬁ|{'|'.join(KEY)}{'|'.join(KEY)}ﬁ 知"
    assert Secrets([KEY]).hide(text) == "ﬁ ***, ﬁ|******ﬁ 知"


@pytest.mark.parametrize(
    "text", ["x", "s", "sk-", "%", "\\u00", "73", "c2st", "&#115;", "\u200b", "\n", "9876543210", "\\", "\\u{0", "é́"]
)
@pytest.mark.slow
def test_hiding_takes_time_in_proportion(text):
    began = time.process_time()
    Secrets([KEY]).hide(text * (2_000_000 // len(text)))
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (f"{KEY}\n", "ends with a line end; mounted secrets often do"),
        (f"{KEY}\r\n", "ends with a line end"),
        (f" {KEY}", "begins with white space"),
        (f"\n{KEY}", "begins with white space"),
        (f"{KEY} ", "ends with white space"),
        (f"{KEY}\t", "ends with white space"),
        (f"{KEY}\u00a0", "ends with white space"),
        ("sk-two parts-0123", "holds white space"),
        ("sk-two\nlines-0123", "holds white space"),
        (f"Bearer {KEY}", "give the key alone, without Bearer"),
        ("sk-\x00-0123456", "control character"),
        ("sk-\x7f-0123456", "control character"),
        ("sk-\x1b[31m-0123", "control character"),
        ("sk-ключ-0123", "not ASCII"),
        ("sk-\udcff-0123", "not ASCII"),
        ("sk\u2011secret\u20110123", "not ASCII"),
        (f"\ufeff{KEY}", "byte order mark"),
        ("  \t\n", "nothing but white space"),
        ("", "is empty"),
    ],
)
def test_keys_that_cannot_be_sent(key, says):
    fault = key_fault(key)
    assert says in fault
    assert not any(piece in fault for piece in ("sk-", "0123", "ключ"))
    assert key_fault(KEY) == ""


@pytest.mark.parametrize(
    "name",
    [
        *(
            "api_key",
            "apiKey",
            "API-KEY",
            "x-api-key",
            "OPENAI_API_KEY",
            "api_keys",
            "key",
            "Ocp-Apim-Subscription-Key",
        ),
        *("Authorization", "proxy-authorization", "token", "access_token", "hfToken", "id-token", "password", "Cookie"),
        *("client_secret", "aws_secret_access_key", "credentials", "private_key", "auth", "passwd"),
    ],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)
    assert redacted(json.dumps({"a": [{name: "hunter2"}]})) == json.dumps({"a": [{name: "***"}]})


@pytest.mark.parametrize(
    "name",
    [
        *(
            "max_tokens",
            "max_completion_tokens",
            "stop_token_ids",
            "stop_token",
            "prompt_cache_key",
            "keyword",
            "author",
        ),
        *("skip_special_tokens", "seed", "user", "reasoning_effort", "tokenizer", "monkey", "", "eos_token", "公钥"),
    ],
)
def test_names_of_settings(name):
    text = json.dumps({name: "hunter2"})
    assert not is_secret_name(name)
    assert redacted(text) is text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@h/v1 is", "http://***@h/v1 is"),
        ("http://me:pass/w#rd@h/v1", "http://***@h/v1"),
        ("https://h/v1?a=1&api_key=hunter2&b=2", "https://h/v1?a=1&api_key=***&b=2"),
        ("--config.remote.user.api_key=hunter2 is no field", "--config.remote.user.api_key=*** is no field"),
        ('{"api_key": "hunter2", "x": 2', '{"api_key": "***", "x": 2'),
        ("{'Authorization': 'Bearer hunter2'}", "{'Authorization': '***'}"),
        ('"{\\"token\\": \\"hunter2\\"}"', '"{\\"token\\": \\"***\\"}"'),
        ("seed=3, http://h:80/v1, max_tokens=5", "seed=3, http://h:80/v1, max_tokens=5"),
    ],
)
def test_likely_places(text, shown):
    assert without_credentials(text) == shown


def test_secret_values_of_settings():
    extra = {"headers": {"Authorization": "Bearer abc"}, "to": "http://me:p%40w@h?key=k1", "max_tokens": 5, "n": ["x"]}
    assert set(secret_values(extra)) == {"Bearer abc", "abc", "p%40w", "p@w", "k1"}
    hidden = guarded(extra)
    assert hidden == extra
    assert "abc" not in repr(hidden)
    assert "k1" not in repr(hidden)
    assert "'x'" in repr(hidden)
    assert f"{Secret('abc')}" == "abc"
