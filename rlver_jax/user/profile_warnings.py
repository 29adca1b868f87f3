"""What is odd about a config's profiles, said before anything is played with them."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from rlver_jax.profiles.check import warnings_of
from rlver_jax.profiles.schema import Profile
from rlver_jax.user.prompts import Prompts, load_prompts


def profile_warnings(
    config: ConfigDict, train: Sequence[Profile] | None, held_out: Sequence[Profile] | None
) -> list[str]:
    """Warnings of what a run trains on, and of what it is evaluated with; see `profiles.check.warnings_of`.

    Args:
        train, held_out: profiles of data.train and data.eval (data.train where that is empty); None: not used.

    Raises:
        ValueError, OSError: prompts that cannot be used.
    """
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    warnings = check(prompts, train, "data.train", held_out or ()) if train is not None else []
    if held_out is not None and (train is None or config.data.eval):
        warnings += check(prompts, held_out, "data.eval" if config.data.eval else "data.train")
    return warnings


def check(prompts: Prompts, profiles: Sequence[Profile], field: str, held_out: Sequence[Profile] = ()) -> list[str]:
    """Warnings of one set of profiles with these prompts."""
    known = prompts.intention if prompts.tells_guidance else None
    keys = tuple(prompts.intentions)
    return warnings_of(profiles, field=field, language=prompts.language, known_task=known, keys=keys, held_out=held_out)
