"""Held-out profiles played with a policy, and scored as SAGE does: by the user's emotion at the end."""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax.config.validate import ConfigError, reward_settings
from rlver_jax.dialogues.log import ALL_END_REASONS, Record, dialogue_records, generated_tokens, rewards_of
from rlver_jax.dialogues.own_functions import OwnFunctions, numbers_of, of_functions
from rlver_jax.parallel import distributed
from rlver_jax.parallel.mesh import batch_parts, make_sampling_mesh
from rlver_jax.profiles.schema import Profile
from rlver_jax.profiles.sources import open_profiles
from rlver_jax.rollout.agents import Agents, Weights, limits_of, spec_of
from rlver_jax.rollout.profile_tokens import ProfileTokens
from rlver_jax.rollout.rollout_metrics import prefilled_count
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.text.padding import round_up
from rlver_jax.user.emotion import SAGE

# A second judge of finished dialogues, which training never sees: mean final emotion by its own appraisals.
Gold = Callable[[Sequence[Record], Sequence[Profile]], float]
# Finished dialogues, and what they cost: tokens generated and prefilled, turns and room for turns, seconds.
Batch = tuple[list[Record], dict[str, float]]


class Player(Protocol):
    """An evaluation, wherever its models are."""

    @property
    def config(self) -> ConfigDict:
        """That it is played by."""

    @property
    def profiles(self) -> Sequence[Profile]:
        """In the order of the dialogues' numbers."""

    def batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """Plays dialogues by number: of N profiles, dialogue i is one with profile i mod N."""

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """What a summary says of all dialogues."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that is needed to play, loaded and checked."""

    config: ConfigDict
    agents: Agents
    profiles: Sequence[Profile]
    tokens: ProfileTokens
    limits: RolloutLimits
    batch: int
    gold: Gold | None = None

    def batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """Plays dialogues by number: of N profiles, dialogue i is one with profile i mod N."""
        for start in range(0, len(numbers), self.batch):
            began, batch = time.monotonic(), numbers[start : start + self.batch]
            played = self.play(batch)
            records = self.records(played, batch)
            costs = {"generated": sum(map(generated_tokens, records)), "prefilled": prefilled_count(played)}
            room = {"turns": int(played.turns.sum()), "row_turns": int(played.row_turns)}
            yield records, costs | room | {"seconds": time.monotonic() - began}

    def play(self, numbers: Sequence[int]) -> Dialogues:
        """At most `batch` dialogues by number; on the host (every process's), padding rows included."""
        wanted = self.tokens.batch([i % len(self.profiles) for i in numbers], numbers, self.batch, self.agents.mesh)
        key = jax.random.key(self.config.eval.seed)
        return distributed.fetch(self.agents.play(wanted, key, self.limits))

    def play_all(self) -> list[Record]:
        """Records of all profiles, in their order."""
        return [record for records, _ in self.batches(range(len(self.profiles))) for record in records]

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """`scores`, and the gold judge's."""
        return scores(records) | ({"rule_score": self.gold(records, self.profiles)} if self.gold else {})

    def metrics(self, agents: Agents) -> dict[str, float]:
        """`eval/…` of the models of these agents, played as this evaluation's are."""
        agents = dataclasses.replace(self.agents, policy=agents.policy, user=agents.user)
        return eval_metrics(self.scores(dataclasses.replace(self, agents=agents).play_all()))

    def records(self, played: Dialogues, numbers: Sequence[int]) -> list[Record]:
        """What `play` played, as records."""
        profiles = [self.profiles[i % len(self.profiles)] for i in numbers]
        rewards = rewards_of(played, reward_settings(self.config))
        records = dialogue_records(played, self.agents, profiles, numbers, seed=self.config.eval.seed, rewards=rewards)
        return OwnFunctions.of(self.config).apply(records, profiles, evaluation=True)


def chosen_profiles(config: ConfigDict) -> Sequence[Profile]:
    """The first `eval.num_profiles` of data.eval, or of data.train where that is empty.

    Raises:
        ValueError: neither is set, or a file is not one of profiles.
    """
    field = "data.eval" if config.data.eval else "data.train"
    if not (config.data.eval or config.data.train):
        raise ConfigError("data.eval and data.train are empty; set --config.data.eval to a JSONL file of profiles")
    return open_profiles(config, field)[: config.eval.num_profiles]


def load(
    config: ConfigDict,
    profiles: Sequence[Profile],
    mesh: Mesh | None = None,
    policy_weights: Weights | None = None,
    gold: Gold | None = None,
    policy_base: ConfigDict | None = None,
) -> Evaluation:
    """Loads the models and encodes all profiles; `policy_weights` and `policy_base` are those of `Agents.load`.

    Raises:
        ValueError, OSError: a model cannot be loaded, or a profile doesn't fit the context.
    """
    if mesh is None:
        mesh = make_sampling_mesh(config.mesh, config.mesh_sampling)
    agents = Agents.load(config, eval_spec(config), mesh, policy_weights, policy_base=policy_base)
    return of_agents(config, agents, profiles, gold)


def eval_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """`eval/…` of `scores`, with the gold judge's where there is one."""
    counts = {"success_rate": result["success"] / result["n"], "failure_rate": result["failure"] / result["n"]}
    named = {name: result[name] for name in ("score", "rule_score", "turns_mean", "reward_mean") if name in result}
    return {f"eval/{name}": float(value) for name, value in (named | of_functions(result) | counts).items()}


def batch_size(config: ConfigDict, profiles: Sequence[Profile], mesh: Mesh | None) -> int:
    """Dialogues played at once: no more than there are profiles, since padding rows cost as much as playing ones."""
    return round_up(min(config.eval.batch, len(profiles)), batch_parts(mesh))


def of_agents(config: ConfigDict, agents: Agents, profiles: Sequence[Profile], gold: Gold | None = None) -> Evaluation:
    """An evaluation by agents who are there already; raises ValueError as `load` does."""
    agents = dataclasses.replace(agents, spec=eval_spec(config))
    limits = agents.check_limits(limits_of(config, agents.spec, config.eval.temperature))
    batch = batch_size(config, profiles, agents.mesh)
    return Evaluation(config, agents, profiles, agents.tokens(profiles), limits, batch, gold)


def eval_spec(config: ConfigDict) -> RolloutConfig:
    """What the sampler is compiled for in evaluations."""
    c = config.eval
    return spec_of(config, group=1, max_turns=c.max_turns, initial_emotion=c.initial_emotion, rows=c.rows)


def scores(records: Iterable[Record]) -> dict[str, Any]:
    """What an evaluation says of its dialogues; see `Tally.scores`."""
    tally = Tally()
    for record in records:
        tally.add(record)
    return tally.scores()


class Tally:
    """Scores of dialogues, taken from one after another; the dialogues need not be kept."""

    def __init__(self) -> None:
        """Of none."""
        self.emotions: list[int] = []  # at the end
        self.profiles: list[str] = []  # ids, a dialogue each
        self._turns: list[int] = []
        self._rewards: list[float] = []
        self._rises: list[bool] = []
        self._own: dict[str, list[float]] = {}
        self._reasons: collections.Counter[str] = collections.Counter()

    def add(self, record: Record) -> None:
        """Takes a dialogue in."""
        self.emotions.append(record["emotion"])
        self.profiles.append(sys.intern(record["profile"]))
        self._turns.append(record["turns"])
        self._rewards.append(record["reward"])
        self._rises += [message["change"] > 0 for message in record["messages"] if "change" in message]
        self._reasons[record["end_reason"]] += 1
        for name, number in numbers_of(record).items():
            self._own.setdefault(name, []).append(number)

    def scores(self) -> dict[str, Any]:
        """What an evaluation says of its dialogues.

        `score` is the mean final emotion, 0-100; `success` and `failure` count by SAGE's borders, whatever the
        config's; `acceptance` is the share of appraised replies after which the emotion was meant to rise. Functions
        of a user's own add `own/…` and `judge_score`, means over the dialogues.
        """
        outcomes = [SAGE.outcome(emotion) for emotion in self.emotions]
        return {
            "score": float(np.mean(self.emotions)),
            "success": outcomes.count(1),
            "failure": outcomes.count(-1),
            "n": len(self.emotions),
            "turns_mean": float(np.mean(self._turns)),
            "acceptance": float(np.mean(self._rises)) if self._rises else 0.0,
            "end_reasons": {reason: self._reasons[reason] for reason in ALL_END_REASONS[1:]},
            "reward_mean": float(np.mean(self._rewards)),
        } | {name: float(np.mean(numbers)) for name, numbers in self._own.items()}
