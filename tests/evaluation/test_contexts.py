"""Which recorded dialogues are compared: whole profiles by their ids, and as many contexts as are asked for."""

import json

import pytest
from absl import flags
from scipy import stats

from rlver_jax.config.validate import ConfigError
from rlver_jax.evaluate import main
from rlver_jax.evaluation.contexts import chosen, define_flags
from tests.evaluation.test_transcripts import write

# `printf p6 | sha256sum` begins with 7d087a…, those of p0, p11 and p2 with 169b5b…, 274c9c… and 3946ca…: as
# fractions of all ones 0.49, 0.09, 0.154 and 0.224.
COUNTS, PROFILES = [3, 6, 4, 1, 6], ["p6", "p0", "p11", "p2", "p0"]


def options(**overrides):
    values = flags.FlagValues()
    flags.DEFINE_string("agreement", "FILE", "", flag_values=values)
    define_flags(values)
    values(["", *(f"--{name}={value}" for name, value in overrides.items())])
    return values


@pytest.mark.parametrize(
    ("share", "want"), [(0.1, [1, 4]), (0.21, [1, 2, 4]), (0.3, [1, 2, 3, 4]), (1, [0, 1, 2, 3, 4])]
)
def test_held_out_profiles_keep_all_their_dialogues(share, want):
    assert chosen(COUNTS, PROFILES, options(held_out=share), 0) == want


def test_contexts_are_drawn_among_what_is_held_out():
    draws = [chosen(COUNTS, PROFILES, options(held_out=0.21, contexts=7), seed) for seed in range(20)]
    assert {tuple(sorted(one)) for one in draws} == {(1, 2), (1, 4), (2, 4)}, "two of the three hold 7 contexts"
    assert chosen(COUNTS, PROFILES, options(), 0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"held_out": 0.01}, "none of the 4 profiles is among the held-out ones; give a larger share"),
        ({"held_out": 0.1, "contexts": 13}, "hold 12 appraised replies"),
    ],
)
def test_too_few(overrides, says):
    with pytest.raises(ConfigError, match=says):
        chosen(COUNTS, PROFILES, options(**overrides), 0)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--agreement=FILE", "--held_out=0"], "--held_out=0.0: expected a share of the profiles above 0 and up to 1"),
        (["--agreement=FILE", "--held_out=30"], "--held_out=30.0: expected a share"),
        (["--agreement=FILE", "--held_out=nan"], "--held_out=nan: expected a share"),
        (["--agreement=FILE", "--held_out=some"], "held_out"),
        (["--from=FILE", "--held_out=0.3"], "--held_out=0.3: selects among the files of --agreement"),
        (["--config=configs/debug.py", "--out=nowhere", "--held_out=0.3"], "--held_out=0.3: selects among the files"),
    ],
)
def test_bad_usage(args, says, results, tmp_path, capsys):
    file = write(tmp_path / "r.jsonl", results)
    assert main([one.replace("FILE", str(file)) for one in args]) == 2
    assert says in capsys.readouterr().err


def test_without_a_config_the_record_speaks_alone(results, tmp_path, capsys):
    """Of the held-out 5, -3, 0 · -10, -10, -10, -5 · 4, from 40 on."""
    file = write(tmp_path / "r.jsonl", results)
    assert main([f"--agreement={file}", "--held_out=0.3", f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "first replies" in out
    assert "no --config was given: only what needs no model" in out
    assert list(tmp_path.glob("out/*")) == [tmp_path / "out" / "agreement.json"]
    result = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert result.keys() == {"record"}
    assert (result["record"]["n"], result["record"]["dialogues"]) == (8, 3)
    recorded = [5, -3, 0, -10, -10, -10, -5, 4]
    emotion = [40, 45, 42, 40, 30, 20, 10, 40]
    previous = [0, 5, -3, 0, -10, -10, -10, 0]
    alone = result["record"]["without_the_reply"]
    assert alone["emotion"]["spearman"]["value"] == pytest.approx(stats.spearmanr(emotion, recorded).statistic)
    assert alone["previous_change"]["spearman"]["value"] == pytest.approx(stats.spearmanr(previous, recorded).statistic)
    assert alone["constant"]["mae"]["value"] == pytest.approx((9 + 1 + 4 + 6 + 6 + 6 + 1 + 8) / 8), "median -4"
