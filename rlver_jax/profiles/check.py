"""What is odd about profiles that can be read: a run would play them without a word, and not as they were meant.

Each function returns a warning, or none. Of a data set that need not fit into memory the first `LOOKED_AT` profiles are
looked at.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from rlver_jax.profiles.indexed import IndexedProfiles
from rlver_jax.profiles.reader import shared_personas
from rlver_jax.profiles.schema import Profile

LOOKED_AT = 1000
NAMED = 3  # ids or sentences that a warning names
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")
_LETTERS_A_CHARACTER = 3  # an English word takes about as many letters for one Chinese character of the same meaning
# Languages of prompts that can be told from a text's characters: whether they are Chinese.
_IS_CHINESE = {"zh": True, "en": False}


def warnings_of(
    profiles: Sequence[Profile],
    *,
    field: str,
    language: str,
    known_task: Callable[[str], object] | None,
    keys: Sequence[str] = (),
    held_out: Sequence[Profile] = (),
) -> list[str]:
    """All warnings of a set of profiles, and of those that it shares with a held-out one.

    Args:
        field: what names the profiles in messages, such as data.train.
        language: `data.language`, of the prompts.
        known_task: what the prompts know of a hidden intention, None where it is none of theirs; None: they say
            nothing of any.
        keys: of their hidden intentions.
    """
    seen = profiles[:LOOKED_AT] if isinstance(profiles, IndexedProfiles) else profiles
    warnings = [
        _language(seen, field, language),
        _tasks(seen, field, known_task, keys) if known_task else "",
        _twice(seen, field),
    ]
    return [text for text in (*warnings, shared_personas_warning(profiles, held_out)) if text]


def shared_personas_warning(train: Sequence[Profile], test: Sequence[Profile]) -> str:
    """Says where training has seen personas of the test set; empty: nowhere.

    RLVER's published test set of 100 (SAGE's) shares 47 personas, those of 54 profiles, with its training set: a score
    on it is not one on strangers.
    """
    shared = set(shared_personas(train, test))
    if not shared:
        return ""
    ids = [profile.id for profile in test if profile.persona in shared]
    return (
        f"{len(shared)} personas of the evaluation profiles are also trained on ({len(ids)} of {len(test)} profiles: "
        f"{_first_few(ids)}); leave these out to measure how the policy does with people it has not met"
    )


def is_chinese(profile: Profile) -> bool:
    """Whether a profile is written in Chinese characters, for the most part."""
    text = profile.persona + profile.background
    chinese = len(_CHINESE.findall(text))
    return chinese * _LETTERS_A_CHARACTER > len(_LETTER.findall(text)) - chinese


def likely_language(profiles: Sequence[Profile]) -> str:
    """ "zh" where most profiles are Chinese, else "en"."""
    return "zh" if 2 * sum(map(is_chinese, profiles)) > len(profiles) else "en"


def _language(profiles: Sequence[Profile], field: str, language: str) -> str:
    if language not in _IS_CHINESE:
        return ""
    wanted = _IS_CHINESE[language]
    odd = [profile.id for profile in profiles if is_chinese(profile) != wanted]
    if not odd:
        return ""
    other = next(name for name, chinese in _IS_CHINESE.items() if chinese != wanted)
    other_language = "not in Chinese" if wanted else "in Chinese"
    remedy = f"set --config.data.language={other} for prompts that fit"
    if 2 * len(odd) <= len(profiles):
        remedy = "translate them or leave them out"
    return (
        f"{field}: {len(odd)} of {len(profiles)} profiles are written {other_language} ({_first_few(odd)}), but "
        f"data.language={language}, so that prompts and profiles mix two languages; {remedy}"
    )


def _tasks(profiles: Sequence[Profile], field: str, known: Callable[[str], object], keys: Sequence[str]) -> str:
    ids: dict[str, list[str]] = {}
    for profile in profiles:
        ids.setdefault(profile.hidden_intention.strip(), []).append(profile.id)
    unknown = {task: of for task, of in ids.items() if known(task) is None}
    if not unknown:
        return ""
    most = sorted(unknown.items(), key=lambda item: -len(item[1]))[:NAMED]
    shown = "; ".join(f"{len(of)} x {_cut(task)!r} of {_first_few(of)}{_meant(task, keys)}" for task, of in most)
    more = f"; and {len(unknown) - NAMED} more" * (len(unknown) > NAMED)
    count = sum(map(len, unknown.values()))
    return (
        f"{field}: {count} of {len(profiles)} profiles have a task that is none of the prompts' hidden "
        f"intentions ({shown}{more}): such a user is told its wish, but not what raises and lowers its emotion. "
        f"Name one of the prompts' ({', '.join(keys)}), or write an entry with that sentence into "
        f"user.prompts=FOLDER/hidden_intentions.json (docs/profiles.md)"
    )


def _meant(task: str, keys: Sequence[str]) -> str:
    close = difflib.get_close_matches(task, keys, 1)
    return f", did you mean {close[0]!r}?" if close else ""


def _twice(profiles: Sequence[Profile], field: str) -> str:
    first: dict[tuple[str, str, str], str] = {}
    pairs = list(_repeats(profiles, first))
    if not pairs:
        return ""
    shown = _first_few(f"{later} as {earlier}" for earlier, later in pairs)
    return (
        f"{field}: {len(pairs)} of {len(profiles)} profiles have persona, scene and task of an earlier one ({shown}); "
        f"leave them out, or rollout.group plays one profile several times"
    )


def _repeats(profiles: Iterable[Profile], first: dict[tuple[str, str, str], str]) -> Iterator[tuple[str, str]]:
    """(id of the first one, id) of each profile whose texts were there before."""
    for profile in profiles:
        texts = (profile.persona.strip(), profile.background.strip(), profile.hidden_intention.strip())
        if texts in first:
            yield first[texts], profile.id
        first.setdefault(texts, profile.id)


def _first_few(texts: Iterable[str]) -> str:
    names = list(texts)
    return ", ".join(names[:NAMED]) + ", …" * (len(names) > NAMED)


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
