"""Which recorded dialogues judges are compared with: --held_out and --contexts of `evaluate --agreement`."""

from collections.abc import Sequence

import numpy as np
from absl import flags

from rlver_jax.config.validate import ConfigError
from rlver_jax.profiles.held_out import held_out


def define_flags(values: flags.FlagValues) -> None:
    """--contexts and --held_out."""
    flags.DEFINE_integer(
        "contexts", 0, "with --agreement: as many contexts at least, in whole dialogues; 0: all", 0, flag_values=values
    )
    flags.DEFINE_float(
        "held_out",
        None,
        "with --agreement: only dialogues of this share of the profiles, chosen by a hash of their ids; 0 to 1",
        flag_values=values,
    )


def check_flags(options: flags.FlagValues) -> None:
    """Raises ConfigError where --held_out is given, but nothing that it selects from, or is no share."""
    share = options.held_out
    if share is not None and not options.agreement:
        raise ConfigError(f"--held_out={share}: selects among the files of --agreement, which was not given")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--held_out={share}: expected a share of the profiles above 0 and up to 1, such as 0.3")


def chosen(counts: Sequence[int], profiles: Sequence[str], options: flags.FlagValues, seed: int) -> list[int]:
    """Indices of the dialogues that --held_out and --contexts choose, in that order.

    Args:
        counts: appraised replies of each dialogue.
        profiles: the id of each one's profile.
        seed: of the order that --contexts takes dialogues in.

    Raises:
        ConfigError: none is left, or fewer contexts than are asked for.
    """
    eligible = list(range(len(counts)))
    if options.held_out is not None:
        eligible = [i for i in eligible if held_out(profiles[i], options.held_out)]
        if not eligible:
            raise ConfigError(
                f"--held_out={options.held_out}: none of the {len(set(profiles))} profiles is among the held-out ones; "
                f"give a larger share"
            )
    return [eligible[i] for i in drawn([counts[i] for i in eligible], options.contexts, seed)]


def drawn(counts: Sequence[int], contexts: int, seed: int) -> list[int]:
    """Indices of whole dialogues in a drawn order until they hold `contexts` appraised replies; 0: all, in their order.

    Args:
        counts: appraised replies of each.

    Raises:
        ConfigError: there are fewer.
    """
    if sum(counts) < max(contexts, 1):
        raise ConfigError(f"--contexts={contexts}: the files hold {sum(counts)} appraised replies; ask for fewer")
    if not contexts:
        return list(range(len(counts)))
    order = np.random.default_rng(seed).permutation(len(counts))
    enough = int(np.searchsorted(np.cumsum(np.asarray(counts)[order]), contexts)) + 1
    return [int(i) for i in order[:enough]]
