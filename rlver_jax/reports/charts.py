"""The charts of a report: one table of them. A new chart is an entry here.

A chart is a function of the runs and their groups of dialogues: it gives the figures for which there is data.
"""

import dataclasses
from collections.abc import Callable, Sequence

from rlver_jax.evaluation.measures import SPEECH, THOUGHTS
from rlver_jax.reports.curves import Curve, own_curves, shares_by_step
from rlver_jax.reports.group_charts import Marks, boxes, coordinate, stacked_shares, trajectories
from rlver_jax.reports.sources import Run
from rlver_jax.reports.statistics import OUTCOMES, Group, end_shares, outcome_shares, reply_lengths, turn_counts
from rlver_jax.reports.svg import Figure
from rlver_jax.rollout.end_reason import END_REASONS

EMOTION_RANGE = (0.0, 100.0)
_SPREAD = "Mean over a step's dialogues, and one standard deviation around it."
_BOX = "Half of the {} lie in the box; line: the median; whiskers: the shortest and the longest."
EMOTION = Curve(
    "Emotion at the end of a dialogue",
    _SPREAD,
    {"emotion/final_mean": ""},
    spread="emotion/final_std",
    y_range=EMOTION_RANGE,
)


@dataclasses.dataclass(frozen=True)
class Section:
    """Charts under one title."""

    charts: Sequence[Callable[[Sequence[Run], Sequence[Group]], list[Figure]]]
    text: str = ""
    group_legend: bool = False

    def figures(self, runs: Sequence[Run], groups: Sequence[Group]) -> list[Figure]:
        """The charts for which these runs have data."""
        return [figure for chart in self.charts for figure in chart(runs, groups)]


CHARTS = {
    "Learning": Section(
        (
            EMOTION,
            Curve("Reward", _SPREAD, {"reward/mean": ""}, spread="reward/std"),
            Curve(
                "Held-out score",
                "Mean final emotion of held-out profiles; dashed: by the gold judge, which training never sees.",
                {"eval/score": "", "eval/rule_score": "early"},
                y_range=EMOTION_RANGE,
            ),
            Curve(
                "Loss of supervised fine-tuning",
                "Nats a learned token, weighted; dashed: of held-out dialogues.",
                {"sft/loss": "", "held_out/loss": "early"},
            ),
            Curve(
                "Turns", "Replies of the policy in a dialogue, mean.", {"dialogue/turns_mean": ""}, starts_at_zero=True
            ),
            Curve(
                "Length of a reply",
                "Tokens, mean; dashed: with its thought.",
                {"reply/tokens_mean": "", "reply/all_tokens_mean": "early"},
                starts_at_zero=True,
            ),
        )
    ),
    "Metrics of your own": Section((own_curves,), "What metrics.functions and eval.judge have measured."),
    "Outcomes by step": Section((shares_by_step,)),
    "Emotion over the turns, by hidden intention": Section(
        (trajectories,),
        "Mean emotion after each turn; area: its quartiles (up to four lines). A dialogue that has ended keeps its "
        "final emotion.",
        group_legend=True,
    ),
    "Dialogues in the logs": Section(
        (
            stacked_shares("Outcomes", outcome_shares, OUTCOMES),
            stacked_shares("Ends", end_shares, [f"e{i}" for i in range(len(END_REASONS) - 1)]),
            boxes("Turns", _BOX.format("dialogues"), turn_counts),
            boxes("Characters of a reply", _BOX.format("replies"), reply_lengths),
        )
    ),
    "Manner": Section(
        (
            coordinate,
            Marks("Capabilities", "Means of a judge model's marks, 1 to 5.", ("capabilities",), 1, 5, 1),
            *(
                Marks(
                    f"Relationship, from {source}",
                    f"Means of a judge model's answers in the user's place, -3 (quite untrue) to 3, by {what}.",
                    ("relationship", source),
                    -3,
                    3,
                    0,
                )
                for source, what in ((THOUGHTS, "the user's inner thoughts"), (SPEECH, "what was said"))
            ),
        )
    ),
}
