"""What functions of a user's own say of a step's dialogues, and the rewards that the policy learns from then."""

from collections.abc import Sequence

import jax
import numpy as np

from rlver_jax.dialogues.log import Record
from rlver_jax.dialogues.own_functions import REWARD, entries_of
from rlver_jax.parallel import distributed
from rlver_jax.rollout.rewards import Rewards


def as_rewards(records: Sequence[Record], formula: Rewards) -> Rewards:
    """Rewards of an own function, as its entries in the records say; those of the formula where there is none.

    A number is earned at the last turn, as a final emotion is; a list has each turn's.

    Args:
        records: of the batch, in its order.
        formula: of the same batch, on the devices; gives shapes, shardings and what is left out.
    """
    reward, turns = map(np.array, distributed.fetch((formula.reward, formula.turns)))
    for row, record in enumerate(records):
        for one in entries_of(record):
            if one["field"] == REWARD:
                reward[row], value, count = record["reward"], one["value"], record["turns"]
                turns[row] = 0.0
                turns[row, :count] = value if isinstance(value, list) else [0.0] * (count - 1) + [value] * bool(count)
    like = (formula.reward.sharding, formula.turns.sharding)
    return formula.replace(reward=jax.device_put(reward, like[0]), turns=jax.device_put(turns, like[1]))  # type: ignore[attr-defined]
