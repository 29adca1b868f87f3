"""Metrics of a batch of dialogues: emotions, ends, tokens, and how readable the policy's replies are.

On the host, from arrays that the log needs anyway, while the device plays the next batch. A new metric is a function of
`RolloutBatch` and an entry of `ROLLOUT_METRICS`, at the end.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlver_jax.rollout.end_reason import END_REASONS
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.emotion import CHANGES, SAGE

LONGEST_PERIOD = 16  # tokens of a phrase whose repetition is looked for
REPEATS = 4  # times that a phrase must follow upon itself
SHORTEST_LOOP = 12  # tokens: shorter ones, such as "哈哈哈", are how people write


Metric = Callable[["RolloutBatch"], Any]  # -> a number, or None where the batch has nothing to measure


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """A finished batch on the host, without padding rows, and what several metrics need of it.

    Attributes:
        reward: float32 [B], of each dialogue.
    """

    dialogues: Dialogues
    reward: np.ndarray
    tokenizer: Tokenizer
    max_change: int = CHANGES[-1]  # of the emotion, by one reply

    @functools.cached_property
    def final_emotions(self) -> np.ndarray:
        """int [B]."""
        return np.asarray(self.dialogues.emotions)[np.arange(len(self.dialogues.turns)), self.dialogues.turns]

    @functools.cached_property
    def outcomes(self) -> np.ndarray:
        """int [B]: SAGE's 1 success, -1 failure, 0 neither."""
        return np.array([SAGE.outcome(int(emotion)) for emotion in self.final_emotions])

    @functools.cached_property
    def replied(self) -> np.ndarray:
        """int [N, 2]: (turn, dialogue) of each reply of the policy."""
        turns = np.asarray(self.dialogues.turns)
        return np.argwhere(np.arange(self.dialogues.policy.say_count.shape[0])[:, None] < turns)

    @functools.cached_property
    def replies(self) -> list[np.ndarray]:
        """Tokens of each reply, as the user hears it."""
        policy = self.dialogues.policy
        return [np.asarray(policy.say[t, b, : policy.say_count[t, b]]) for t, b in self.replied]

    @functools.cached_property
    def stopped(self) -> list[bool]:
        """Whether each reply ended by itself."""
        return [bool(self.dialogues.policy.completion.stopped[t, b]) for t, b in self.replied]


def rollout_metrics(
    dialogues: Dialogues, reward: np.ndarray, tokenizer: Tokenizer, max_change: int = CHANGES[-1]
) -> dict[str, float]:
    """All ROLLOUT_METRICS that a batch has; those of replies are left out of a batch without any.

    Raises nothing: a token that is no text counts against `reply/readable_share`.
    """
    batch = RolloutBatch(dialogues, reward, tokenizer, max_change)
    values = {name: metric(batch) for name, metric in ROLLOUT_METRICS.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def generated_count(d: Dialogues) -> int:
    """Tokens that the two models generated, stop tokens included (made-up first utterances left out)."""
    return int(d.policy.completion.count.sum() + d.user.appraisal.count.sum() + d.user.reply.count.sum())


def prefilled_count(d: Dialogues) -> int:
    """Tokens that both models read without having generated them just there, prefixes included."""
    return int(d.prefix_tokens) + int(d.policy.prefilled.sum()) + int(d.user.prefilled.sum())


def is_readable(tokenizer: Tokenizer, tokens: Sequence[int], stopped: bool) -> bool:
    """A reply that isn't empty, ends by itself, is valid UTF-8 and doesn't go round in a loop."""
    text = b"".join(tokenizer.token_bytes(int(token)) for token in tokens)
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return stopped and bool(text.strip()) and not _loops(np.asarray(tokens))


def _loops(tokens: np.ndarray) -> bool:
    """Whether a phrase of up to LONGEST_PERIOD tokens follows upon itself REPEATS times or more."""
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // REPEATS) + 1):
        same = tokens[period:] == tokens[:-period]
        ends = np.flatnonzero(np.append(~same, True))
        longest = int(np.max(np.diff(ends, prepend=-1)) - 1)  # run of tokens that equal the one a period before
        if longest + period >= max(REPEATS * period, SHORTEST_LOOP):
            return True
    return False


def _end_share(reason: int, batch: RolloutBatch) -> float:
    return float(np.mean(batch.dialogues.end_reason == reason))


def _change_mean(batch: RolloutBatch) -> float:
    d = batch.dialogues
    return float(d.user.change[d.appraised].mean()) if d.appraised.any() else 0.0


def _change_at_limit_share(batch: RolloutBatch) -> float | None:
    changes = batch.dialogues.user.change[batch.dialogues.appraised]
    return float(np.mean(np.abs(changes) == batch.max_change)) if len(changes) else None


def _change_entropy(batch: RolloutBatch) -> float | None:
    """Of the changes that occur, in nats."""
    changes = np.asarray(batch.dialogues.user.change[batch.dialogues.appraised])
    if not len(changes):
        return None
    share = np.unique(changes, return_counts=True)[1] / len(changes)
    return float(-(share * np.log(share)).sum())


def _of_replies(metric: Metric) -> Metric:
    """The metric where there is a reply; None without any."""
    return lambda batch: metric(batch) if len(batch.replied) else None


def _readable_share(batch: RolloutBatch) -> float:
    ended = zip(batch.replies, batch.stopped, strict=True)
    return float(np.mean([is_readable(batch.tokenizer, reply.tolist(), stopped) for reply, stopped in ended]))


def _sampled_mean(batch: RolloutBatch) -> float:
    return float(np.mean([batch.dialogues.policy.completion.count[t, b] for t, b in batch.replied]))


def _violation_share(batch: RolloutBatch) -> float:
    return float(np.mean([batch.dialogues.policy.violation[t, b] for t, b in batch.replied]))


# {name in metrics.jsonl: function of a batch; None leaves the metric out}
ROLLOUT_METRICS: dict[str, Metric] = {
    **{f"dialogue/end_{name}": functools.partial(_end_share, i) for i, name in enumerate(END_REASONS) if i},
    "emotion/final_mean": lambda batch: batch.final_emotions.mean(),
    "emotion/final_std": lambda batch: batch.final_emotions.std(),
    "emotion/change_mean": _change_mean,
    "emotion/change_entropy": _change_entropy,
    "emotion/change_at_limit_share": _change_at_limit_share,
    "dialogue/success_rate": lambda batch: np.mean(batch.outcomes == 1),
    "dialogue/failure_rate": lambda batch: np.mean(batch.outcomes == -1),
    "dialogue/turns_mean": lambda batch: batch.dialogues.turns.mean(),
    "dialogue/occupancy": lambda batch: batch.dialogues.turns.sum() / batch.dialogues.row_turns,
    "dialogue/step_occupancy": lambda batch: generated_count(batch.dialogues) / batch.dialogues.row_steps,
    "reward/mean": lambda batch: batch.reward.mean(),
    "reward/std": lambda batch: batch.reward.std(),
    "tokens/generated": lambda batch: generated_count(batch.dialogues),
    "tokens/prefilled": lambda batch: prefilled_count(batch.dialogues),
    "reply/readable_share": _of_replies(_readable_share),
    "reply/stopped_share": _of_replies(lambda batch: np.mean(batch.stopped)),
    "reply/tokens_mean": _of_replies(lambda batch: np.mean([len(reply) for reply in batch.replies])),
    "reply/all_tokens_mean": _of_replies(_sampled_mean),
    "reply/violation_share": _of_replies(_violation_share),
}
