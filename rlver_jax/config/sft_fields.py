"""Fields of supervised fine-tuning, `rlver sft` (docs/fitting.md); the rest is in the sections of `train`."""

from rlver_jax.config.schema import COUNT, POSITIVE, SHARE, Field

SFT = {
    "role": Field("policy", "who learns: user | policy; --role sets it", ("user", "policy")),
    "data": Field(
        "", "dialogues to learn from, comma-separated: logs of ours, SAGE's results, RLVER's logs; --data", path=True
    ),
    "batch": Field(16, "of an update", range=POSITIVE, unit="dialogues"),
    "weights": Field(
        "", "of fields' tokens in the loss, as change=4,reply=0.5; fields that are not named have 1 (docs/fitting.md)"
    ),
    "appraisal": Field(
        True,
        "user; False: it names its change at once, without the fields before it; play it with WORKDIR/prompts then",
    ),
    "soft": Field(
        0,
        "user: changes on either side of the logged one that get a share of its target, falling linearly; 0: none",
        range=(0, 20),
        unit="points",
    ),
    "held_out": Field(
        0.3, "share of profile ids that nothing is learned from, chosen by a hash of the id", range=SHARE
    ),
    "eval_every": Field(
        50, "between measurements on the held-out dialogues, besides first and last", range=POSITIVE, unit="steps"
    ),
    "eval_dialogues": Field(
        0, "held-out dialogues that are measured, evenly out of all; 0: all", range=COUNT, unit="dialogues"
    ),
    "logged_mode": Field(
        False,
        "policy: every dialogue is learned in the mode in which it was played, think or direct, not in policy.mode",
    ),
    "min_emotion": Field(
        0, "policy: least final emotion of a dialogue that is learned from", range=(0, 100), unit="points"
    ),
    "best_of_profile": Field(
        0,
        "policy: dialogues of each profile that are learned from, those with the highest final emotion; 0: all",
        range=COUNT,
        unit="dialogues",
    ),
    "min_change": Field(
        -10,
        "policy: least change of emotion after a reply that is learned; -10: any, also what nobody appraised",
        range=(-10, 10),
        unit="points",
    ),
}
