"""What a batch of dialogues amounts to: emotions, ends, tokens, and how readable the policy's replies are.

On the host, from arrays that the log needs anyway, while the device plays the next batch.
"""

from collections.abc import Sequence

import numpy as np

from rlver_jax.rollout.sampler import END_REASONS, Dialogues
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.emotion import SAGE

LONGEST_PERIOD = 16  # tokens of a phrase whose repetition is looked for
REPEATS = 4  # times that a phrase must follow upon itself
SHORTEST_LOOP = 12  # tokens: shorter ones, such as "哈哈哈", are how people write


def dialogue_metrics(dialogues: Dialogues, reward: np.ndarray) -> dict[str, float]:
    """`emotion/…`, `dialogue/…`, `reward/…`, `tokens/…` of a batch (on the host) without padding rows.

    Args:
        reward: float32 [B], of each dialogue.
    """
    d, rows = dialogues, np.arange(len(dialogues.turns))
    last = d.emotions[rows, d.turns]
    outcome = np.array([SAGE.outcome(int(emotion)) for emotion in last])
    ends = {f"dialogue/end_{name}": float(np.mean(d.end_reason == i)) for i, name in enumerate(END_REASONS) if i}
    return ends | {
        "emotion/final_mean": float(last.mean()),
        "emotion/final_std": float(last.std()),
        "emotion/change_mean": float(d.user.change[d.appraised].mean()) if d.appraised.any() else 0.0,
        "dialogue/success_rate": float(np.mean(outcome == 1)),
        "dialogue/failure_rate": float(np.mean(outcome == -1)),
        "dialogue/turns_mean": float(d.turns.mean()),
        "dialogue/occupancy": float(d.turns.sum() / d.row_turns),
        "dialogue/step_occupancy": float(generated_count(d) / d.row_steps),
        "reward/mean": float(reward.mean()),
        "reward/std": float(reward.std()),
        "tokens/generated": float(generated_count(d)),
        "tokens/prefilled": float(prefilled_count(d)),
    }


def generated_count(d: Dialogues) -> int:
    """Tokens that the two models generated, stop tokens included (made-up first utterances left out)."""
    return int(d.policy.said.count.sum() + d.user.appraisal.count.sum() + d.user.reply.count.sum())


def prefilled_count(d: Dialogues) -> int:
    """Tokens that both models read without having generated them just there, prefixes included."""
    return int(d.prefix_tokens) + int(d.policy.prefilled.sum()) + int(d.user.prefilled.sum())


def reply_metrics(dialogues: Dialogues, tokenizer: Tokenizer) -> dict[str, float]:
    """`reply/…`: figures of the policy's replies in a batch (on the host); empty without any reply.

    Raises nothing: a token that is no text counts against `reply/readable_share`.
    """
    said, turns = dialogues.policy, np.asarray(dialogues.turns)
    played = np.argwhere(np.arange(said.say_count.shape[0])[:, None] < turns)
    if not len(played):
        return {}
    replies = [said.say[t, b, : said.say_count[t, b]] for t, b in played]
    stopped = [bool(said.said.stopped[t, b]) for t, b in played]
    readable = [is_readable(tokenizer, reply.tolist(), end) for reply, end in zip(replies, stopped, strict=True)]
    return {
        "reply/readable_share": float(np.mean(readable)),
        "reply/stopped_share": float(np.mean(stopped)),
        "reply/tokens_mean": float(np.mean([len(reply) for reply in replies])),
        "reply/all_tokens_mean": float(np.mean([said.said.count[t, b] for t, b in played])),
        "reply/violation_share": float(np.mean([said.violation[t, b] for t, b in played])),
    }


def is_readable(tokenizer: Tokenizer, tokens: Sequence[int], stopped: bool) -> bool:
    """A reply that says something, ends by itself, is valid UTF-8 and doesn't go round in a loop."""
    text = b"".join(tokenizer.token_bytes(int(token)) for token in tokens)
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return stopped and bool(text.strip()) and not _loops(np.asarray(tokens))


def _loops(tokens: np.ndarray) -> bool:
    """Whether some phrase of up to LONGEST_PERIOD tokens follows upon itself REPEATS times or more."""
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // REPEATS) + 1):
        same = tokens[period:] == tokens[:-period]
        ends = np.flatnonzero(np.append(~same, True))
        longest = int(np.max(np.diff(ends, prepend=-1)) - 1)  # run of tokens that equal the one a period before
        if longest + period >= max(REPEATS * period, SHORTEST_LOOP):
            return True
    return False
