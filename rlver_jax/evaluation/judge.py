"""What a judge of finished dialogues is, wherever it runs.

A judge appraises each reply of a dialogue that it didn't play: says and replies are those of the record, the appraisal
in front of every change is its own. (With the recorded appraisal in front, the change would show.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from rlver_jax.evaluation.transcripts import Transcript


class Appraised(NamedTuple):
    """A finished dialogue as a judge took it; one entry for each turn that the dialogue's own user appraised."""

    emotions: list[int]  # the initial one first; own or recorded; see `Judge.appraise`
    changes: list[int]  # by the judge's own readout; 0 once its emotion has ended the dialogue, or where unanswered
    change_logprobs: list[list[float]]  # of the 21 changes, not normalized; empty where it had ended, or has none
    appraisals: list[dict[str, str]]
    unanswered: Sequence[int] = ()  # indices of turns for which no change could be got
    remote: dict[str, Any] | None = None  # requests to its endpoint, as `endpoints.usage.priced` gives it


class Work(NamedTuple):
    """What a judge has just done, for a progress bar."""

    turns: int
    tokens: int  # generated


Progress = Callable[[Work], None]


class Judge(Protocol):
    """Anything that can appraise finished dialogues: a model on the device, or one behind an endpoint."""

    @property
    def name(self) -> str:
        """Short, fit for a file's name."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that its appraisals depend on, in JSON's types."""
        ...

    @property
    def readouts(self) -> tuple[str, ...]:
        """How changes can be read: `argmax` and `mean` of its distributions, or `text`, as it has written them."""
        ...

    def appraise(
        self, dialogues: Sequence[Transcript], *, own: bool, progress: Progress
    ) -> Iterator[list[tuple[int, Appraised]]]:
        """Appraises dialogues, which have their profiles; yields (index, result) of a few at a time, in any order.

        Args:
            own: True: the emotion is the judge's own from turn to turn, by its own changes, and stays where it would
                have ended the dialogue. False: it is the recorded one before every turn, so that each change is one
                answer to a fixed context.
        """
        ...
