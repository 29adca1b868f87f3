"""Which users answer a training run by text, and what plays its dialogues then."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from rlver_jax.config.flags import import_remote
from rlver_jax.config.validate import ConfigError
from rlver_jax.training.device_users import DeviceUsers
from rlver_jax.training.setup import Run, answers_by_text
from rlver_jax.training.text_rollout import TextRollout, Users


def check_users(config: ConfigDict) -> None:
    """Refuses what users who answer by text cannot do, before anything is loaded.

    Raises:
        ConfigError: there are several processes.
    """
    if jax.process_count() > 1 and answers_by_text(config):
        raise ConfigError(
            f"training with users who answer by text (remote.user.url, or another tokenizer than the policy's) runs in "
            f"one process, and there are {jax.process_count()}; train on the devices of one host, or with a user on "
            f"the devices that shares the policy's tokenizer"
        )


def open_text_rollout(config: ConfigDict, run: Run, workdir: Path) -> TextRollout:
    """What plays the dialogues of a run whose users answer by text; close its users.

    Raises:
        ValueError: the endpoint cannot be asked as the config says, or the file of answers cannot be used.
    """
    users: Users
    if config.remote.user.url:
        users = import_remote("rlver_jax.training.remote_users").RemoteUsers(config, workdir)
    else:
        assert run.agents.mesh is not None
        users = DeviceUsers.load(config, run.agents.spec, run.agents.mesh, run.mesh, run.profiles)
    size, seed = config.rollout.batch, config.train.seed
    return TextRollout(config, run.agents, users, size, run.limits, run.widest, seed)
