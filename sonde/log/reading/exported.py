"""Exported runs, as they are read: one file, whose bytes are checked before anything unpacks them.

An export is an ordinary HDF5 file for everyone else. sonde reads it without libhdf5's view of it,
which can hang on a damaged file: behind the HDF5 data stands a trailer that says where the metadata
lies, and the metadata says where each chunk lies, with a checksum for each. So opening a file of
any size reads its metadata only; a chunk is checked before it is unpacked, and an array after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError
from sonde.log.format.checked import (
    DETAILS,
    EVENT,
    FLAG,
    OBJECT,
    SEQUENCES,
    STEP,
    STEPS,
    TEXT,
    check,
    check_event,
    list_of,
    mapping_of,
    whole,
)
from sonde.log.format.damage import Damage
from sonde.log.format.positioned import open_regular

from .export_file import read_metadata
from .export_streams import ExportedGroup, ExportedStream
from .index import Table, WriterLog
from .parts import Part, Record, StreamKey, StreamShape
from .ranks import ID
from .segment_file import (
    DAMAGE,
    Place,
    SegmentFile,
    check_table,
    checksum_between,
    identify,
    naming,
    read_place,
)

Array = npt.NDArray[Any]
Facts = dict[str, Any]  # Any: JSON values.

_WRITER = {
    "attempt": whole(0, 10**9),
    "rank": whole(0, 10**9),
    "about": DETAILS,
    "resume_step": STEP,
    "has_recorded": FLAG,
    "events": list_of(OBJECT),
    "damage": list_of(OBJECT),
    "superseded": list_of(OBJECT),
}
_SUPERSEDED = {
    "measure": TEXT,
    "source": TEXT,
    "names_examples": FLAG,
    "steps": STEPS,
    "sequences": SEQUENCES,
}


class ExportedRun:
    """An exported run, which lists what it holds as `Index` does for a run directory.

    Args:
        path: The file.

    Attributes:
        info: The run's own description.

    Raises:
        RunNotFoundError: If it is no exported run.
        DamageError: If its trailer or metadata is damaged.
        FormatError: If it is of a newer format, or a part of a run directory.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def read(self) -> list[WriterLog]:
        """List everything the file holds, one entry per attempt and rank.

        Raises:
            RunNotFoundError: If it is no exported run any more.
            DamageError: If its trailer or metadata is damaged.
            FormatError: If it is of a newer format.
            OSError: If it cannot be read.
        """
        if identify(self._path.resolve()) != self._content.file:
            self._open()
        return list(self._content.writers)

    def _open(self) -> None:
        self._content = _Content(identify(self._path.resolve()))
        self.info: Facts = self._content.facts["info"]


def verify_export(path: Path) -> list[Damage]:
    """Check every byte of an exported run.

    Returns:
        What is damaged, chunk by chunk, and what was damaged when it was exported.

    Raises:
        RunNotFoundError: If it is no exported run.
        FormatError: If it is of a newer format.
        OSError: If it cannot be read.
    """
    file = identify(path.resolve())
    try:
        return list(_Content(file).verify())
    except DamageError as error:
        return [_whole(file, error)]


@dataclass
class _ExportedWriter(WriterLog):
    """What one rank wrote in one attempt, of which some may not have been exported."""

    first_step: int = 0

    @property
    def resume_step(self) -> int:
        return self.first_step


class _Parts(dict[tuple[str, str], list[Part]]):
    """The parts of a writer that recorded something, even where all of it was superseded."""

    def __bool__(self) -> bool:
        return True


class _Content:
    """What one state of an exported file holds. It holds no file open."""

    def __init__(self, file: SegmentFile) -> None:
        self.file = file
        self._metadata = read_metadata(file)
        self.facts: Facts = self._metadata.content
        with naming(file):
            chunks = Place.of(self.facts["chunks"])
            self._groups = [ExportedGroup(file, entry, chunks) for entry in self.facts["groups"]]
            for table in self.facts["tables"]:
                check_table(table, file, "source")
            for writer in self.facts["writers"]:
                _check_writer(writer, len(self.facts["tables"]))

    @cached_property
    def writers(self) -> list[WriterLog]:
        """What the file holds, one entry per attempt and rank."""
        tables = [_table(self.file, entry) for entry in self.facts["tables"]]
        return [self._writer(entry, tables) for entry in self.facts["writers"]]

    def verify(self) -> Iterator[Damage]:
        """Check every byte; yield what is damaged."""
        for writer in self.writers:
            yield from writer.damage
        for array in (array for entry in self.facts["tables"] for array in entry["arrays"]):
            if "reason" in array:
                path, _, what = array["reason"].partition(": ")
                yield Damage(path, 0, 0, what)
                continue
            try:
                _read_table(self.file, array)
            except DamageError as error:
                yield _whole(self.file, error)
        stretches: list[tuple[int, int]] = []
        for stream in (stream for group in self._groups for stream in group.streams):
            try:
                stretches += [(offset, size) for offset, size, _ in stream.chunks.tolist()]
                yield from stream.verify()
            except DamageError as error:  # Of what describes the stream.
                yield _whole(self.file, error)
        fd = open_regular(self.file.path)
        try:
            checksum = checksum_between(fd, self._metadata.num_bytes, stretches)
        finally:
            os.close(fd)
        if checksum != self._metadata.checksum:
            reason = "bytes that belong to no record do not match their checksum"
            yield Damage(self.file.name, 0, self.file.num_bytes, reason)

    def _writer(self, entry: Facts, tables: list[Table]) -> WriterLog:
        parts: dict[tuple[str, str], list[Part]] = _Parts() if entry["has_recorded"] else {}
        for listed in entry["superseded"]:
            parts[listed["measure"], listed["source"]] = [SupersededPart(listed)]
        for group in self._groups:
            if group.rank == entry["rank"]:
                part = ExportedPart(group, entry["attempt"])
                if part.records:
                    parts.setdefault((group.measure, group.source), []).append(part)
        by_first = sorted(parts, key=lambda key: min(p.records[0].sequence for p in parts[key]))
        parts |= {key: parts.pop(key) for key in by_first}
        return _ExportedWriter(
            entry["attempt"],
            entry["rank"],
            is_live=False,
            about=entry["about"],
            parts=parts,
            tables={source: tables[number] for source, number in entry["tables"].items()},
            events=entry["events"],
            damage=[Damage.of(item) for item in entry["damage"]],
            first_step=entry["resume_step"],
        )


class ExportedPart(Part):
    """The records of one measure × source that one attempt wrote.

    Args:
        group: The group they are in.
        attempt: The attempt.
    """

    def __init__(self, group: ExportedGroup, attempt: int) -> None:
        self._group = group
        rows = [row for row, of in enumerate(group.attempts) if of == attempt]
        self.records = [Record(*group.record(row), self, row) for row in rows]

    def streams(self, row: int) -> dict[StreamKey, StreamShape]:
        """Return the streams of one record, in the order they were recorded."""
        return {
            stream.key: StreamShape(stream.dtype, stream.dims(row), stream.shape(row))
            for stream in self._group.streams_of(row)
        }

    def has(self, row: int, key: StreamKey) -> bool:
        """Tell whether a record has a stream."""
        return self._group.find(row, key) is not None

    def dims(self, row: int, key: StreamKey) -> tuple[str, ...]:
        """Return the names of the axes of one stream of one record."""
        return self._find(row, key).dims(row)

    def read(self, row: int, key: StreamKey) -> Array:
        """Return one stream of one record.

        Raises:
            DamageError: If it, or the chunk it is in, does not match its checksum.
            InvalidInputError: If it is stored by zstd and hdf5plugin is not installed.
        """
        return self._find(row, key).read(row)

    def stream_keys(self) -> list[StreamKey]:
        """Return every stream that any record of this part has."""
        sets = dict.fromkeys(self._group.set_of(record.row) for record in self.records)
        present = frozenset[int]().union(*sets)
        return list(dict.fromkeys(s.key for s in self._group.streams if s.column in present))

    def num_bytes(self, rows: Sequence[int]) -> int:
        """Return the size of all arrays of some records in bytes."""
        alike: dict[frozenset[int], list[int]] = {}
        for row in rows:
            alike.setdefault(self._group.set_of(row), []).append(row)
        streams = self._group.streams
        return sum(
            streams[column].num_bytes(of_set)
            for columns, of_set in alike.items()
            for column in columns
        )

    def _find(self, row: int, key: StreamKey) -> ExportedStream:
        stream = self._group.find(row, key)
        if stream is None:
            raise KeyError(key)
        return stream


class SupersededPart(Part):
    """Records that were superseded, of which an export tells that they were made.

    Args:
        listed: What it says of them.
    """

    def __init__(self, listed: Facts) -> None:
        self._names_examples: bool = listed["names_examples"]
        numbers = enumerate(zip(listed["steps"], listed["sequences"], strict=True))
        self.records = [
            Record(step, number, None, {}, self, row) for row, (step, number) in numbers
        ]

    def streams(self, row: int) -> dict[StreamKey, StreamShape]:
        """Return nothing: their arrays were not exported."""
        return {}

    def has(self, row: int, key: StreamKey) -> bool:
        """Tell whether a record named its own examples, which says how ranks are joined."""
        return key == ID and self._names_examples

    def read(self, row: int, key: StreamKey) -> Array:
        """Return no examples, as they were not exported."""
        return np.zeros(0, np.int64)

    def stream_keys(self) -> list[StreamKey]:
        """Return nothing: their arrays were not exported."""
        return []

    def num_bytes(self, rows: Sequence[int]) -> int:
        """Return 0: their arrays were not exported."""
        return 0


def _check_writer(entry: Facts, num_tables: int) -> None:
    """Check what the metadata says of one writer.

    Raises:
        DamageError: If it is no writer.
    """
    check(entry, _WRITER | {"tables": mapping_of(whole(0, num_tables - 1))})
    check_event(entry["about"])
    for event in entry["events"]:
        check(event, EVENT)
        check_event(event)
    for item in entry["damage"]:
        check(item, DAMAGE)
    for listed in entry["superseded"]:
        check(listed, _SUPERSEDED)
        if not 0 < len(listed["steps"]) == len(listed["sequences"]):
            raise DamageError("superseded records do not have a step each")


def _table(file: SegmentFile, entry: Facts) -> Table:
    arrays = {array["field"]: partial(_read_table, file, array) for array in entry["arrays"]}
    dims = {array["field"]: tuple(array["dims"]) for array in entry["arrays"]}
    return Table(entry["attributes"], arrays, dims)


def _read_table(file: SegmentFile, array: Mapping[str, Any]) -> Array:
    if "reason" in array:
        raise DamageError(f"{array['reason']} (when the run was exported)")
    return read_place(file, Place.of(array), f"table '{array['field']}'")


def _whole(file: SegmentFile, error: DamageError) -> Damage:
    return Damage(file.name, 0, file.num_bytes, str(error).removeprefix(f"{file.name}: "))
