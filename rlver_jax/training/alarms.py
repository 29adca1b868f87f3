"""Metrics that tell when a policy collapses or its judge drifts, and the limits at which a run stops.

In RLVER's published training replies were garbage from step 2 on, and nothing stopped it.
"""

from collections.abc import Mapping

# metric: (field of config.alarms, whether a value above the limit is the fault, what it may mean)
_WATCHED = {
    "reply/readable_share": ("readable_min", False, "replies are garbled, repeat themselves or don't end"),
    "reply/tokens_mean": ("reply_tokens_min", False, "replies shrink to nothing"),
    "policy/entropy": ("entropy_min", False, "the policy says one thing only"),
    "emotion/change_entropy": ("change_entropy_min", False, "the user answers every reply with the same change"),
}
_WATCHED_ABOVE = {
    "reply/tokens_mean": ("reply_tokens_max", True, "replies grow without end"),
    "policy/entropy": ("entropy_max", True, "the policy speaks at random"),
    "policy/ratio_max": ("ratio_max", True, "the update left the region that its gradient is true for"),
    "policy/update_kl": ("kl_max", True, "one step changed the policy beyond recognition"),
    "emotion/change_at_limit_share": (
        "change_at_limit_max",
        True,
        "the user tells good replies from better ones no more",
    ),
    "dialogue/end_unreadable": ("unreadable_max", True, "the user's appraisals can't be read"),
}
_POLICY_REMEDY = "Lower train.learning_rate, hold the policy with loss.kl, or set another limit"
_USER_REMEDY = (
    "Look at the user's answers in the logged dialogues: its model or prompts must change, or set another limit"
)


class CollapseError(RuntimeError):
    """A metric is beyond its limit; the message names it, the limit and what may help."""


def check(metrics: Mapping[str, float], limits: Mapping[str, float], step: int) -> str | None:
    """What is wrong with a step's metrics, if anything: metric, limit, meaning, remedy.

    Args:
        limits: the fields of config.alarms; an upper limit of 0 is none. A value that is no number is beyond its limit.
    """
    for watched in (_WATCHED, _WATCHED_ABOVE):
        for name, (field, above, meaning) in watched.items():
            if name not in metrics or (above and not limits[field]):
                continue
            value, limit = metrics[name], limits[field]
            if not (value <= limit if above else value >= limit):
                return (
                    f"step {step}: {name} is {value:.4g}, {'above' if above else 'below'} alarms.{field}={limit:g}: "
                    f"{meaning}. {_POLICY_REMEDY if name.startswith(('reply/', 'policy/')) else _USER_REMEDY}"
                )
    return None
