"""Which users answer a training run by text, and what plays its dialogues then."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from rlver_jax.config.flags import import_remote
from rlver_jax.config.validate import ConfigError
from rlver_jax.parallel import distributed
from rlver_jax.training.announced import AnnouncedUsers
from rlver_jax.training.device_users import DeviceUsers
from rlver_jax.training.setup import Run, answers_by_text
from rlver_jax.training.text_rollout import TextRollout, Users


def check_users(config: ConfigDict) -> None:
    """Refuses what users who answer by text cannot do, before anything is loaded.

    Raises:
        ConfigError: batches shall overlap, but there are several processes.
    """
    if jax.process_count() > 1 and config.rollout.overlap and answers_by_text(config):
        raise ConfigError(
            f"rollout.overlap={config.rollout.overlap}: the next batch can be played during the update by one process "
            f"alone, and there are {jax.process_count()}; set --config.rollout.overlap=0"
        )


def open_text_rollout(config: ConfigDict, run: Run, workdir: Path) -> TextRollout:
    """What plays the dialogues of a run whose users answer by text; close its users.

    Raises:
        ValueError: the endpoint cannot be asked as the config says, or the file of answers cannot be used.
    """
    users: Users
    if config.remote.user.url:
        users = distributed.all_or_none(lambda: _endpoint_users(config, workdir))
    else:
        assert run.agents.mesh is not None
        users = DeviceUsers.load(config, run.agents.spec, run.agents.mesh, run.mesh, run.profiles)
    size, seed = config.rollout.batch, config.train.seed
    return TextRollout(config, run.agents, users, size, run.limits, run.widest, seed)


def _endpoint_users(config: ConfigDict, workdir: Path) -> Users:
    """On process 0 those that are asked."""
    if not distributed.is_main():
        return AnnouncedUsers()
    return import_remote("rlver_jax.training.remote_users").RemoteUsers(config, workdir)
