"""How dialogues are played: what a sampler is compiled for, and what may change without compiling again."""

import dataclasses

import flax.struct
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from rlver_jax.decoding.generate import KEEP_ALL, Truncation
from rlver_jax.models.families import Qwen2Config
from rlver_jax.user.emotion import TRAINING, EmotionRules
from rlver_jax.user.turn import UserLimits


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What a sampler is compiled for. Lengths are maxima; `RolloutLimits` may ask for less without compiling again."""

    mode: str  # think | direct
    enforce_format: bool  # think: keep the policy from ending a message before `</think>` and a visible reply
    group: int  # dialogues of one profile
    max_turns: int
    context: int  # slots of each row, policy and user alike
    think_tokens: int
    say_tokens: int
    user_tokens: int  # of any field of the user's scripts, the reply included
    readout: str = "argmax"
    rules: EmotionRules = TRAINING
    truncation: Truncation = KEEP_ALL
    prompt: str = "sage"  # what the policy is told to be
    rows: int = 0  # dialogues played at a time; 0: all of a batch

    @property
    def policy_tokens(self) -> int:
        """Tokens of a policy's reply, its thought included."""
        return self.say_tokens + (self.think_tokens if self.mode == "think" else 0)

    def rows_of(self, batch: int) -> int:
        """Rows that a batch of so many dialogues is played on."""
        return min(self.rows or batch, batch)


def check_context(config: ConfigDict, *names: str) -> None:
    """Refuses a `rollout.context` beyond what a model reads, by its config.json alone, before weights are loaded.

    Args:
        names: "policy", "user", "critic" or "reference"; where one has no path it is the policy's.

    Raises:
        ValueError: it is beyond it, or a config.json is not a Qwen2.5 or Qwen3 model's.
        OSError: there is none.
    """
    for name in names:
        path = config[name].path or config.policy.path
        if path:  # without one it is refused where it is loaded
            check_rows(Qwen2Config.from_hf(path), name, config.rollout.context)


def check_rows(model: Qwen2Config, name: str, context: int, field: str = "rollout.context") -> None:
    """Refuses rows of `context` tokens, which `field` asks for, where the model `name` reads fewer; a ValueError."""
    model.check_context(context, name, f"{field}={context}", f"set --config.{field}={model.context} or lower")


@flax.struct.dataclass
class RolloutLimits:
    """What may change between calls without compiling again."""

    max_turns: Int[Array, ""]
    think_tokens: Int[Array, ""]
    say_tokens: Int[Array, ""]
    temperature: Float[Array, ""]  # of the policy; 0: greedy
    initial_emotion: Int[Array, ""]
    user: UserLimits
