"""Dialogues whose user has another tokenizer than their policy, as they are verified: once for each side.

Text passes between the two. So to each side the other is what a model behind an endpoint would be: the policy's part is
checked with the policy's tokenizer, the user's part with the user's, and what both say of ends and rewards twice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rlver_jax.config.validate import ConfigError, endpoint_sides
from rlver_jax.dialogues.device_agents import USER_SAY
from rlver_jax.dialogues.log import REACTION_FIELDS, TOKEN_FIELDS, Record
from rlver_jax.dialogues.verify_set import Plan
from rlver_jax.dialogues.verify_shape import POLICY, USER
from rlver_jax.rollout.agents import tokenizers_differ


def played_as_text(records: Sequence[Mapping[str, Any]], config: ConfigDict) -> bool:
    """Whether the dialogues of a log have two tokenizers; where a user has read a reply, its tokens say so.

    Raises:
        ConfigError: they have, but the config names no policy, whose tokenizer is needed.
        ValueError, OSError: a folder holds no tokenizer that can be used.
    """
    if endpoint_sides(config):
        return False
    replies = [message for record in records for message in record["messages"][1::2]]
    marked = any(USER_SAY in message for message in replies)
    if marked and not config.policy.path:
        raise ConfigError(
            "these dialogues' user has another tokenizer than their policy, but policy.path is empty; set "
            "--config.policy.path to the folder of the policy's tokenizer"
        )
    unread = all(message["violation"] for message in replies)  # nothing shows which tokenizer the user has
    return (marked or unread) and tokenizers_differ(config)


def plans_by_side(plans: Sequence[Plan]) -> dict[Plan, dict[str, Plan]]:
    """{plan: {side that is checked: how}}."""
    other = {POLICY: USER, USER: POLICY}
    return {
        plan: {
            side: dataclasses.replace(plan, endpoints=frozenset({other[side]}), other_on_device=True) for side in other
        }
        for plan in dict.fromkeys(plans)
    }


def seen_by(side: str, record: Mapping[str, Any]) -> Record:
    """A dialogue with this side's tokens alone: "policy" or "user"."""
    roles = {"assistant": _policy_message, "user": _user_message}
    return {**record, "messages": [roles[message["role"]](side, message) for message in record["messages"]]}


def _policy_message(side: str, message: Mapping[str, Any]) -> Record:
    own = {name: value for name, value in message.items() if name != USER_SAY}
    if side == POLICY:
        return own
    return own | dict.fromkeys(TOKEN_FIELDS) | {"say_tokens": message.get(USER_SAY)}


def _user_message(side: str, message: Mapping[str, Any]) -> Record:
    return {**message, **{name: None for name in REACTION_FIELDS if side == POLICY and name in message}}
