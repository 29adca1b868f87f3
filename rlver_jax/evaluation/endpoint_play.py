"""Evaluations in which text passes between policy and user.

One of them, or both, are behind an OpenAI-compatible endpoint, or both are on the device with two tokenizers.
"""

import dataclasses
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rlver_jax.config.credentials import Secret, key_fault
from rlver_jax.config.validate import ConfigError, endpoint_sides, reward_settings
from rlver_jax.dialogues.device_agents import USER_SAY, DevicePolicy, DeviceUser
from rlver_jax.dialogues.endpoint_agents import RemotePolicy, RemoteUserSide
from rlver_jax.dialogues.log import Record, generated_tokens
from rlver_jax.dialogues.own_functions import OwnFunctions
from rlver_jax.dialogues.turn_by_turn import Policy, Row, User, play, record_of
from rlver_jax.endpoints.answer_cache import AnswerCache
from rlver_jax.endpoints.client import Client, Endpoint
from rlver_jax.endpoints.concurrency import as_finished
from rlver_jax.endpoints.usage import priced, summed
from rlver_jax.evaluation.play import Batch, Gold, eval_spec, scores
from rlver_jax.parallel.mesh import batch_parts, make_sampling_mesh
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents, Weights, emotion_rules, limits_of, load_model
from rlver_jax.rollout.profile_tokens import WIDTH_STEP
from rlver_jax.rollout.rewards import reward
from rlver_jax.rollout.sampler import room_needed
from rlver_jax.rollout.spec import check_context
from rlver_jax.text.padding import round_up
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.endpoint import RemoteUser
from rlver_jax.user.prompts import load_prompts

ANSWERS = "answers.sqlite"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{,63}|[a-z_]{1,64}")  # as variables are called, and hardly any key
_TRAFFIC = ("sent", "failed", "from_cache")
PolicyOf = Callable[[Sequence[Row]], Policy]
UserOf = Callable[[Sequence[Row]], User]


@dataclasses.dataclass(frozen=True)
class RemoteEvaluation:
    """What `evaluation.Evaluation` is where both models are on the device.

    Attributes:
        agents: make the policy and the users of a batch's rows.
        size: dialogues of a batch; 1 where nothing is on the device, so that each goes its own pace.
        at_once: batches played at the same time.
        common: fields of every record.
    """

    config: ConfigDict
    profiles: Sequence[Profile]
    agents: tuple[PolicyOf, UserOf]
    clients: dict[str, Client]
    size: int
    at_once: int
    rules: EmotionRules
    common: dict[str, Any]
    gold: Gold | None = None

    def batches(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """Plays dialogues by number, and yields them as they finish.

        Raises:
            EndpointError: an endpoint refused, or was gone for longer than remote.deadline.
        """
        parts = [numbers[i : i + self.size] for i in range(0, len(numbers), self.size)]
        work = [functools.partial(self._play, part) for part in parts]
        began, before = time.monotonic(), self._traffic()
        for played in as_finished(work, self.at_once, self._close):
            records = [record for batch in played for record in batch]
            yield records, self._costs(records, began, before)
            began, before = time.monotonic(), self._traffic()

    async def _play(self, numbers: Sequence[int]) -> list[Record]:
        count, start = len(self.profiles), self.rules.initial
        rows = [Row(n, slot, self.profiles[n % count], [start]) for slot, n in enumerate(numbers)]
        policy, user = (make(rows) for make in self.agents)
        await play(rows, policy, user, rules=self.rules, max_turns=self.config.eval.max_turns)  # type: ignore[arg-type]
        records = [record_of(row, reward=self._reward(row), **self.common) for row in rows]
        records = [{name: x for name, x in one.items() if name != "remote" or self.clients} for one in records]
        return OwnFunctions.of(self.config).apply(records, [row.profile for row in rows], evaluation=True)

    def _reward(self, row: Row) -> float:
        result = reward(
            emotions=jnp.array([row.emotions], jnp.int32),
            n_turns=jnp.array([row.turns], jnp.int32),
            violation=jnp.array([row.violation]),
            **reward_settings(self.config),
        )
        return float(str(np.asarray(result.reward)[0]))  # the fewest digits of a float32, as in other logs

    def _traffic(self) -> dict[str, int]:
        return {name: sum(getattr(client.traffic, name) for client in self.clients.values()) for name in _TRAFFIC}

    def _costs(self, records: Sequence[Record], began: float, before: dict[str, int]) -> dict[str, float]:
        used = [side for record in records for side in record.get("remote", {}).values()]
        return {
            "generated": sum(map(generated_tokens, records)) + sum(side["completion_tokens"] for side in used),
            "prefilled": sum(side["prompt_tokens"] for side in used),
            "seconds": time.monotonic() - began,
        } | {name: count - before[name] for name, count in self._traffic().items()}

    async def _close(self) -> None:
        for client in self.clients.values():
            await client.close()

    def scores(self, records: Sequence[Record]) -> dict[str, Any]:
        """`evaluation.scores`, the gold judge's, and the requests to each endpoint: `remote`."""
        gold = {"rule_score": self.gold(records, self.profiles)} if self.gold else {}
        used = {name: self._usage(name, records) for name in self.clients}
        return scores(records) | gold | ({"remote": used} if used else {})

    def _usage(self, side: str, records: Sequence[Record]) -> dict[str, Any]:
        """Counts and cost of all answers that make up the dialogues, those from the cache included."""
        used = [record["remote"][side] for record in records if side in record["remote"]]
        return summed([priced(one, prices_of(self.config, side)) for one in used])


def load(
    config: ConfigDict,
    profiles: Sequence[Profile],
    folder: Path,
    policy_weights: Weights | None = None,
    gold: Gold | None = None,
) -> RemoteEvaluation:
    """Opens the endpoints, and loads the models that are on the device, if any are.

    Args:
        folder: of the evaluation; holds the answers unless remote.cache names another file.
        policy_weights: replace those of policy.path.

    Raises:
        ValueError, OSError: an API key is missing, the cache or the model cannot be loaded, or a profile doesn't fit.
    """
    remote = endpoint_sides(config)
    endpoints = {side: endpoint_of(config, side) for side in remote}
    answers = AnswerCache(config.remote.cache or folder / ANSWERS) if remote else AnswerCache(None)
    clients = {side: Client(endpoint, answers) for side, endpoint in endpoints.items()}
    batch = min(config.eval.batch, len(profiles))
    device: dict[str, Any] = {}
    for side in ("policy", "user"):
        if side not in remote:
            batch, make = _device_side(config, profiles, side, policy_weights, alone=bool(remote))
            device[side] = make
    agents = tuple(device.get(side) or _remote_side(config, side, clients[side]) for side in ("policy", "user"))
    return RemoteEvaluation(
        config, profiles, agents, clients,  # type: ignore[arg-type]
        size=batch if device else 1,
        at_once=1 if device else batch,
        rules=emotion_rules(config, config.eval.initial_emotion),
        common={
            "seed": config.eval.seed,
            "mode": config.policy.mode,
            "language": config.data.language,
            "style": config.user.style,
            "scenario": config.user.scenario,
            "readout": "text" if "user" in remote else config.user.readout,
        },
        gold=gold,
    )  # fmt: skip


def endpoint_of(config: ConfigDict, side: str) -> Endpoint:
    """The endpoint of `config.remote[side]`, with its API key out of the environment.

    Raises:
        ConfigError: the variable that should hold the key is not set, or holds what can be none.
    """
    c, common = config.remote[side], config.remote
    key = Secret(os.environ.get(c.key_env, "") if c.key_env else "")
    if c.key_env and c.key_env not in os.environ:
        # Whoever takes the field for the key itself should not find it in a log.
        named = f"={c.key_env!r}" if _VARIABLE.fullmatch(c.key_env) else " (not shown, since it may be a key itself)"
        raise ConfigError(
            f"remote.{side}.key_env{named}: no such variable in the environment; export the API key in it"
        )
    if c.key_env and (fault := key_fault(key)):
        raise ConfigError(f"remote.{side}.key_env={c.key_env!r}: the API key in this variable {fault}")
    extra = json.loads(c.extra) if c.extra else {}
    return Endpoint(c.url, c.model, key, extra, common.concurrency, common.timeout, common.deadline)


def prices_of(config: ConfigDict, side: str) -> tuple[float, float]:
    """Of a million tokens read, and generated, at the endpoint of `config.remote[side]`."""
    return float(config.remote[side].price_in), float(config.remote[side].price_out)


def remote_user(config: ConfigDict, client: Client, initial: int | None = None) -> RemoteUser:
    """The simulated user of a config, behind the endpoint that `client` asks.

    Args:
        initial: emotion; None: that of evaluations.
    """
    user, rules = config.user, emotion_rules(config, config.eval.initial_emotion if initial is None else initial)
    prompts = load_prompts(config.data.language, user.prompts or None)
    return RemoteUser(
        client, prompts, rules, user.style, user.scenario, user.field_tokens, user.reply_tokens,
        user.reply_temperature, config.remote.asks,
    )  # fmt: skip


def _remote_side(config: ConfigDict, side: str, client: Client) -> PolicyOf | UserOf:
    seed, think = config.eval.seed, config.policy.mode == "think"
    one: Any
    if side == "policy":
        prompts = load_prompts(config.data.language, config.user.prompts or None)
        system = prompts.policy_system(config.policy.mode, config.policy.prompt)
        one = RemotePolicy(
            client, system, think, config.eval.temperature, config.rollout.top_p,
            config.rollout.say_tokens + think * config.rollout.think_tokens, config.remote.asks, seed,
        )  # fmt: skip
    else:
        one = RemoteUserSide(remote_user(config, client), seed)
    return lambda rows: one


def _device_side(
    config: ConfigDict, profiles: Sequence[Profile], side: str, policy_weights: Weights | None, *, alone: bool
) -> tuple[int, Any]:
    """(rows of a batch, what makes the side for a batch). The model stands in for the other side, which is unused.

    Args:
        alone: whether the other side is behind an endpoint, so that a log holds this side's tokens alone.
    """
    check_context(config, side)
    mesh = make_sampling_mesh(config.mesh, config.mesh_sampling)
    rows = batch_parts(mesh)
    batch = round_up(min(config.eval.batch, len(profiles)), rows)
    lm, tokenizer = load_model(config[side], side, mesh, policy_weights if side == "policy" else None)
    prompts, spec = load_prompts(config.data.language, config.user.prompts or None), eval_spec(config)
    agents = Agents.build(
        lm, lm, tokenizer, prompts, spec, mesh, style=config.user.style, scenario=config.user.scenario
    )
    limits = agents.check_limits(limits_of(config, spec, config.eval.temperature))
    seed = config.eval.seed
    if side == "user":
        tokens, field = agents.tokens(profiles), "say_tokens" if alone else USER_SAY
        return batch, lambda rows: DeviceUser(agents, limits, batch, rows, seed, tokens, say_field=field)
    system = int(agents.tables[0].system.shape[0])
    room = int(room_needed(agents.tables, spec, limits, WIDTH_STEP)[0])
    if system + room > spec.context:
        raise ConfigError(
            f"the policy's system prompt takes {system} tokens and a turn may take {room} more, but rollout.context is "
            f"{spec.context}; raise it to {system + room} for one turn at least"
        )
    return batch, functools.partial(DevicePolicy, agents, limits, batch, seed=seed)
