"""Which profiles are held out: decided by a hash of the id alone, so that every command holds out the same ones.

All dialogues with a profile lie on one side, whichever file, line or order they come in. Profiles that are added later
move none of the others.
"""

import hashlib
from collections.abc import Sequence

_DIGITS = 16  # of the hash, hexadecimal: 64 bits


def held_out(profile_id: str, share: float) -> bool:
    """Whether a profile is among the share of all that is held out.

    It is if the first 64 bits of SHA-256 of its id (UTF-8), read as a fraction of 2^64, are below `share`. So
    each profile is held out with probability `share`, independently of the others: of 100 profiles and a share of 0.3
    about 30 are. Those of a smaller share are among those of a larger one.

    Args:
        profile_id: `Profile.id`, the field `profile` of a record.
        share: from 0 (none is held out) to 1 (all are).

    Raises:
        ValueError: the share is outside of 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of profiles to hold out is {share}, expected a number from 0 to 1")
    return _hash_position(profile_id) < share * 16**_DIGITS


def _hash_position(profile_id: str) -> int:
    return int(hashlib.sha256(profile_id.encode()).hexdigest()[:_DIGITS], 16)


def choose_held_out(ids: Sequence[str], share: float) -> set[str]:
    """Those of a few that are held out: the first by the hash of `held_out`, as many as make up the share.

    With 16 ids and a share of 0.2 each one's own draw would often hold out one or six. Of two or more neither none nor
    all are held out, unless that is asked.

    Raises:
        ValueError: as `held_out`.
    """
    held_out("", share)  # checks the share
    count = round(share * len(ids))
    if 0 < share < 1 and len(ids) > 1:
        count = min(max(count, 1), len(ids) - 1)
    return set(sorted(ids, key=_hash_position)[:count])
