"""Dialogues written by hand as the sampler's arrays: every way to end, cut fields, a padded batch. No model plays.

`SCRIPT` says what happens; `played` holds it as `Dialogues`; `played_records` are the records that come of it.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest

from configs.base import get_config
from rlver_jax.config.validate import reward_settings
from rlver_jax.decoding.generate import Generated
from rlver_jax.dialogues.log import dialogue_records, rewards_of
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.end_reason import END_REASONS
from rlver_jax.rollout.policy_turn import PolicyTurn
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.user.turn import UserTurn, build_user_tables

GROUP, SEED, TURNS, ROWS, WIDTH = 3, 5, 3, 9, 64  # three rows of padding
IDS = [11, 12, 13, 21, 22, 23]
FIRST = ["my boss did not listen.", "我 felt awful"]  # the second is the user's own


class Turn(NamedTuple):
    thought: str
    say: str | None  # None: broke the format
    change: int = 0
    reply: str | None = None  # None: ended before
    cut: bool = False  # the appraisal's last field and the reply ran into their limit

    @property
    def completion(self) -> str:
        return self.thought if self.say is None else f"{self.thought}\n</think>\n\n{self.say}"

    @property
    def fields(self) -> dict[str, str]:
        return {"content": f"{self.say} said", "feeling": "知道 I"}

    @property
    def tone(self) -> str:
        return f"as {self.change}"


SCRIPT: list[tuple[str, list[Turn]]] = [
    (
        "turn_limit",
        [Turn("I", "did not", 5, "and she"), Turn("my boss", "她 2024", -3, "I", cut=True), Turn("she", "said")],
    ),
    ("success", [Turn("felt", "my sister.", 10, "I [b]did[/b]"), Turn("", "said goodbye", 10)]),
    ("format", [Turn("did not listen", None)]),
    ("goodbye", [Turn("不", "felt awful.\nI did", 0, "said goodbye")]),
    ("format", [Turn("I", "felt", -10, "不"), Turn("again</think>\n\n", None)]),
    ("context", []),
]


class Played(NamedTuple):
    dialogues: Dialogues
    agents: Agents
    profiles: list[Profile]
    ids: list[int]


def generated(*shape: int) -> dict[str, Any]:
    """Fields of a `Generated` in which nothing has been said."""
    arrays = {name: np.zeros((*shape, WIDTH), np.float32) for name in ("logprob", "raw_logprob")}
    arrays |= {"tokens": np.zeros((*shape, WIDTH), np.int32), "count": np.zeros(shape, np.int32)}
    return arrays | {"found_at": np.full(shape, -1, np.int32), "stopped": np.zeros(shape, bool)}


def put(generation: dict[str, Any], position: tuple[int, ...], tokens: list[int], stop: int | None, draw) -> None:
    """Says `tokens` at a place, then the token that ends them, if any, each with some log-probability."""
    tokens = tokens + ([] if stop is None else [stop])
    generation["tokens"][position][: len(tokens)] = tokens
    generation["count"][position], generation["stopped"][position] = len(tokens), stop is not None
    for name in ("logprob", "raw_logprob"):
        generation[name][position][: len(tokens)] = -draw.exponential(size=len(tokens)).astype(np.float32)


def dialogues_by_hand(bpe) -> Dialogues:
    draw = np.random.default_rng(0)
    completion, appraisal, reply = generated(TURNS, ROWS), generated(TURNS, 2, ROWS), generated(TURNS, 2, ROWS)
    say, say_count = np.zeros((TURNS, ROWS, WIDTH), np.int32), np.zeros((TURNS, ROWS), np.int32)
    violation, appraised, change, moved = (np.zeros((TURNS, ROWS), t) for t in (bool, bool, np.int32, np.int32))
    emotions = np.full((ROWS, TURNS + 1), 40, np.int32)
    end, line = bpe.im_end_id, bpe.encode("\n")[0]
    for row, (_, turns) in enumerate(SCRIPT):
        for t, turn in enumerate(turns):
            put(completion, (t, row), bpe.encode(turn.completion), None if turn.cut else end, draw)
            violation[t, row], appraised[t, row] = turn.say is None, turn.say is not None
            if turn.say is not None:
                tokens = bpe.encode(turn.say)
                say[t, row, : len(tokens)], say_count[t, row] = tokens, len(tokens)
                for position, text in enumerate(turn.fields.values()):
                    put(appraisal, (t, position, row), bpe.encode(text), None if turn.cut and position else line, draw)
            if turn.reply is not None:
                put(reply, (t, 0, row), bpe.encode(turn.tone), line, draw)
                put(reply, (t, 1, row), bpe.encode(turn.reply), None if turn.cut else line, draw)
            change[t, row] = turn.change
            emotions[row, t + 1 :] = moved[t, row] = emotions[row, t] + turn.change
    first = [bpe.encode(FIRST[row // GROUP]) if row < len(SCRIPT) else [] for row in range(ROWS)]
    nothing, prefilled = np.zeros(ROWS, np.int32), np.zeros((TURNS, ROWS), np.int32)
    options = -draw.exponential(size=(TURNS, ROWS, 21)).astype(np.float32)
    policy = PolicyTurn(Generated(**completion), say, say_count, violation, prefilled)
    user = UserTurn(Generated(**appraisal), options, change, moved, Generated(**reply), prefilled > 0, prefilled)
    return Dialogues(
        turns=np.array([len(turns) for _, turns in SCRIPT] + [0] * 3, np.int32),
        end_reason=np.array([END_REASONS.index(why) for why, _ in SCRIPT] + [0] * 3, np.int32),
        violation=violation.any(0),
        emotions=emotions,
        first_talk=np.array([tokens + [0] * (WIDTH - len(tokens)) for tokens in first], np.int32),
        first_count=nothing + [len(tokens) for tokens in first],
        policy=policy,
        user=user,
        appraised=appraised,
        prefix_tokens=np.int32(0),
        row_turns=np.int32(12),
        row_steps=np.int32(400),
    )


@pytest.fixture(scope="session")
def played_profiles():
    scene = "scene\n#### 隐藏主题\n***advice"
    return [
        Profile("p0", "I felt awful", scene, "advice", "calm", (), "topic", FIRST[0]),
        Profile("p1", "my sister", scene, "advice", "calm"),
    ]


@pytest.fixture(scope="session")
def played(bpe, prompts, played_profiles) -> Played:
    spec = RolloutConfig("think", False, GROUP, TURNS, 640, think_tokens=32, say_tokens=32, user_tokens=32)
    tables: Any = (None, build_user_tables(bpe, prompts, bpe.vocab_size))
    models: Any = None
    agents = Agents(models, models, bpe, prompts, tables, "vanilla", "chit_chat", spec)
    return Played(dialogues_by_hand(bpe), agents, played_profiles, IDS)


@pytest.fixture(scope="session")
def script():
    return SCRIPT


@pytest.fixture(scope="session")
def played_records(played):
    rewards = rewards_of(played.dialogues, reward_settings(get_config()))
    return dialogue_records(played.dialogues, played.agents, played.profiles, played.ids, seed=SEED, rewards=rewards)
