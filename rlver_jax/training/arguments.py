"""The command line of what trains in a folder, `rlver train` and `rlver sft`."""

from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict

from rlver_jax.config.flags import config_from_flags, define_path
from rlver_jax.config.validate import ConfigError
from rlver_jax.parallel import distributed


def run_arguments(
    argv: Sequence[str], usage: str | None, define: Callable[[flags.FlagValues], None] = lambda values: None
) -> tuple[ConfigDict, flags.FlagValues]:
    """The config, not validated, and the flags; the processes have found each other by then.

    Args:
        define: defines further flags.

    Raises:
        ConfigError: words that are no flags, or no --workdir.
        ValueError: flags that cannot be.
    """

    def define_all(values: flags.FlagValues) -> None:
        define_path("workdir", None, "folder of the run; an interrupted run resumes", values)
        define(values)
        distributed.define_flags(values)

    config, options, rest = config_from_flags(argv, usage, define_all)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --workdir=DIR; --help lists them")
    if not options.workdir:
        raise ConfigError("no --workdir was given; name the folder that metrics and checkpoints are written to")
    distributed.initialize(options, finish_steps=True)
    return config, options
