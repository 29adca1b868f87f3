"""Fields of the alarms: a metric beyond its limit stops the run (`rlver_jax/training/alarms.py`)."""

from rlver_jax.config.schema import COUNT, SHARE, Field

ALARMS = {
    "readable_min": Field(
        0.5,
        "least share of replies that are valid text, end by themselves, don't go in circles",
        range=SHARE,
        free=True,
    ),
    "reply_tokens_min": Field(1.0, "least mean length of a reply", range=COUNT, unit="tokens", free=True),
    "reply_tokens_max": Field(0.0, "largest mean length; 0: no limit", range=COUNT, unit="tokens", free=True),
    "entropy_min": Field(0.0, "least mean entropy of the policy", range=COUNT, unit="nats", free=True),
    "entropy_max": Field(8.0, "largest (uniform over Qwen's vocabulary: 11.9)", range=COUNT, unit="nats", free=True),
    "ratio_max": Field(100.0, "largest ratio of any token within an update; 0: no limit", range=COUNT, free=True),
    "change_entropy_min": Field(
        0.0, "least entropy of the user's changes in a step (21 alike: 3.04)", range=COUNT, unit="nats", free=True
    ),
    "change_at_limit_max": Field(
        1.0, "largest share of changes at emotion.max_change, up or down; 0: no limit", range=SHARE, free=True
    ),
    "unreadable_max": Field(
        0.5,
        "largest share of dialogues that end because an appraisal can't be read; an evaluation beyond it has no score; "
        "0: no limit",
        range=SHARE,
        free=True,
    ),
    "kl_max": Field(
        1.0, "largest KL that one step may move the policy by, a token", range=COUNT, unit="nats", free=True
    ),
}
