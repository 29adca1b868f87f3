"""Which profiles each step plays, on which process, in an order that a resumed run continues exactly.

The order is a pure function of (seed, epoch): nothing depends on how many processes share the work or on what
was read before, so `{epoch, position}` is all that a checkpoint has to keep.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rlver_jax.profiles.indexed import IndexedProfiles
from rlver_jax.profiles.schema import Profile

Batch = list[tuple[int, Profile]]


class ProfileReader:
    """Endless stream of global batches of profiles; each process reads its own slice of every batch.

    Each epoch visits every profile once, in a fresh order if `shuffle`, else in the file's. A batch that
    reaches the end of an epoch goes on with the next one; no profile ever stands twice in one batch, because
    the next epoch then starts with profiles that the batch does not have yet (its others follow right after,
    in their drawn order).
    """

    def __init__(
        self,
        source: Sequence[Profile],
        *,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        shuffle: bool = True,
    ):
        """`batch_size` is global: profiles a step over all processes.

        Raises ValueError if the batch can't be divided among the processes or holds more profiles than there
        are, or if another argument is out of range.
        """
        _check_process(process_index, process_count)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, expected an integer from 0 to 2**64 - 1")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(
                f"batch_size is {batch_size}, expected a positive multiple of the {process_count} processes: "
                "each plays equally many profiles; change the batch or the number of processes"
            )
        if batch_size > len(source):
            raise ValueError(
                f"batch_size is {batch_size} but there are only {len(source)} profiles, expected a batch "
                "without repeats; lower it (a larger group also makes more dialogues) or add profiles"
            )
        self._source = source
        self._seed = operator.index(seed)
        self._batch_size = operator.index(batch_size)
        self._process_index = process_index
        self._process_count = process_count
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._known: tuple[int, np.ndarray] = (0, self._drawn(0))  # the order of the epoch last looked at

    def next_batch(self) -> Batch:
        """This process's share of the next global batch, as (index into the source, profile); moves on."""
        order = self._order(self._epoch)
        batch = order[self._position : self._position + self._batch_size]
        self._position += len(batch)
        missing = self._batch_size - len(batch)
        if self._position == len(order):
            self._epoch, self._position = self._epoch + 1, missing
            batch = np.concatenate([batch, self._order(self._epoch)[:missing]])
        share = self._batch_size // self._process_count
        mine = batch[self._process_index * share : (self._process_index + 1) * share]
        return [(int(index), self._source[int(index)]) for index in mine]

    def state(self) -> dict[str, int]:
        """Where the stream stands, for a checkpoint: the same on every process.

        `epoch` and `position` (profiles of that epoch already given out) say where it is; `seed`, `size` and
        `batch_size` let `restore` refuse a reader that would give another sequence.
        """
        return {"epoch": self._epoch, "position": self._position} | self._identity()

    def restore(self, state: Mapping[str, int]) -> None:
        """Resumes from a `state()`, also one saved under another number of processes.

        Keys other than `epoch` and `position` may be absent. Raises ValueError, and moves nothing, if the
        state is malformed or belongs to another seed, number of profiles or batch size.
        """
        identity = self._identity()
        remedy = "restore what `state()` returned, or start a new run"
        if not isinstance(state, Mapping) or not {"epoch", "position"} <= set(state) <= {
            "epoch",
            "position",
            *identity,
        }:
            raise ValueError(f"state is {state!r}, expected a dict with 'epoch' and 'position'; {remedy}")
        for name, value in state.items():
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
                raise ValueError(f"state[{name!r}] is {value!r}, expected an integer of at least 0; {remedy}")
        for name, value in identity.items():
            if state.get(name, value) != value:
                raise ValueError(
                    f"the state was saved with {name} = {state[name]} but this reader has {name} = {value}: "
                    f"resuming would skip or repeat profiles; use the saved run's {name}, or start a new run"
                )
        epoch, position, size = state["epoch"], state["position"], len(self._source)
        if position >= size or (epoch * size + position) % self._batch_size:
            raise ValueError(
                f"state is at epoch {epoch}, position {position}, expected a position below {size} that "
                f"a whole number of batches of {self._batch_size} reaches; {remedy}"
            )
        self._epoch, self._position = int(epoch), int(position)

    def _identity(self) -> dict[str, int]:
        return {"seed": self._seed, "size": len(self._source), "batch_size": self._batch_size}

    def _drawn(self, epoch: int) -> np.ndarray:
        """The order drawn for an epoch from (seed, epoch), before `_order` keeps batches free of repeats.

        Sorting the raw 64-bit stream of Philox, whose bits NumPy keeps the same for good, rather than
        `Generator.permutation`, which a new version may change: a resumed run must go on as it began.
        """
        size = len(self._source)
        if not self._shuffle:
            return np.arange(size)
        raw = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64)).random_raw(size)
        return np.argsort(raw, kind="stable")

    def _order(self, epoch: int) -> np.ndarray:
        """The order of an epoch: as drawn, but its head avoids what the batch across the boundary has
        already.

        Only the first `batch_size` positions can change, so with two batches or more an epoch, the tail of the
        epoch before is as drawn and one look back is enough; smaller sources walk from the last order known,
        or epoch 0.
        """
        size, batch_size = len(self._source), self._batch_size
        known, order = self._known
        if known > epoch:
            known, order = 0, self._drawn(0)
        if size >= 2 * batch_size and known < epoch - 1:
            known, order = epoch - 1, self._drawn(epoch - 1)
        while known < epoch:
            known += 1
            open_tail = known * size % batch_size  # profiles that the batch across the boundary takes from before it
            order = _avoid(self._drawn(known), order[size - open_tail :], (batch_size - open_tail) % batch_size)
        self._known = (known, order)
        return order


def evaluation_batches(
    source: Sequence[Profile],
    *,
    batch_size: int,
    num_profiles: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The first `num_profiles` (default: all) held-out profiles once each, in order, in global batches.

    Yields this process's share of each batch as (index, profile). Every process gets the same number of
    batches; the last may be short, so that a process's share of it may be smaller than the others' or empty.
    Raises ValueError at the call if the arguments don't fit the source.
    """
    _check_process(process_index, process_count)
    count = len(source) if num_profiles is None else num_profiles
    if not 1 <= count <= len(source):
        raise ValueError(
            f"num_profiles is {count}, expected 1 to {len(source)}, the number of held-out profiles; "
            "lower it or name a larger file"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}, expected a positive multiple of the {process_count} processes; "
            "change one of them"
        )
    share = batch_size // process_count

    def batches() -> Iterator[Batch]:
        for start in range(process_index * share, count + process_index * share, batch_size):
            yield [(index, source[index]) for index in range(start, min(start + share, count))]

    return batches()


def shared_personas(train: Sequence[Profile], test: Sequence[Profile]) -> list[str]:
    """Persona texts that stand, to the letter, in both sets; each once, in the order of `test`."""
    known = train.has_persona if isinstance(train, IndexedProfiles) else {one.persona for one in train}.__contains__
    return list(dict.fromkeys(profile.persona for profile in test if known(profile.persona)))


def _avoid(order: np.ndarray, taken: np.ndarray, count: int) -> np.ndarray:
    """`order` with its first `count` entries free of `taken`: those free move ahead, all else keeps order."""
    if not count:
        return order
    free = np.flatnonzero(~np.isin(order, taken))[:count]
    return np.concatenate([order[free], np.delete(order, free)])


def _check_process(index: int, count: int) -> None:
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"process_index is {index} of process_count {count}, expected a count of at least 1 and an "
            "index from 0 to below it"
        )
