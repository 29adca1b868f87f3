"""What `verify` finds, added up over dialogues."""

import dataclasses

from rlver_jax.dialogues.verify_tokens import TokenReport


@dataclasses.dataclass
class Report:
    """The result of verifying dialogues."""

    dialogues: int = 0
    turns: int = 0
    tokens: int = 0
    logprob_error: float = 0.0  # the largest difference of a token's log-probability to the log's, in nats
    ties: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)
    unchecked: dict[str, None] = dataclasses.field(
        default_factory=dict
    )  # parts of the logs that nothing was compared with

    def add_tokens(self, where: str, tokens: TokenReport) -> None:
        """Adds the result for one model's tokens in the dialogue named `where`."""
        self.tokens += tokens.tokens
        self.logprob_error = max(self.logprob_error, tokens.logprob_error)
        self.ties += [f"{where}, {tie}" for tie in tokens.ties]
        self.faults += [f"{where}, {fault}" for fault in tokens.faults]

    def add(self, other: "Report") -> None:
        """Adds the result for other dialogues."""
        self.dialogues += other.dialogues
        self.turns += other.turns
        self.tokens += other.tokens
        self.logprob_error = max(self.logprob_error, other.logprob_error)
        self.ties += other.ties
        self.faults += other.faults
        self.unchecked |= other.unchecked
