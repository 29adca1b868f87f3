"""What a config's table of fields (rlver_jax/config/fields.py) is made of, and what is read off it."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

COUNT, POSITIVE, SHARE, SEED = (0, None), (1, None), (0, 1), (0, 2**32 - 1)  # ranges


class AllBut:
    """Holds every value but some: of a registry that grows, what a new entry does not read is without effect there."""

    def __init__(self, *values: Any):
        self.values = values

    def __contains__(self, value: object) -> bool:
        """Whether it is none of them."""
        return value not in self.values


@dataclass(frozen=True)
class Field:
    """One field of a config: all that is known of it, in one place.

    Attributes:
        default: its value in the base config; its type is the type of all its values.
        doc: what it means, with the source of its default where there is one.
        choices: the texts that it may hold; empty: any text.
        registry: where its choices are registered instead (`training.setup.check_learning` reads them).
        range: (lowest, highest) number, each None for no bound of its own.
        unit: of a number.
        path: whether it says where files lie; the hosts of a run may keep the same files in different places.
        free: whether it may change when an interrupted run resumes, since it changes nothing that is computed, beyond
            rounding.
        unused: {name of another field: its values that leave this one without effect, or `AllBut` those that don't}.
    """

    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    registry: str = ""
    range: tuple[float | None, float | None] = (None, None)
    unit: str = ""
    path: bool = False
    free: bool = False
    unused: Mapping[str, Container[Any]] = field(default_factory=dict)

    def allowed(self) -> str:
        """What it may hold, in words."""
        if self.choices:
            return " | ".join(choice or "''" for choice in self.choices)
        if self.registry:
            return f"a name in {self.registry}"
        if isinstance(self.default, bool):
            return "True | False"
        low, high = self.range
        bounds = [f"{sign} {bound}" for sign, bound in (("≥", low), ("≤", high)) if bound is not None]
        return f"{' and '.join(bounds)} {self.unit}".strip()


Section = Mapping[str, Any]  # of Field and of further sections, by name


def flat_fields(table: Section, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """("section.name", field) of every field, in the table's order."""
    for name, entry in table.items():
        if isinstance(entry, Field):
            yield prefix + name, entry
        else:
            yield from flat_fields(entry, f"{prefix}{name}.")


def defaults(table: Section) -> ConfigDict:
    """A config with every field's default."""
    config = ConfigDict()
    for name, entry in table.items():
        config[name] = entry.default if isinstance(entry, Field) else defaults(entry)
    return config


def listing(table: Section) -> str:
    """A line for each field: its name, default, what it may hold, and its meaning."""
    lines = []
    for name, one in flat_fields(table):
        allowed = one.allowed()
        lines.append(f"  --config.{name}={one.default!r}{f' ({allowed})' * bool(allowed)}: {one.doc}")
    return "\n".join(lines)


def without_effect(table: Section, values: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """Of the fields named, those that other fields' `values` leave without effect; a line each, with the reason."""
    fields = dict(flat_fields(table))
    for name in names:
        for other, unused in fields[name].unused.items() if name in fields else ():
            if values.get(other) in unused:
                yield f"--config.{name} is without effect where {other}={values[other]!r}"


def free_names(table: Section, prefix: str = "") -> tuple[str, ...]:
    """Names of the free fields; of a section that has no others, its own."""
    names: list[str] = []
    for name, entry in table.items():
        if isinstance(entry, Field):
            names += [prefix + name] * entry.free
        elif all(field.free for _, field in flat_fields(entry)):
            names.append(prefix + name)
        else:
            names += free_names(entry, f"{prefix}{name}.")
    return tuple(names)
