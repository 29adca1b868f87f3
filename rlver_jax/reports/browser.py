"""The data of the page's dialogue browser: compressed JSON, as many as the page may weigh.

Compressed and in base 64, what models wrote cannot close the element that it lies in; the page's script unpacks it and
shows it as text only.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rlver_jax.reports.dialogue_store import DialogueStore, as_json, page_size
from rlver_jax.reports.shorten import MOST_CHARACTERS, evenly, level, shortened
from rlver_jax.reports.sources import Outline, Run, intention_label, intention_labels
from rlver_jax.reports.statistics import OUTCOMES, outcome
from rlver_jax.text.console import plain_line

# Shares of the page below which nothing is taken from: a dialogue is whole, a profile has all its dialogues.
_DIALOGUE, _PROFILE = 1 / 16, 1 / 4
_TRIES = 6
_GZIP = 31  # zlib's `wbits`


class Packed(NamedTuple):
    """Dialogues ready for the page."""

    text: str  # base 64 of gzip of JSON
    included: int
    all: int
    shortened: int  # of those kept


class Candidate(NamedTuple):
    """A dialogue that may be in the page."""

    run: int
    step: int | None
    outline: Outline


class Selection(NamedTuple):
    """The dialogues that are in the page, and how large one may be."""

    chosen: Sequence[Candidate]
    most_bytes: float


def pack(runs: Sequence[Run], most_bytes: int) -> Packed:
    """Packs the dialogues of all runs in at most `most_bytes` characters.

    Where they don't fit, the largest dialogues are cut down, as far as they take more than a sixteenth of the page. If
    that is not enough, profiles are left out, evenly over their first appearances: a profile's dialogues stay together,
    so that before and after can be compared, unless they alone would take more than a quarter of the page.
    """
    everything = [Candidate(i, log.step, r) for i, run in enumerate(runs) for log in run.logs for r in log.records]
    best, room, seen = Packed("", 0, len(everything), 0), float(most_bytes), set()
    for _ in range(_TRIES if everything else 0):
        selection = _select(everything, room)
        packed = _packed(runs, selection, len(everything))
        if len(packed.text) <= most_bytes and packed.included >= best.included:
            best = packed
        whole = packed.included == packed.all and not packed.shortened
        fits = len(packed.text) <= most_bytes
        if (fits and (whole or len(packed.text) > 0.97 * most_bytes)) or packed.included in seen:
            break
        seen.add(packed.included)
        # Sizes are of dialogues compressed alone; together they take less.
        room *= most_bytes / max(len(packed.text), 1) * 0.985
    return best


def _select(everything: Sequence[Candidate], room: float) -> Selection:
    """What fits into about `room` bytes."""
    sizes = np.array([one.outline["text"].size for one in everything], np.float64)
    most = max(level(sizes, room), room * _DIALOGUE)
    sizes = np.minimum(sizes, most)
    numbers: dict[bytes, int] = {}
    profile_of = np.array([numbers.setdefault(one.outline["profile_key"], len(numbers)) for one in everything])
    taken = _thinned(sizes, profile_of, room)
    totals = np.bincount(profile_of[taken], sizes[taken], minlength=len(numbers))
    chosen = _fitting(totals, room)
    return Selection([everything[i] for i in taken if chosen[profile_of[i]]], most)


def _thinned(sizes: np.ndarray, profile_of: np.ndarray, room: float) -> np.ndarray:
    """Indices of the dialogues that profiles may show, rising: all, but for those whose dialogues take too much."""
    totals = np.bincount(profile_of, sizes)
    most = max(level(totals, room), room * _PROFILE)
    taken = np.ones(len(sizes), bool)
    for profile in np.flatnonzero(totals > most):
        own = np.flatnonzero(profile_of == profile)
        count = len(own)
        while count > 1 and sizes[spread := np.array(evenly(own.tolist(), max(count, 2)))].sum() > most:
            count = int(count * min(most / sizes[spread].sum(), 0.99))
        taken[own] = False
        taken[spread if count > 1 else own[-1:]] = True
    return np.flatnonzero(taken)


def _fitting(totals: np.ndarray, room: float) -> np.ndarray:
    """Bool [profiles]: as many as fit, evenly."""
    index, count = np.arange(len(totals)), len(totals)
    while True:
        chosen = (index + 1) * count // len(totals) > index * count // len(totals)
        total = totals[chosen].sum()
        if total <= room or count == 0:
            return chosen
        count = min(count - 1, int(count * room / total))


def _packed(runs: Sequence[Run], selection: Selection, count: int) -> Packed:
    """These dialogues, cut where they are larger than they may be."""
    labels = intention_labels(one.outline for one in selection.chosen)
    profiles: dict[bytes, int] = {}
    cut = 0

    def parts() -> Iterator[bytes]:
        nonlocal cut
        head = {"runs": [plain_line(run.name) for run in runs], "intentions": labels, "outcomes": OUTCOMES}
        yield as_json(head)[:-1] + b',"dialogues":['
        for i, (run, step, outline) in enumerate(selection.chosen):
            text, whole = _text(runs[run].store, outline, selection.most_bytes)
            cut += not whole
            front = {
                "run": run,
                "step": step,
                "who": profiles.setdefault(outline["profile_key"], len(profiles)),
                "intention": labels.index(intention_label(outline)),
                "outcome": OUTCOMES.index(outcome(outline["emotion"])),
            }
            yield b"," * (i > 0) + as_json(front)[:-1] + b"," + text[1:]
        yield b"]}"

    data = _compressed(parts())
    return Packed(data, len(selection.chosen), count, cut)


def _text(store: DialogueStore, outline: Outline, most: float) -> tuple[bytes, bool]:
    """(a dialogue as JSON, whether it is whole) in about `most` bytes of a page."""
    stored = outline["text"]
    data = store.get(stored)
    if stored.size <= most and stored.characters <= MOST_CHARACTERS:
        return data, True
    dialogue, characters = json.loads(data), MOST_CHARACTERS
    for _ in range(_TRIES * 2):
        data = as_json(shortened(dialogue, characters))
        size = page_size(len(zlib.compress(data, 1)), len(data))
        if size <= most:
            break
        characters = int(min(characters, len(data)) * min(most / size, 0.95) * 0.97)
    return data, False


def _compressed(parts: Iterable[bytes]) -> str:
    packer = zlib.compressobj(9, wbits=_GZIP)
    data = b"".join([*(packer.compress(part) for part in parts), packer.flush()])
    return base64.b64encode(data).decode("ascii")
