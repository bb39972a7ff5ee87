"""What of a run is exported, and where in the file it goes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from sonde.exceptions import MeasureNotFoundError
from sonde.log.format.names import link_name
from sonde.log.reading.index import WriterLog
from sonde.log.reading.ranks import ID, Key
from sonde.log.selection import match_layers, match_steps

from .groups import Group, group_records
from .origin import Address, Origin, TableContent, Writer

if TYPE_CHECKING:
    from sonde.log.run import Run

_ROOT_NAMES = frozenset("metadata metadata_byte tables chunks chunk chunk_place".split())


@dataclass(frozen=True)
class Plan:
    """What is exported.

    Attributes:
        groups: The records.
        superseded: What a writer recorded that was superseded, by measure and source, as JSON: that
            it was recorded, not its arrays. Whether the ranks agree is decided with it. None of it
            is stated where there is one rank.
    """

    groups: list[Group]
    superseded: dict[Writer, list[dict[str, Any]]]


def plan_export(
    run: Run,
    origin: Origin,
    layers: str | Sequence[str] | None,
    steps: Sequence[int] | slice | None,
    measures: Sequence[str] | None,
) -> Plan:
    """Choose the records and streams that are exported; see `export_run`.

    Raises:
        MeasureNotFoundError: If the run has no such measure.
    """
    of = f"run {run.name!r}"
    for measure in measures or ():
        if measure not in run.measures:
            raise MeasureNotFoundError(
                f"{of} has no records of '{measure}'; it has: "
                f"{', '.join(run.measures) or 'none yet'}"
            )
    by_rank = [_visible_records(origin, rank) for rank in origin.ranks]
    keys = [
        key
        for key in dict.fromkeys(key for records in by_rank for key in records)
        if not measures or key[0] in measures
    ]
    taken = None if layers is None else frozenset(match_layers(layers, run.layers, of))
    allowed = None
    if steps is not None:
        recorded = [
            {origin.record(address).step for records in by_rank for address in records.get(key, ())}
            for key in keys
        ]
        allowed = dict(zip(keys, match_steps(steps, recorded, of), strict=True))
    groups = []
    for records in by_rank:
        for key in keys:
            addresses = [
                address
                for address in records.get(key, ())
                if allowed is None or origin.record(address).step in allowed[key]
            ]
            groups += group_records(origin, key, addresses, taken)
    superseded = {}
    if len(origin.ranks) > 1:
        seen = {address for records in by_rank for found in records.values() for address in found}
        wanted = dict.fromkeys(keys) if allowed is None else allowed
        superseded = {name: _superseded(log, seen, wanted) for name, log in origin.writers.items()}
    return Plan(groups, superseded)


def _visible_records(origin: Origin, rank: int) -> dict[Key, list[Address]]:
    """Return the records of a rank that a reader of it sees, in order of their steps.

    A reader of the run sees no others of that rank.
    """
    return {
        key: [
            (share.writer.attempt, rank, *key, share.record.sequence)
            for _, (share,) in sorted(records.items())
        ]
        for key, records in origin.of_rank[rank].records.items()
    }


def _superseded(
    log: WriterLog, seen: Collection[Address], wanted: Mapping[Key, Collection[int] | None]
) -> list[dict[str, Any]]:
    """List the records of a writer that no reader sees, if their steps are wanted."""
    listed = []
    for key, parts in log.parts.items():
        if key not in wanted:
            continue
        steps = wanted[key]
        records = [
            record
            for part in parts
            for record in part.records
            if (log.attempt, log.rank, *key, record.sequence) not in seen
            and (steps is None or record.step in steps)
        ]
        if records:
            listed.append(
                {
                    "measure": key[0],
                    "source": key[1],
                    "names_examples": any(r.part.has(r.row, ID) for r in records),
                    "steps": [record.step for record in records],
                    "sequences": [record.sequence for record in records],
                }
            )
    return listed


class Places:
    """Where groups and tables go: below the rank, where there are several, and the attempt."""

    def __init__(self, origin: Origin, groups: Sequence[Group]) -> None:
        self._ranks = origin.ranks
        self._origin = origin
        self._sources = list(dict.fromkeys(group.key[1] for group in groups))
        self._attempts = {f"attempt{attempt}" for attempt, _ in origin.writers}

    def path_of(self, group: Group) -> str:
        """Return the path of a group."""
        measure, source = (link_name(name) for name in group.key)
        is_taken = measure in _ROOT_NAMES | self._attempts
        top = f"{measure}::measure" if is_taken else measure
        return f"{self._folder(group.rank, group.attempt)}/{top}/{source}"

    def tables(
        self,
    ) -> tuple[list[tuple[str, str, TableContent]], dict[tuple[Writer, str], int]]:
        """Return tables as (path, source, content), and the number of the one a writer has."""
        tables: list[tuple[str, str, TableContent]] = []
        number_of: dict[tuple[Writer, str], int] = {}
        for rank in self._ranks:
            for source in self._sources:
                contents: list[tuple[int, TableContent]] = []
                for writer in sorted(self._origin.writers, reverse=True):
                    content = self._origin.tables(writer, source) if writer[1] == rank else None
                    if content is None:
                        continue
                    same = [number for number, other in contents if _are_same(content, other)]
                    if not same:
                        same = [len(tables)]
                        folder = self._folder(rank, writer[0] if contents else None)
                        tables.append((f"{folder}/tables/{link_name(source)}", source, content))
                        contents.append((same[0], content))
                    number_of[writer, source] = same[0]
        return tables, number_of

    def _folder(self, rank: int, attempt: int | None) -> str:
        by_rank = f"/rank{rank}" if len(self._ranks) > 1 else ""
        return by_rank if attempt is None else f"{by_rank}/attempt{attempt}"


def _are_same(one: TableContent, other: TableContent) -> bool:
    return (one.attributes, one.dims, list(one.arrays)) == (
        other.attributes,
        other.dims,
        list(other.arrays),
    ) and all(_bits(values) == _bits(other.arrays[field]) for field, values in one.arrays.items())


def _bits(values: npt.NDArray[Any] | str) -> object:
    return values if isinstance(values, str) else (values.dtype, values.shape, values.tobytes())
