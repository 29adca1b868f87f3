"""--sage of `evaluate`: the prompts of SAGE's own repository for users at endpoints, and for the policy."""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from rlver_jax.config.flags import define_path
from rlver_jax.config.validate import ConfigError
from rlver_jax.user import sage_clone


def define_flag(values: flags.FlagValues) -> None:
    """--sage."""
    define_path("sage", "", "clone of github.com/Tencent/digitalhuman: its prompts for users at endpoints", values)


def take(config: ConfigDict | None, options: flags.FlagValues) -> None:
    """Has --sage replace a config's prompts.

    Args:
        config: whose user plays or appraises; None: only judges do.

    Raises:
        ValueError: it names no clone of SAGE's repository, or nobody's prompts.
    """
    if not options.sage:
        return
    sage_clone.read(Path(options.sage))
    if config is None and not options.judge:
        raise ConfigError(f"--sage={options.sage}: no user here has prompts; give --judge")
    if config is not None:
        config.user.prompts = options.sage
