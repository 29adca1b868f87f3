"""Which profiles are held out: decided by a hash of the id alone, so that every command holds out the same ones.

All dialogues with a profile lie on one side, whichever file, line or order they come in. Profiles that are added later
move none of the others.
"""

import hashlib

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
    digest = hashlib.sha256(profile_id.encode()).hexdigest()
    return int(digest[:_DIGITS], 16) < share * 16**_DIGITS
