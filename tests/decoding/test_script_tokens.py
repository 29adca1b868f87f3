"""Compiled scripts against string formatting, and running them against a loop over whole texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.decoding.grammar import one_line
from rlver_jax.decoding.script import compile_script, parse_script, run_fields
from rlver_jax.user.emotion import BANDS
from rlver_jax.user.prompts import LANGUAGES, load_prompts
from tests.conftest import appended, literals, plain

SLOTS = {"emotion": [str(n) for n in range(101)], "band": BANDS}
TEXTS = {
    "both": 'At {emotion}, "{band}".\nHeard:<<free:a>>\nFeel, {band}:<<free:b>>\nChange:\n<<choose:change>>',
    "band first": "{band}{emotion}:<<free:a>>\n{emotion}!<<free:b>>",
    "none": "a:<<free:a>>\nb:<<free:b>>",
}


def rendered(script, emotion, band):
    tokens, counts = jax.device_get(jax.jit(script.render)(jnp.asarray(emotion), jnp.asarray(band)))
    return [[tokens[f, b, : counts[f, b]].tolist() for b in range(len(emotion))] for f in range(len(tokens))]


@pytest.mark.parametrize("name", TEXTS)
def test_every_emotion_and_band_renders_as_formatted_text(name, tokenizer):
    """All 505 pairs at once, byte for byte; and the same emotions for every row in any order."""
    script = compile_script(parse_script(TEXTS[name]), tokenizer, SLOTS)
    emotion, band = (x.ravel() for x in np.meshgrid(np.arange(101), np.arange(5)))
    fields = rendered(script, emotion, band)
    assert len(fields) == len(script.names)
    for b in range(len(emotion)):
        for f, want in enumerate(literals(TEXTS[name], int(emotion[b]), BANDS[band[b]])):
            assert tokenizer.decode(fields[f][b]) == want
        on_host = jax.device_get(script).literals(int(emotion[b]), int(band[b]))
        assert on_host == [fields[f][b] for f in range(len(fields))]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("which", ["appraisal", "reply"])
def test_shipped_scripts_are_what_a_tokenizer_makes_of_the_whole_text(language, which, bpe):
    """No merge crosses a slot's border: encoding the formatted literal at once gives the same ids."""
    prompts = load_prompts(language)
    from importlib import resources

    file = resources.files("rlver_jax.user.prompts") / language / f"{which}.script"
    script = compile_script(getattr(prompts, which), bpe, SLOTS)
    emotion = np.arange(101)
    band = np.digitize(emotion, [10, 40, 70, 100])  # F, C, B, A, S
    fields = rendered(script, emotion, 4 - band)
    for n in range(101):
        for f, want in enumerate(literals(file.read_text(encoding="utf-8"), n, "FCBAS"[band[n]])):
            assert fields[f][n] == bpe.encode(want)


@pytest.mark.real
@pytest.mark.parametrize("language", LANGUAGES)
def test_shipped_scripts_with_the_real_tokenizer(language, qwen):
    for which in ("appraisal", "reply"):
        test_shipped_scripts_are_what_a_tokenizer_makes_of_the_whole_text(language, which, qwen)


def test_bad_scripts_are_refused(bpe):
    with pytest.raises(ValueError, match="stands twice"):
        compile_script(parse_script("{band} {band}:<<free:a>>"), bpe, SLOTS)
    with pytest.raises(ValueError, match="at most 101 values"):
        compile_script(parse_script("{band}:<<free:a>>"), bpe, SLOTS | {"band": ["x"] * 102})


ROWS = ["Go on.\n", "my boss did not listen.\n", "I\n", "felt awful 2024\n"]
SCRIPT = "At {emotion}:<<free:a>>\nFeel {band}:<<free:b>>\nSay:<<free:c>>"
run = jax.jit(run_fields, static_argnames="max_tokens")


def by_hand(lm, tokenizer, row, emotion, band, limits):
    """Greedy lines by full forward passes over the text so far: ([tokens of each field], ended, whole context)."""
    stops = (tokenizer.im_end_id, tokenizer.pad_id)
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    context, fields, ended = list(row), [], []
    for literal, limit in zip(literals(SCRIPT, emotion, band), limits, strict=True):
        context += tokenizer.encode(literal)
        tokens, stopped = [], False
        while len(tokens) < limit and not stopped:
            logp = plain(lm, [context + tokens], batch=1)[1][0][-1].copy()
            for token in range(len(logp)):
                piece = pieces[token] if token < len(pieces) else b""
                blank = not piece.strip() if not tokens else (piece == b"" and token not in stops)
                if blank or piece.find(b"\n") > 0:
                    logp[token] = -np.inf
            tokens.append(int(np.argmax(logp)))
            stopped = tokens[-1] in stops or b"\n" in pieces[tokens[-1]]
        context += tokens[: len(tokens) - stopped]
        fields.append(tokens)
        ended.append(stopped)
    return fields, ended, context


def test_fields_continue_rightly_however_they_ended(user_lm, bpe):
    """Cut by its limit or stopped by its line end, the next literal follows with one line end of its own."""
    script = compile_script(parse_script(SCRIPT), bpe, SLOTS)
    rows = [bpe.encode(text) for text in ROWS]
    emotion, band, limits = np.array([7, 30, 100, 55]), np.array([4, 3, 0, 2]), np.array([2, 9, 4])
    active = np.array([True, True, True, False])
    keys = jax.random.split(jax.random.key(0), (3, 4))
    cache, generated = run(
        user_lm,
        appended(user_lm, rows, 160),
        script.render(jnp.asarray(emotion), jnp.asarray(band)),
        keys,
        one_line(bpe, user_lm.model.config.vocab_size),
        max_tokens=12,
        limits=jnp.asarray(limits),
        temperatures=jnp.zeros(3),
        active=active,
    )
    ways = set()
    for b in range(3):
        fields, ended, context = by_hand(user_lm, bpe, rows[b], emotion[b], BANDS[band[b]], limits)
        for f, tokens in enumerate(fields):
            assert generated.tokens[f, b, : generated.count[f, b]].tolist() == tokens
            assert generated.stopped[f, b] == ended[f]
        assert cache.length[b] == len(context)
        ways |= set(ended)
    assert ways == {True, False}, "both ways of ending occur"
    assert cache.length[3] == len(rows[3])
    assert not generated.count[:, 3].any()
