"""The reading side of a log: every valid record of a run, from segments and journals alike.

`read_index` lists what is there without loading arrays; a `Part` is one measure × source of one
file and reads single arrays from it. Sealed segments are taken first, then journals; a record that
stands in both (its journal was sealed but not deleted yet) counts once.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError, FormatError

from .frames import (
    FILE_HEADER_BYTES,
    ArrayEntry,
    Damage,
    Frame,
    from_storage,
    scan_journal,
    storage_dtype,
)
from .layout import is_being_written, journals, segments, writer_folders
from .segment import Segment, SegmentFile, SegmentRecords, Stream, identify

StreamKey = tuple[str | None, str]
"""A stream is named by its layer, or None, and its field."""


@dataclass(frozen=True)
class StreamShape:
    """What one array of one record is."""

    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the array in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * storage_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Record:
    """One record: where it is and what it says of itself."""

    step: int
    sequence: int
    time: float | None
    attributes: dict[str, Any]
    part: Part
    row: int


class Part(ABC):
    """The records of one measure × source in one file."""

    records: list[Record]

    @abstractmethod
    def streams(self, row: int) -> dict[StreamKey, StreamShape]:
        """Return the streams of one record, in the order they were recorded."""

    @abstractmethod
    def has(self, row: int, key: StreamKey) -> bool:
        """Tell whether a record has a stream."""

    @abstractmethod
    def read(self, row: int, key: StreamKey) -> npt.NDArray[Any]:
        """Return one stream of one record."""

    @abstractmethod
    def stream_keys(self) -> list[StreamKey]:
        """Return every stream that any record of this part has."""

    def read_many(self, rows: list[int], key: StreamKey) -> Iterator[npt.NDArray[Any]]:
        """Yield one stream of several records, in order."""
        for row in rows:
            yield self.read(row, key)


@dataclass(frozen=True)
class JournalFile:
    """A journal; its header holds a random token, so another one at the same path is told apart."""

    path: Path
    header: bytes


class _JournalPart(Part):
    def __init__(self, file: JournalFile) -> None:
        self._file = file
        self._frames: list[Frame] = []
        self.records = []

    def add(self, frame: Frame) -> None:
        body = frame.body
        record = Record(
            frame.step,
            frame.sequence,
            body.get("time"),
            body.get("attributes", {}),
            self,
            len(self._frames),
        )
        self._frames.append(frame)
        self.records.append(record)

    def streams(self, row: int) -> dict[StreamKey, StreamShape]:
        return {
            (entry.layer, entry.field): StreamShape(entry.dtype, entry.dims, entry.shape)
            for entry in self._frames[row].arrays
        }

    def has(self, row: int, key: StreamKey) -> bool:
        return any((entry.layer, entry.field) == key for entry in self._frames[row].arrays)

    def read(self, row: int, key: StreamKey) -> npt.NDArray[Any]:
        frame = self._frames[row]
        entry = next(e for e in frame.arrays if (e.layer, e.field) == key)
        return _read_entry(self._file, frame, entry)

    def stream_keys(self) -> list[StreamKey]:
        keys = {(e.layer, e.field): None for frame in self._frames for e in frame.arrays}
        return list(keys)


class _SegmentPart(Part):
    def __init__(self, records: SegmentRecords) -> None:
        self._records = records
        self._streams: dict[StreamKey, Stream] = {
            (stream.layer, stream.field): stream for stream in records.group.streams
        }
        self.records = [
            Record(
                entry["step"], entry["sequence"], entry.get("time"), entry["attributes"], self, row
            )
            for row, entry in enumerate(records.group.records)
        ]

    def streams(self, row: int) -> dict[StreamKey, StreamShape]:
        return {
            key: StreamShape(stream.dtype, stream.dims, self._records.shapes(stream)[row])
            for key, stream in self._streams.items()
            if self._records.presence[row, stream.column]
        }

    def has(self, row: int, key: StreamKey) -> bool:
        stream = self._streams.get(key)
        return stream is not None and bool(self._records.presence[row, stream.column])

    def read(self, row: int, key: StreamKey) -> npt.NDArray[Any]:
        return self._records.read(self._streams[key], [row])[0]

    def stream_keys(self) -> list[StreamKey]:
        return list(self._streams)

    def read_many(self, rows: list[int], key: StreamKey) -> Iterator[npt.NDArray[Any]]:
        yield from self._records.read(self._streams[key], rows)


@dataclass(frozen=True)
class Table:
    """Arrays of a source that do not depend on the step."""

    attributes: dict[str, Any]
    arrays: dict[str, Callable[[], npt.NDArray[Any]]]


@dataclass
class WriterLog:
    """What one rank wrote in one attempt.

    Attributes:
        attempt: The attempt, counted from 0.
        rank: The rank.
        is_live: True while its process still writes.
        about: What the writer said of itself.
        parts: The records, by measure and source.
        tables: The tables, by source.
        events: Notes, gaps and the end, in order.
        damage: What could not be read.
    """

    attempt: int
    rank: int
    is_live: bool
    about: dict[str, Any] = field(default_factory=dict)
    parts: dict[tuple[str, str], list[Part]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)

    @property
    def resume_step(self) -> int:
        """The step this attempt went on from; 0 for a training that started afresh.

        Where the attempt's own statement is missing, because it was killed before it could write
        one or because it is damaged, this is the first step it recorded.
        """
        if self.about:
            return int(self.about.get("resume_step") or 0)
        parts = [part for parts in self.parts.values() for part in parts]
        return min((r.step for part in parts for r in part.records), default=sys.maxsize)


def read_index(run: Path) -> list[WriterLog]:
    """List everything a run directory holds, one entry per attempt and rank.

    Raises:
        FormatError: If a file is of a newer format.
        OSError: If the directory cannot be read.
    """
    return [_read_writer(attempt, rank, folder) for attempt, rank, folder in writer_folders(run)]


def _read_writer(attempt: int, rank: int, folder: Path) -> WriterLog:
    while True:
        log = WriterLog(attempt, rank, is_live=is_being_written(folder))
        seen: set[int] = set()
        # Journals are listed first: what is sealed meanwhile stands in both lists, not in none.
        open_ends = journals(folder)
        sealed = segments(folder)
        try:
            for _, _, path in sealed:
                _add_segment(log, path, seen)
            for entry in open_ends:
                is_live = log.is_live and entry == open_ends[-1]
                _add_journal(log, entry[1], seen, is_live=is_live)
        except FileNotFoundError:
            # A journal was sealed before it was opened. Unless nothing changed, list again.
            if (open_ends, sealed) == (journals(folder), segments(folder)):
                raise
            continue
        log.damage = list(dict.fromkeys(log.damage))
        return log


def _add_segment(log: WriterLog, path: Path, seen: set[int]) -> None:
    file = identify(path)
    try:
        segment = _open_segment(file)
    except DamageError as error:
        reason = str(error).removeprefix(f"{file.name}: ")
        log.damage.append(Damage(file.name, 0, file.num_bytes, reason))
        return
    for item in segment.frames:
        seen.add(item["sequence"])
        _add_event(log, item)
    log.damage += [Damage(**item) for item in segment.damage]
    for table in segment.tables:
        arrays = {entry["field"]: _segment_table(segment, entry) for entry in table["arrays"]}
        log.tables[table["name"]] = Table(table["attributes"], arrays)
    for records in segment.groups:
        part = _SegmentPart(records)
        seen.update(record.sequence for record in part.records)
        log.parts.setdefault((records.group.measure, records.group.source), []).append(part)


def _add_journal(log: WriterLog, path: Path, seen: set[int], *, is_live: bool) -> None:
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    parts: dict[tuple[str, str], _JournalPart] = {}
    try:
        file = JournalFile(path, os.pread(fd, FILE_HEADER_BYTES, 0))
        for item in scan_journal(fd, f"{path.parent.name}/{path.name}"):
            if isinstance(item, Damage):
                # The tail of a live journal is a record on its way.
                if not (item.is_tail and is_live):
                    log.damage.append(item)
                continue
            if item.sequence in seen:
                continue
            seen.add(item.sequence)
            if item.kind == "record":
                key = (item.body["measure"], item.body["source"])
                parts.setdefault(key, _JournalPart(file)).add(item)
            elif item.kind == "table":
                arrays = {e.field: _journal_table(file, item, e) for e in item.arrays}
                log.tables[item.body["name"]] = Table(item.body["attributes"], arrays)
            else:
                _add_event(
                    log,
                    {"kind": item.kind, "step": item.step, "sequence": item.sequence, **item.body},
                )
    finally:
        os.close(fd)
    for key, part in parts.items():
        log.parts.setdefault(key, []).append(part)


def _add_event(log: WriterLog, item: dict[str, Any]) -> None:
    if item["kind"] == "attempt":
        log.about = item
    else:
        log.events.append(item)


def _journal_table(
    file: JournalFile, frame: Frame, entry: ArrayEntry
) -> Callable[[], npt.NDArray[Any]]:
    return lambda: _read_entry(file, frame, entry)


def _segment_table(segment: Segment, entry: Mapping[str, Any]) -> Callable[[], npt.NDArray[Any]]:
    return lambda: segment.table(entry)


def _read_entry(file: JournalFile, frame: Frame, entry: ArrayEntry) -> npt.NDArray[Any]:
    fd = os.open(file.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        if os.pread(fd, FILE_HEADER_BYTES, 0) != file.header:
            raise FileNotFoundError(f"{file.path} was replaced since it was listed")
        chunks = []
        start = frame.payload_offset + entry.offset
        remaining = entry.num_bytes
        while remaining:
            chunk = os.pread(fd, remaining, start)
            if not chunk:
                raise FormatError(f"{file.path} became shorter while it was read")
            chunks.append(chunk)
            start += len(chunk)
            remaining -= len(chunk)
    finally:
        os.close(fd)
    values = np.frombuffer(b"".join(chunks), storage_dtype(entry.dtype)).reshape(entry.shape)
    return from_storage(values, entry.dtype)


@lru_cache(maxsize=1024)
def _open_segment(file: SegmentFile) -> Segment:
    return Segment(file)
