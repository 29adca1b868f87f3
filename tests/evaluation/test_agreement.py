"""Figures of agreement against numbers worked out by hand, and what is reached without a look at the reply."""

import math

import numpy as np
import pytest
from scipy import stats

from rlver_jax.evaluation import agreement as module
from rlver_jax.evaluation.agreement import agreement, value_of, without_the_reply


def turns(*pairs):
    """The turns of one dialogue at emotion 50 from (own, recorded) changes."""
    before = [0, *(recorded for _, recorded in pairs)]
    return np.array([(50, own, recorded, before[i], i) for i, (own, recorded) in enumerate(pairs)])


def played(changes, own=None, start=40):
    """The turns of one dialogue from recorded changes, whose sums are the emotions."""
    emotions, before = np.cumsum([start, *changes]), [0, *changes]
    own = changes if own is None else own
    return np.array([(emotions[i], own[i], change, before[i], i) for i, change in enumerate(changes)])


# Emotions 40 45 42 · 40 50 60 · 40 30; changes 5 -3 0 · 10 10 4 · -10 -5.
DIALOGUES = [played([5, -3, 0]), played([10, 10, 4]), played([-10, -5])]
EMOTION = [40, 45, 42, 40, 50, 60, 40, 30]
RECORDED = [5, -3, 0, 10, 10, 4, -10, -5]
PREVIOUS = [0, 5, -3, 0, 10, 10, 0, -10]


def many(seed, weight):
    """Twelve dialogues of four profiles; a judge whose changes follow the emotion, and with `weight` the record too."""
    draw = np.random.default_rng(seed)
    dialogues = []
    for _ in range(12):
        rows = played(draw.integers(-10, 11, 8))
        rows[:, 0] = np.clip(rows[:, 2] * 3 + draw.integers(20, 80, 8), 0, 100)
        rows[:, 1] = rows[:, 0] // 10 + draw.integers(-3, 4, 8) + weight * rows[:, 2]
        dialogues.append(rows)
    return dialogues, [i % 4 for i in range(12)]


def test_figures_by_hand():
    # own: 1 2 3 4 5; recorded: 2 1 4 3 5. Rank differences 1 1 1 1 0: rho = 1 - 6 * 4 / (5 * 24) = 0.8.
    groups = [turns((1, 2), (2, 1)), turns((3, 4), (4, 3), (5, 5))]
    result = agreement(groups)
    assert (result["n"], result["dialogues"]) == (5, 2)
    assert result["spearman"]["value"] == pytest.approx(0.8)
    assert result["pearson"]["value"] == pytest.approx(0.8)  # ranks are the values
    assert result["mae"]["value"] == pytest.approx(0.8)
    assert result["sign_agreement"]["value"] == 1
    assert result["mae_of_the_median"] == pytest.approx((2 + 1 + 0 + 1 + 2) / 5)  # of 1 2 3 4 5 around 3
    low, high = result["mae"]["interval"]  # drawn groups give 1 (twice the first), 2/3 or 0.8
    assert (low, high) == (pytest.approx(2 / 3), pytest.approx(1))


def test_signs():
    groups = [turns((0, 0), (1, 0)), turns((-2, -7), (3, -3))]
    assert agreement(groups)["sign_agreement"]["value"] == 0.5


def test_ties_share_ranks():
    # own 0 0 1 has ranks 1.5 1.5 3, recorded 1 2 3: covariance 1.5/2, deviations sqrt(1.5/2) and 1.
    assert value_of("spearman", turns((0, 1), (0, 2), (1, 3))) == pytest.approx(0.75 / math.sqrt(0.75))


def test_a_judge_that_never_varies_has_no_correlation():
    groups = [turns((3, 1), (3, -2)), turns((3, 4))]
    result = agreement(groups)
    assert result["spearman"] == result["pearson"] == {"value": None, "interval": None}
    assert result["spearman_given_emotion"] == result["spearman_given_past"] == {"value": None, "interval": None}
    assert result["mae"]["value"] == pytest.approx((2 + 5 + 1) / 3)
    assert math.isnan(value_of("pearson", turns((1, 2))))


def test_confusion_of_bands():
    """Emotions after the turn, kept within 0 and 100."""
    rows = [(95, 9, 5), (95, 4, 10), (65, 5, 4), (42, -3, -2), (12, -3, -2), (40, 5, 5)]
    result = agreement([np.array([(*row, 0, 0) for row in rows]), np.array([(3, -10, -5, 0, 0)])])
    table = result["band_confusion"]
    assert table["S"] == {"S": 1, "A": 1, "B": 0, "C": 0, "F": 0}
    assert table["A"] == {"S": 0, "A": 0, "B": 0, "C": 0, "F": 0}
    assert table["B"] == {"S": 0, "A": 1, "B": 1, "C": 1, "F": 0}
    assert table["C"] == {"S": 0, "A": 0, "B": 0, "C": 0, "F": 1}
    assert table["F"] == {"S": 0, "A": 0, "B": 0, "C": 0, "F": 1}
    assert result["band_agreement"]["value"] == pytest.approx(3 / 7)


@pytest.mark.parametrize("name", ["mae", "spearman", "spearman_given_emotion"])
def test_profiles_are_drawn_whole(name):
    """Dialogues with one profile, whether they are one or three, are drawn together."""
    dialogues, profiles = many(6, weight=1)
    joined = [np.concatenate(dialogues[i::4]) for i in range(4)]
    result, expected = agreement(dialogues, profiles), agreement(joined)
    assert (result["dialogues"], expected["dialogues"]) == (12, 4)
    assert result[name] == expected[name]
    assert result[name]["interval"] != agreement(dialogues)[name]["interval"]


def test_resamples_in_parts_are_the_same(monkeypatch):
    """Weights of all resamples at once would take 2,000 times as much memory as the turns."""
    whole = without_the_reply(*many(10, weight=1))
    monkeypatch.setattr(module, "DRAWN_AT_ONCE", 7_000)  # 96 turns: 73 resamples, which 2,000 is no multiple of
    assert without_the_reply(*many(10, weight=1)) == whole


def partial_by_residuals(turns, controls):
    """Correlation of the ranks' residuals of least squares on a constant and the ranks of columns."""
    known = np.column_stack([np.ones(len(turns))] + [stats.rankdata(turns[:, column]) for column in controls])
    own, recorded = (stats.rankdata(turns[:, column]) for column in (1, 2))
    own, recorded = (one - known @ np.linalg.lstsq(known, one, rcond=None)[0] for one in (own, recorded))
    return np.corrcoef(own, recorded)[0, 1]


@pytest.mark.parametrize(("name", "controls"), [("spearman_given_emotion", [0]), ("spearman_given_past", [0, 3])])
def test_partial_correlations_and_their_intervals(name, controls):
    dialogues, profiles = many(7, weight=1)
    result = agreement(dialogues, profiles)[name]
    assert result["value"] == pytest.approx(partial_by_residuals(np.concatenate(dialogues), controls))
    clusters = [np.concatenate(dialogues[i::4]) for i in range(4)]
    draws = np.random.default_rng(5).integers(0, 4, (4_000, 4))
    values = [partial_by_residuals(np.concatenate([clusters[i] for i in draw]), controls) for draw in draws]
    np.testing.assert_allclose(result["interval"], np.percentile(values, [2.5, 97.5]), atol=0.03)


def test_a_judge_that_only_knows_the_emotion_is_found_out():
    deaf, hears = (agreement(*many(8, weight=weight)) for weight in (0, 1))
    assert deaf["spearman"]["value"] > 0.5, "it looks as if it agreed"
    low, high = deaf["spearman_given_emotion"]["interval"]
    assert low < 0 < high
    assert hears["spearman_given_emotion"]["interval"][0] > 0.5


def test_first_and_later_replies_apart():
    own = [np.array([1, 2, 3]), np.array([3, 9, 8]), np.array([-4, -7])]
    dialogues = [one.copy() for one in DIALOGUES]
    for one, changes in zip(dialogues, own, strict=True):
        one[:, 1] = changes
    result = agreement(dialogues)
    first, later = result["first_replies"], result["later_replies"]
    assert (first["n"], later["n"]) == (3, 5)
    assert first["mae"]["value"] == pytest.approx((abs(1 - 5) + abs(3 - 10) + abs(-4 + 10)) / 3)
    assert first["spearman"]["value"] == pytest.approx(1), "1 3 -4 in the order of 5 10 -10"
    assert first["spearman_given_emotion"] == first["spearman_given_past"] == first["spearman"], "all begin at 40"
    assert later["mae"]["value"] == pytest.approx((5 + 3 + 1 + 4 + 2) / 5)
    assert later["spearman"]["value"] == pytest.approx(stats.spearmanr([2, 3, 9, 8, -7], [-3, 0, 10, 4, -5])[0])
    only = agreement([one[:1] for one in dialogues])
    assert "later_replies" not in only
    assert only["first_replies"]["n"] == 3


def test_what_needs_no_look_at_the_reply():
    result = without_the_reply(DIALOGUES)
    emotion, previous, constant = result["emotion"], result["previous_change"], result["constant"]
    assert emotion["spearman"]["value"] == pytest.approx(stats.spearmanr(EMOTION, RECORDED).statistic)
    line = np.polyval(np.polyfit(EMOTION, RECORDED, 1), EMOTION)
    assert emotion["mae"]["value"] == pytest.approx(np.abs(line - RECORDED).mean())
    assert emotion["sign_agreement"]["value"] == pytest.approx((np.sign(line) == np.sign(RECORDED)).mean())
    assert emotion["spearman_given_emotion"] == {"value": None, "interval": None}
    assert previous["spearman"]["value"] == pytest.approx(stats.spearmanr(PREVIOUS, RECORDED).statistic)
    assert previous["mae"]["value"] == pytest.approx((5 + 8 + 3 + 10 + 0 + 6 + 10 + 5) / 8)
    assert previous["sign_agreement"]["value"] == pytest.approx(3 / 8), "after 10 comes 10, 4, after -10 comes -5"
    assert previous["spearman_given_past"] == {"value": None, "interval": None}
    assert constant["spearman"] == {"value": None, "interval": None}
    assert constant["mae"]["value"] == pytest.approx((3 + 5 + 2 + 8 + 8 + 2 + 12 + 7) / 8), "the median is 2"
    assert constant["sign_agreement"]["value"] == 4 / 8
    assert all(low <= one["mae"]["value"] <= high for one in result.values() for low, high in [one["mae"]["interval"]])


def test_parts_of_what_needs_no_look_at_the_reply():
    result = without_the_reply(DIALOGUES)
    assert "first_replies" not in result["emotion"] | result["previous_change"], "there they say the same everywhere"
    assert result["constant"]["first_replies"]["mae"]["value"] == pytest.approx((0 + 5 + 15) / 3), "the median is 5"
    later = result["previous_change"]["later_replies"]
    assert later["n"] == 5
    assert later["spearman"]["value"] == pytest.approx(stats.spearmanr([5, -3, 10, 10, -10], [-3, 0, 10, 4, -5])[0])
    other = without_the_reply([*DIALOGUES, played([3, 3], start=60)])
    assert other["emotion"]["first_replies"]["spearman"]["value"] == pytest.approx(
        stats.spearmanr([40, 40, 40, 60], [5, 10, -10, 3]).statistic
    ), "an emotion that differs at the start may explain something"


def test_own_changes_say_nothing_about_baselines():
    dialogues, profiles = many(9, weight=0)
    others = [np.column_stack([one[:, 0], -one[:, 1], one[:, 2:]]) for one in dialogues]
    assert without_the_reply(dialogues, profiles) == without_the_reply(others, profiles)
