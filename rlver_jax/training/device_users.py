"""Simulated users on the device whose tokenizer is not the policy's: text passes between the two."""

import asyncio
import dataclasses
import time
from collections.abc import Sequence

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax.decoding.cache import LM
from rlver_jax.dialogues.device_agents import USER_SAY, DeviceUser, TextPolicy
from rlver_jax.dialogues.rounds import Waits
from rlver_jax.dialogues.turn_by_turn import Row, play
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents, limits_of, load_model
from rlver_jax.rollout.profile_tokens import ProfileTokens
from rlver_jax.rollout.ready import sampling_copy
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.user.prompts import load_prompts


class DeviceUsers:
    """All rows at the same turn: nobody waits for an answer.

    Attributes:
        agents: with the user's tokenizer and tables; the user's model stands in for the policy, which is not used.
        tokens: of the profiles that are played.
    """

    def __init__(self, config: ConfigDict, agents: Agents, tokens: ProfileTokens):
        """Of agents that `load` has made."""
        self.config, self.agents, self.tokens = config, agents, tokens
        self.readout = config.user.readout
        self._copy = sampling_copy(agents.user.model, agents.mesh)

    @classmethod
    def load(
        cls, config: ConfigDict, spec: RolloutConfig, mesh: Mesh, rest: Mesh, profiles: Sequence[Profile]
    ) -> "DeviceUsers":
        """Users of a config; see `Agents.load`.

        Raises:
            ValueError, OSError: the model cannot be loaded, or a profile leaves no room for a turn in its context.
        """
        user, tokenizer = load_model(config.user, "user", rest)
        prompts = load_prompts(config.data.language, config.user.prompts or None)
        told = {"style": config.user.style, "scenario": config.user.scenario}
        agents = Agents.build(user, user, tokenizer, prompts, dataclasses.replace(spec, group=1), mesh, **told)
        return cls(config, agents, agents.tokens(profiles))

    def of(self, profiles: Sequence[Profile], spec: RolloutConfig) -> "DeviceUsers":
        """The same users with other profiles, played otherwise."""
        agents = dataclasses.replace(self.agents, spec=dataclasses.replace(spec, group=1))
        return DeviceUsers(self.config, agents, agents.tokens(profiles))

    def play(self, rows: Sequence[Row], policy: TextPolicy, spec: RolloutConfig, seed: int) -> Waits:
        """Plays rows to their ends."""
        began, model = time.monotonic(), self.agents.user.model
        limits = limits_of(self.config, self.agents.spec, 1.0)
        ready = dataclasses.replace(self.agents, user=LM(self._copy(self.agents.user.params), model))
        with self.agents.on_mesh():
            user = DeviceUser(
                ready, limits, policy.batch, rows, seed, self.tokens, [row.index for row in rows], USER_SAY
            )
            asyncio.run(play(rows, _Speaks(policy), user, rules=spec.rules, max_turns=spec.max_turns))
        return Waits(device=time.monotonic() - began)

    def costs(self, rows: Sequence[Row]) -> dict[str, float]:
        """None."""
        return {}

    def traffic(self) -> dict[str, float]:
        """None."""
        return {}

    def cancel(self) -> None:
        """Ends by itself."""

    def close(self) -> None:
        """Holds nothing open."""


@dataclasses.dataclass(frozen=True)
class _Speaks:
    """A `TextPolicy` as `turn_by_turn.play` asks it."""

    policy: TextPolicy

    async def speak(self, rows: Sequence[Row]) -> None:
        self.policy.speak(rows)
