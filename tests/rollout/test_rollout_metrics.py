"""Figures of a batch against what its script says, and what counts as a readable reply."""

import dataclasses

import jax
import numpy as np
import pytest

from rlver_jax.dialogues.log import generated_tokens
from rlver_jax.rollout.rollout_metrics import (
    ROLLOUT_METRICS,
    generated_count,
    is_readable,
    prefilled_count,
    rollout_metrics,
)

EMOTION = [43, 60, 40, 40, 30, 40]  # after the last turn of each dialogue of the script, which all begin at 40


@pytest.fixture(scope="module")
def six(played):
    """The six dialogues without the padding rows; a batch of training has none."""
    d = played.dialogues

    def rows(x):
        batch = [i for i, size in enumerate(x.shape) if size == 9]
        return np.take(x, range(6), axis=batch[0]) if batch else x

    return jax.tree.map(rows, d)


REWARD = np.array([0.43, 0.6, 0, 0.4, 0, 0.5], np.float32)


def test_dialogue_metrics_follow_the_script(six, bpe):
    metrics = rollout_metrics(six, REWARD, bpe)
    # dialogue 0 has changes 5, -3 and 0 (from the last turn); 1: 10, 10; 3: 0; 4: -10; 2 and 5: no appraisal
    assert metrics["emotion/change_mean"] == pytest.approx((5 - 3 + 0 + 10 + 10 + 0 - 10) / 7)
    assert metrics["emotion/change_at_limit_share"] == pytest.approx(3 / 7)
    shares = np.array([1, 1, 2, 2, 1]) / 7
    assert metrics["emotion/change_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    final = [42, 60, 40, 40, 30, 40]
    assert metrics["emotion/final_mean"] == pytest.approx(np.mean(final))
    assert metrics["emotion/final_std"] == pytest.approx(np.std(final))
    assert metrics["dialogue/turns_mean"] == pytest.approx((3 + 2 + 1 + 1 + 2 + 0) / 6)
    assert metrics["dialogue/occupancy"] == pytest.approx(9 / 12), "turns played of those that there was room for"
    assert metrics["dialogue/step_occupancy"] == pytest.approx(generated_count(six) / 400)
    ends = {name.removeprefix("dialogue/end_"): x for name, x in metrics.items() if name.startswith("dialogue/end_")}
    by_hand = {"turn_limit": 1, "success": 1, "format": 2, "goodbye": 1, "context": 1, "failure": 0}
    assert ends == pytest.approx({name: count / 6 for name, count in by_hand.items()})
    assert metrics["dialogue/success_rate"] == metrics["dialogue/failure_rate"] == 0, "SAGE's: 100, below 10"
    assert metrics["reward/mean"] == pytest.approx(np.mean([0.43, 0.6, 0, 0.4, 0, 0.5]))


def test_token_counts_are_those_of_the_records(six, played_records, played_profiles, bpe):
    made_up = 3 * len(bpe.encode("我 felt awful"))  # first words of the second profile's three dialogues
    assert played_profiles[1].first_talk is None
    assert generated_count(six) == sum(map(generated_tokens, played_records)) - made_up > 84
    assert prefilled_count(six) == six.prefix_tokens + six.policy.prefilled.sum() + six.user.prefilled.sum()


def test_reply_metrics_leave_out_turns_that_were_not_played(six, bpe):
    metrics = rollout_metrics(six, REWARD, bpe)
    says = ["did not", "她 2024", "said", "my sister.", "said goodbye", "", "felt awful.\nI did", "felt", ""]
    assert metrics["reply/tokens_mean"] == pytest.approx(np.mean([len(bpe.encode(say)) for say in says]))
    assert metrics["reply/stopped_share"] == pytest.approx(8 / 9)
    assert metrics["reply/violation_share"] == pytest.approx(2 / 9)
    assert metrics["reply/readable_share"] == pytest.approx(6 / 9), "one was cut, two broke the format"


def test_a_batch_without_a_reply_has_no_metrics_of_replies(six, bpe):
    silent = dataclasses.replace(six, turns=np.zeros(6, np.int32), appraised=np.zeros_like(six.appraised))
    metrics = rollout_metrics(silent, REWARD, bpe)
    of_changes = {"emotion/change_entropy", "emotion/change_at_limit_share"}
    assert metrics.keys() == {name for name in ROLLOUT_METRICS if not name.startswith("reply/")} - of_changes
    assert (metrics["dialogue/turns_mean"], metrics["emotion/change_mean"]) == (0, 0)
    assert metrics["emotion/final_mean"] == 40, "what all began with"


def test_a_new_metric_is_an_entry_of_the_table(six, bpe, monkeypatch):
    monkeypatch.setitem(ROLLOUT_METRICS, "emotion/lowest", lambda batch: batch.final_emotions.min())
    assert rollout_metrics(six, REWARD, bpe)["emotion/lowest"] == 30


@pytest.mark.parametrize(
    ("text", "stopped", "readable"),
    [
        ("I felt awful.", True, True),
        ("I felt awful.", False, False),
        ("", True, False),
        (" \n", True, False),
        ("哈哈哈哈", True, True),
        ("不" * 12, True, False),
        ("no " * 20, True, False),
        ("I did not. " * 3 + "she felt awful and said goodbye", True, True),
        ("I did not listen. " * 8, True, False),
        ("and then " + "she said goodbye, " * 6 + "well.", True, False),
    ],
)
def test_readable(bpe, text, stopped, readable):
    assert is_readable(bpe, bpe.encode(text), stopped) is readable


def test_half_a_character_is_not_readable(spm):
    (half,) = [t for t in range(spm.vocab_size) if spm.token_bytes(t) == b"\xe6"]
    assert not is_readable(spm, [half], True)
