"""A step's dialogues where users answer by text: behind an endpoint, or on the device with a tokenizer of their own.

The policy's turns are the sampler's, one after another (`dialogues.rounds`); what comes out are the sampler's arrays,
so that nothing of what is learned knows who the users were.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from rlver_jax.config.validate import reward_settings
from rlver_jax.decoding.cache import LM
from rlver_jax.dialogues.as_arrays import END_NAMES, dialogues_of, is_left_out
from rlver_jax.dialogues.device_agents import TextPolicy
from rlver_jax.dialogues.log import UNANSWERED, UNREADABLE, Record, rewards_of
from rlver_jax.dialogues.own_functions import OwnFunctions
from rlver_jax.dialogues.rounds import Waits
from rlver_jax.dialogues.turn_by_turn import Row, record_of
from rlver_jax.evaluation.play import Gold, batch_size, eval_metrics, eval_spec, scores
from rlver_jax.parallel.mesh import batch_parts
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents, limits_of
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.training.stops import StoppedError

# Shares of the rows of a sampler that plays without a host; by text it depends on who answers when.
OF_ROWS = ("dialogue/occupancy", "dialogue/step_occupancy")


class Users(Protocol):
    """The simulated users of a run, wherever they are."""

    readout: str  # as in a log

    def of(self, profiles: Sequence[Profile], spec: RolloutConfig) -> "Users":
        """The same users with other profiles, played otherwise."""

    def play(self, rows: Sequence[Row], policy: TextPolicy, spec: RolloutConfig, seed: int) -> Waits:
        """Plays rows to their ends. Blocks.

        Raises:
            EndpointError: an endpoint refuses whatever it is asked.
        """

    def costs(self, rows: Sequence[Row]) -> dict[str, float]:
        """What the dialogues were: requests, tokens, cost; the same whatever was interrupted."""

    def traffic(self) -> dict[str, float]:
        """What was sent since the last call."""

    def cancel(self) -> None:
        """Ends what another thread plays."""

    def close(self) -> None:
        """Ends connections."""


@dataclasses.dataclass(frozen=True)
class TextBatch:
    """A batch that has been played by text; `dialogues` are NumPy arrays."""

    dialogues: Dialogues
    rows: Sequence[Row]
    waits: Waits
    costs: Mapping[str, float]  # of `Users.costs`
    traffic: Mapping[str, float]

    @property
    def counted(self) -> np.ndarray:
        """bool [B]: whether a dialogue is learned from."""
        return np.array([not is_left_out(row) for row in self.rows])

    @property
    def cost(self) -> float:
        """Of all requests."""
        return self.costs.get("cost", 0.0)

    def metrics(self, row: Mapping[str, float]) -> dict[str, float]:
        """`row` of `rollout_metrics`, and what only dialogues by text have.

        Names under time/ and traffic/ depend on interruptions.
        """
        left_out = float((~self.counted).sum())
        return {name: value for name, value in row.items() if name not in OF_ROWS} | {
            "remote/left_out": left_out,
            f"dialogue/end_{UNREADABLE}": float(np.mean([row.end == UNREADABLE for row in self.rows])),
            **{f"remote/{name}": value for name, value in self.costs.items()},
            **{f"traffic/{name}": value for name, value in self.traffic.items()},
            "traffic/rounds": float(self.waits.rounds),
            "time/policy_s": self.waits.device,
            "time/users_s": self.waits.users,
        }


@dataclasses.dataclass(frozen=True)
class TextRollout:
    """Plays batches of `batch` dialogues.

    Attributes:
        agents: the policy's tables, tokenizer and mesh; their own models are not used.
        widest: see `widest_words`.
        seed: of all that is drawn.
    """

    config: ConfigDict
    agents: Agents
    users: Users
    batch: int
    limits: RolloutLimits
    widest: int
    seed: int

    def play(self, policy: LM, profiles: Sequence[tuple[int, Profile]], ids: Sequence[int]) -> TextBatch:
        """Plays dialogues with these numbers, equally many of each profile, those of one profile together.

        Args:
            profiles: each with its index among all.

        Raises:
            EndpointError: an endpoint refuses whatever it is asked.
            StoppedError: more dialogues stay unanswered than remote.unanswered_max allows.
        """
        spec, group = self.agents.spec, len(ids) // len(profiles)
        rows = []
        for slot, number in enumerate(ids):
            index, profile = profiles[slot // group]
            rows.append(Row(number, slot, profile, [spec.rules.initial], index))
        speaker = TextPolicy(
            dataclasses.replace(self.agents, policy=policy), self.limits, self.batch, rows, self.seed, self.widest,
            self._cohorts(),
        )  # fmt: skip
        waits = self.users.play(rows, speaker, spec, self.seed)
        self._check_answered(rows, waits)
        slots = [*rows, *_padding(len(rows), self.batch, rows[0])]
        system = int(self.agents.tables[0].system.shape[0])
        dialogues = dialogues_of(slots, speaker.log, spec, self.agents.tokenizer, system)
        return TextBatch(dialogues, rows, waits, self.users.costs(rows), self.users.traffic())

    def records(self, played: TextBatch, rewards: np.ndarray) -> list[Record]:
        """What a log holds of the dialogues.

        Args:
            rewards: float32 [B]; of dialogues that are left out the formula's, of what was played.
        """
        rewards = rewards.copy()
        for row in played.rows:
            if is_left_out(row):
                rewards[row.slot] = self._reward(row)
        return [self._record(row, rewards[row.slot]) for row in played.rows]

    def _cohorts(self) -> int:
        """As many as the config allows and batch and mesh can be divided by; 1 where users on the device all answer."""
        most = self.config.remote.cohorts if self.config.remote.user.url else 1
        parts = self.batch // batch_parts(self.agents.mesh)
        return max(count for count in range(1, most + 1) if parts % count == 0)

    def _record(self, row: Row, reward: np.float32) -> Record:
        c = self.config
        if not row.messages:  # nothing came, not even the first words
            row.messages.append(
                {"role": "user", "content": "", "tokens": None, "emotion": row.emotions[0], "generated": True}
            )
        common = {
            "seed": self.seed,
            "mode": c.policy.mode,
            "language": c.data.language,
            "style": c.user.style,
            "scenario": c.user.scenario,
            "readout": self.users.readout,
        }
        record = record_of(row, reward=float(str(reward)), **common)
        return record if row.usage else {name: x for name, x in record.items() if name != "remote"}

    def _reward(self, row: Row) -> np.float32:
        dialogue = _OfOne(np.array([row.emotions]), np.array([row.turns]), np.array([row.violation]))
        return rewards_of(dialogue, reward_settings(self.config))[0]  # type: ignore[arg-type]

    def _check_answered(self, rows: Sequence[Row], waits: Waits) -> None:
        left_out, most = len(waits.reasons), self.config.remote.unanswered_max
        if left_out > most * len(rows) or left_out == len(rows):
            number, reason = next(iter(waits.reasons.items()))
            raise StoppedError(
                f"{left_out} of {len(rows)} dialogues stay unanswered, more than remote.unanswered_max={most} of them; "
                f"dialogue {number}: {reason}"
            )


@dataclasses.dataclass
class _OfOne:
    """The part of a `Dialogues` that its reward depends on."""

    emotions: np.ndarray
    turns: np.ndarray
    violation: np.ndarray


def _padding(count: int, batch: int, like: Row) -> list[Row]:
    """Rows that fill a batch and have never been played."""
    filler = [Row(0, slot, like.profile, like.emotions[:1]) for slot in range(count, batch)]
    for row in filler:
        row.messages.append({"role": "user", "content": ""})
        row.end = END_NAMES[0]
    return filler


@dataclasses.dataclass(frozen=True)
class TextEvaluation:
    """What `evaluation.play.Evaluation` is in a training run whose users answer by text."""

    rollout: TextRollout
    profiles: Sequence[Profile]
    gold: Gold | None = None

    @classmethod
    def of(cls, rollout: TextRollout, profiles: Sequence[Profile], gold: Gold | None) -> "TextEvaluation":
        """An evaluation with the users of a run's rollout."""
        config = rollout.config
        spec = eval_spec(config)
        agents = dataclasses.replace(rollout.agents, spec=spec)
        limits = agents.check_limits(limits_of(config, spec, config.eval.temperature))
        batch = batch_size(config, profiles, agents.mesh)
        users = rollout.users.of(profiles, spec)
        own = dataclasses.replace(
            rollout, agents=agents, users=users, limits=limits, batch=batch, seed=config.eval.seed
        )
        return cls(own, profiles, gold)

    def metrics(self, agents: Agents) -> dict[str, float]:
        """`eval/…` of the policy of these agents; dialogues that stay unanswered are left out.

        Raises:
            EndpointError, StoppedError: as `TextRollout.play`.
        """
        records, cost, size = [], 0.0, self.rollout.batch
        numbered = list(enumerate(self.profiles))
        for start in range(0, len(numbered), size):
            batch = numbered[start : start + size]
            played = self.rollout.play(agents.policy, batch, [index for index, _ in batch])
            rewards = rewards_of(played.dialogues, reward_settings(self.rollout.config))
            of_batch = self.rollout.records(played, rewards)
            own = OwnFunctions.of(self.rollout.config)
            of_batch = own.apply(of_batch, [profile for _, profile in batch], evaluation=True)
            records += [record for record in of_batch if record["end_reason"] != UNANSWERED]
            cost += played.cost
        result = scores(records) | ({"rule_score": self.gold(records, self.profiles)} if self.gold else {})
        return eval_metrics(result) | {"eval/cost": cost}


def counted_rows(dialogues: Dialogues, counted: np.ndarray) -> Dialogues:
    """A batch on the host without the dialogues that are left out."""
    if counted.all():
        return dialogues
    by_turn = lambda tree: jax.tree.map(lambda x: x[:, counted], tree)  # noqa: E731
    by_field = lambda tree: jax.tree.map(lambda x: x[:, :, counted], tree)  # noqa: E731
    user = dialogues.user
    rest = {name: by_turn(getattr(user, name)) for name in ("change_logprobs", "change", "emotion", "goodbye")}
    rest |= {"prefilled": by_turn(user.prefilled), "appraisal": by_field(user.appraisal), "reply": by_field(user.reply)}
    names = ("turns", "end_reason", "violation", "emotions", "first_talk", "first_count")
    return dataclasses.replace(
        dialogues,
        **{name: getattr(dialogues, name)[counted] for name in names},
        policy=by_turn(dialogues.policy),
        user=dataclasses.replace(user, **rest),
        appraised=dialogues.appraised[:, counted],
    )
