"""Lets you talk to a policy as the user, or answer the simulated user yourself.

    rlver chat --config=FILE[:ARG] [--config.a.b=v …] [--checkpoint=WORKDIR|HF_FOLDER]
               [--side=user|policy] [--profile=ID] [--out=FILE]

--side=user: you speak as the user of a profile and the policy replies. The simulated user appraises each reply in your
place, so that its estimate of your emotion stands beside every turn. --side=policy: you answer the simulated user and
watch its emotion; only the user's model is loaded. The transcript is a dialogue log of one line, written after every
message. Of a training run the checkpoint with the best eval/score is taken, or the last one where none has a score;
--step chooses another. Exit status: 0 the dialogue or the input has ended, 2 bad usage, 130 interrupted.
"""

import dataclasses
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from rlver_jax.config.flags import config_from_flags, define_path, path_override
from rlver_jax.config.hub import fetch
from rlver_jax.config.paths import check_file_to_write
from rlver_jax.config.validate import ConfigError, validate
from rlver_jax.evaluation.play import chosen_profiles, eval_spec
from rlver_jax.parallel.mesh import make_sampling_mesh
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents, limits_of, load_model
from rlver_jax.rollout.spec import check_context
from rlver_jax.serving.conversation import Conversation, typed_tokens
from rlver_jax.serving.terminal import Terminal
from rlver_jax.text.command import Command, Ending, run_command
from rlver_jax.training.trained_policy import TrainedPolicy, take_checkpoint
from rlver_jax.user.prompts import load_prompts

SIDES = ("user", "policy")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command(
        "chat", _chat, argv, {KeyboardInterrupt: Ending(130, "interrupted; the transcript is in {output}")}
    )


def _chat(command: Command, argv: Sequence[str]) -> int:
    config, options = _arguments(argv)
    trained = take_checkpoint(config, options.checkpoint, options.step, path_override(options))
    needs = ["policy", "user"] if options.side == "user" else ["user"]
    validate(config, jax.device_count(), needs)
    profile = _profile(chosen_profiles(config), options.profile)
    out = Path(options.out or time.strftime("chat_%Y%m%d_%H%M%S.jsonl"))
    if out.exists():
        raise ConfigError(f"--out={out} exists; name a new file")
    check_file_to_write(out)
    sides = {"user": True} | ({"policy": trained is None} if options.side == "user" else {})
    fetch({side: (config[side].path, new and config[side].init == "path") for side, new in sides.items()})
    with command.console.status("loading the models"):
        conversation = _conversation(config, options, profile, trained)
    command.output = str(out)
    Terminal(conversation, profile, options.side, out, command.console).run()
    return 0


def _arguments(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    def define(values: flags.FlagValues) -> None:
        common: dict[str, Any] = {"flag_values": values}
        define_path("checkpoint", None, "training run or Hugging Face folder to take the policy from", values)
        flags.DEFINE_string("step", "", "of a training run: best | last | a number", **common)
        flags.DEFINE_enum("side", "user", SIDES, "which side you take", **common)
        flags.DEFINE_string("profile", "", "id of the user's profile in data.eval; default: the first", **common)
        define_path("out", "", "file for the transcript; default: chat_DATE_TIME.jsonl", values, new="file")
        flags.DEFINE_integer("seed", None, "of what the models draw; default: another one each time", 0, **common)

    config, options, rest = config_from_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --side=policy; --help lists them")
    if options.checkpoint and options.side == "policy":
        raise ConfigError("--checkpoint and --side=policy: no policy is loaded where you are it; leave one of them out")
    return config, options


def _profile(profiles: Sequence[Profile], profile_id: str) -> Profile:
    if not profile_id:
        return profiles[0]
    matches = [profile for profile in profiles if profile.id == profile_id]
    if not matches:
        known = ", ".join(profile.id for profile in profiles[:8])
        raise ConfigError(f"--profile={profile_id}: no such id among {len(profiles)} profiles ({known}, …)")
    return matches[0]


def _conversation(
    config: ConfigDict, options: flags.FlagValues, profile: Profile, trained: TrainedPolicy | None
) -> Conversation:
    mesh = make_sampling_mesh(config.mesh, config.mesh_sampling)
    spec = eval_spec(config)
    if options.side == "user":
        # The person makes up the first words: the model need not.
        profile = dataclasses.replace(profile, first_talk=profile.first_talk or "-")
        weights, base = (trained.weights, trained.base_section) if trained else (None, None)
        agents = Agents.load(config, spec, mesh, weights, policy_base=base)
    else:
        check_context(config, "user")
        spec = dataclasses.replace(spec, mode="direct", say_tokens=typed_tokens(spec.context))
        user, tokenizer = load_model(config.user, "user", mesh)
        prompts = load_prompts(config.data.language, config.user.prompts or None)
        agents = Agents.build(
            user, user, tokenizer, prompts, spec, mesh, style=config.user.style, scenario=config.user.scenario
        )
    limits = limits_of(config, spec, config.eval.temperature)
    seed = secrets.randbits(31) if options.seed is None else options.seed
    return Conversation(agents, profile, limits, seed)


if __name__ == "__main__":
    sys.exit(main())
