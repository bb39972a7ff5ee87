"""Parts: the records of one measure × source in one file, from which single arrays are read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError, FormatError
from sonde.log.format.frames import Frame, describe
from sonde.log.format.payload import from_storage, slot_checksum, storage_dtype
from sonde.log.format.positioned import open_regular, read_at

from .segment_records import SegmentRecords

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

    def with_size(self, dim: str, size: int) -> StreamShape:
        """Return the same with another size along an axis."""
        sizes = zip(self.dims, self.shape, strict=True)
        return replace(self, shape=tuple(size if name == dim else n for name, n in sizes))


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

    def dims(self, row: int, key: StreamKey) -> tuple[str, ...]:
        """Return the names of the axes of one stream of one record."""
        return self.streams(row)[key].dims

    @abstractmethod
    def read(self, row: int, key: StreamKey) -> npt.NDArray[Any]:
        """Return one stream of one record."""

    @abstractmethod
    def stream_keys(self) -> list[StreamKey]:
        """Return every stream that any record of this part has."""

    @abstractmethod
    def num_bytes(self, rows: Sequence[int]) -> int:
        """Return the size of all arrays of some records in bytes."""

    def read_many(self, rows: list[int], key: StreamKey) -> Iterator[npt.NDArray[Any]]:
        """Yield one stream of several records, in order."""
        for row in rows:
            yield self.read(row, key)


@dataclass(frozen=True)
class JournalFile:
    """A journal; its header holds a random token, so another one at the same path is told apart."""

    path: Path
    header: bytes


class JournalPart(Part):
    """The records of one measure × source in a journal.

    Args:
        file: The journal.
    """

    def __init__(self, file: JournalFile) -> None:
        self._file = file
        self._frames: list[Frame] = []
        self.records = []

    def add(self, frame: Frame) -> None:
        """Take in the frame of one more record."""
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
        """Return the streams of one record, in the order they were recorded."""
        return {
            (entry.layer, entry.field): StreamShape(entry.dtype, entry.dims, entry.shape)
            for entry in self._frames[row].arrays
        }

    def has(self, row: int, key: StreamKey) -> bool:
        """Tell whether a record has a stream."""
        return key in self._frames[row].layout.columns

    def dims(self, row: int, key: StreamKey) -> tuple[str, ...]:
        """Return the names of the axes of one stream of one record."""
        layout = self._frames[row].layout
        return layout.entries[layout.columns[key]].dims

    def read(self, row: int, key: StreamKey) -> npt.NDArray[Any]:
        """Return one stream of one record."""
        frame = self._frames[row]
        return read_array(self._file, frame, frame.layout.columns[key])

    def stream_keys(self) -> list[StreamKey]:
        """Return every stream that any record of this part has."""
        layouts = {id(frame.layout): frame.layout for frame in self._frames}
        return list({key: None for layout in layouts.values() for key in layout.columns})

    def num_bytes(self, rows: Sequence[int]) -> int:
        """Return the size of all arrays of some records in bytes."""
        return sum(self._frames[row].layout.array_bytes for row in rows)


class SegmentPart(Part):
    """The records of one measure × source in a segment.

    Args:
        records: The records, as the segment has them.
    """

    def __init__(self, records: SegmentRecords) -> None:
        self.measure = records.measure
        self.source = records.source
        self._records = records
        columns = (records.steps, records.sequences, records.times, records.attributes)
        self.records = [
            Record(step, sequence, time, attributes, self, row)
            for row, (step, sequence, time, attributes) in enumerate(zip(*columns, strict=True))
        ]

    def streams(self, row: int) -> dict[StreamKey, StreamShape]:
        """Return the streams of one record, in the order they were recorded."""
        return {
            key: StreamShape(stream.dtype, self.dims(row, key), self._records.shape(stream, row))
            for key, stream in self._records.streams.items()
            if self._records.has(row, stream)
        }

    def has(self, row: int, key: StreamKey) -> bool:
        """Tell whether a record has a stream."""
        stream = self._records.streams.get(key)
        return stream is not None and self._records.has(row, stream)

    def dims(self, row: int, key: StreamKey) -> tuple[str, ...]:
        """Return the names of the axes of one stream of one record."""
        stream = self._records.streams[key]
        num_axes = len(self._records.shape(stream, row))
        # A segment has one set of names for a stream, which suits most of its records.
        fits = num_axes == len(stream.dims)
        return stream.dims if fits else tuple(f"axis_{axis}" for axis in range(num_axes))

    def read(self, row: int, key: StreamKey) -> npt.NDArray[Any]:
        """Return one stream of one record."""
        return self._records.read(self._records.streams[key], [row])[0]

    def stream_keys(self) -> list[StreamKey]:
        """Return every stream that any record of this part has."""
        return list(self._records.streams)

    def read_many(self, rows: list[int], key: StreamKey) -> Iterator[npt.NDArray[Any]]:
        """Yield one stream of several records, in order; neighbouring ones in one read."""
        yield from self._records.read(self._records.streams[key], rows)

    def num_bytes(self, rows: Sequence[int]) -> int:
        """Return the size of all arrays of some records in bytes."""
        return self._records.num_bytes(rows)


def read_array(file: JournalFile, frame: Frame, column: int) -> npt.NDArray[Any]:
    """Read an array of a journal's frame.

    Raises:
        DamageError: If it does not match its checksum.
        FormatError: If the file became shorter.
        FileNotFoundError: If the journal is gone, or another one has taken its place.
        OSError: If it cannot be read.
    """
    entry = frame.layout.entries[column]
    fd = open_regular(file.path)
    try:
        if read_at(fd, len(file.header), 0) != file.header:
            raise FileNotFoundError(f"{file.path} was replaced since it was listed")
        raw = read_at(fd, entry.num_bytes, frame.payload_offset + entry.offset)
    finally:
        os.close(fd)
    if len(raw) < entry.num_bytes:
        raise FormatError(f"{file.path} became shorter while it was read")
    if slot_checksum(raw) != frame.checksums[column]:
        raise DamageError(
            f"{file.path.parent.name}/{file.path.name}: '{entry.field}' of {describe(frame)} does "
            "not match its checksum"
        )
    values = np.frombuffer(raw, storage_dtype(entry.dtype)).reshape(entry.shape)
    return from_storage(values, entry.dtype)
