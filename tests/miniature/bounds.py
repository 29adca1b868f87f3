"""Training runs in the miniature with other rewards than the user's: what is possible, and what chance does.

    python tests/miniature/bounds.py --reward=rule|shuffled --config=configs/miniature.py --workdir=DIR

rule: the gold judge's changes are the rewards, an upper bound on what any user could teach. shuffled: the user's
rewards, dealt to other dialogues at random, so that nothing can be learned. Not for real training: elsewhere the gold
judge only evaluates.
"""

import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from rich.console import Console

from rlver_jax.config.flags import config_from_flags
from rlver_jax.config.validate import validate
from rlver_jax.dialogues.log import dialogue_records
from rlver_jax.miniature import rule
from rlver_jax.miniature.gold import gold_judge, judged_dialogue
from rlver_jax.miniature.world import Person
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.rewards import reward
from rlver_jax.training.loop import Trainer, train


def rule_emotions(person: Person, record, turns: int) -> list[int]:
    """The initial emotion and that after each turn, by the rule alone; the last one is repeated."""
    replies, heard, _ = judged_dialogue(record)
    emotions = [record["emotions"][0]]
    for turn, (reply, last) in enumerate(zip(replies, heard, strict=True)):
        change = rule.judge(person, reply, replies[:turn], last).change
        emotions.append(max(0, min(100, emotions[-1] + change)))
    return emotions + [emotions[-1]] * (turns + 1 - len(emotions))


class RuleTrainer(Trainer):
    """Learns from the gold judge."""

    def judge(self, dialogues, rewards, batch):
        """Rewards of the rule's emotions."""
        played, ids = jax.device_get(dialogues), list(range(rewards.reward.shape[0]))
        profiles = [profile for _, profile in batch]
        records = dialogue_records(played, self.run.agents, profiles, ids, seed=0, rewards=np.zeros(len(ids)))
        people = {profile.id: Person.of(profile) for profile in profiles}
        turns = rewards.turns.shape[1]
        emotions = np.array([rule_emotions(people[r["profile"]], r, turns) for r in records], np.int32)
        judged_rewards = reward(
            emotions=emotions, n_turns=played.turns, violation=played.violation, **dict(self.reward_settings)
        )
        return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), judged_rewards, rewards)


class ShuffledTrainer(Trainer):
    """Learns from rewards that belong to other dialogues."""

    def judge(self, dialogues, rewards, batch):
        """The batch's rewards in another order at every step."""
        order = np.random.default_rng(int(np.abs(np.asarray(rewards.reward)).sum() * 1e4)).permutation
        permutation = order(rewards.reward.shape[0])
        return jax.tree.map(lambda x: jax.device_put(np.asarray(x)[permutation], x.sharding), rewards)


TRAINERS = {"rule": RuleTrainer, "shuffled": ShuffledTrainer}


def main(argv: Sequence[str]) -> int:
    """The command line; returns the number of steps done."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
        flags.DEFINE_enum("reward", "rule", list(TRAINERS), "what the policy learns from", flag_values=values)

    config, options, _ = config_from_flags(argv, __doc__ or "", define)
    validate(config, jax.device_count())
    mesh, trainer = make_mesh(**config.mesh), TRAINERS[options.reward]
    return train(config, options.workdir, mesh, Console(), gold_judge(config), trainer)


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
