"""Segments, as they are read: immutable HDF5 files whose bytes are checked first.

A segment is an ordinary HDF5 file for everyone else. sonde itself reads it without libhdf5, which
can hang on a damaged file: behind the HDF5 data stands a trailer that says where the metadata lies,
the metadata says where each array lies (datasets are contiguous), and every record of every array
has a checksum. So opening a segment reads its metadata only, and a flipped byte costs the record it
is in. One more checksum covers all that belongs to no record, so that every byte is covered once.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sonde.exceptions import DamageError, FormatError

from .frames import FORMAT_VERSION
from .payload import from_storage, slot_checksum, storage_dtype
from .positioned import READ_ONLY, read_at

# magic, version, reserved; metadata: offset, bytes, crc; what precedes the trailer: bytes, crc of
# what of it belongs to no record; and the trailer's own crc
_TRAILER = struct.Struct("<8sIIQQIQII")
_TRAILER_MAGIC = b"SONDESEG"
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class SegmentFile:
    """One state of a segment's file, so that another one at the same path is told apart."""

    path: Path
    inode: int
    num_bytes: int
    changed_ns: int

    @property
    def name(self) -> str:
        """How reports name it: relative to the run directory."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class Place:
    """Where an array that is read as a whole lies, and its checksum."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Place:
        """Return what an entry of the metadata says."""
        return cls(entry["offset"], entry["dtype"], tuple(entry["shape"]), entry["crc32"])


@dataclass(frozen=True)
class Stream:
    """A field of a layer (or a field alone) over the records of one segment.

    Attributes:
        layer: The layer, or None.
        field: The field.
        dtype: The element type.
        dims: One name per axis of a record.
        shape: The shape in every record, or None where it differs.
        column: Its column in the tables of its group.
    """

    layer: str | None
    field: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...] | None
    column: int

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"'{self.field}'" + ("" if self.layer is None else f" of layer '{self.layer}'")


def encode_streams(streams: Sequence[Stream]) -> bytes:
    """Encode the streams of a group, in the order of their columns; the same for same streams."""
    items = [[s.layer, s.field, s.dtype, s.dims, s.shape] for s in streams]
    return json.dumps(items, separators=(",", ":")).encode()


@lru_cache(maxsize=64)
def _decode_streams(encoded: bytes) -> dict[tuple[str | None, str], Stream]:
    """Return streams by layer and field; segments of a run mostly have the same ones."""
    return {
        (layer, field): Stream(
            layer, field, dtype, tuple(dims), None if shape is None else tuple(shape), column
        )
        for column, (layer, field, dtype, dims, shape) in enumerate(json.loads(encoded))
    }


def identify(path: Path) -> SegmentFile:
    """Return the present state of a segment's file.

    Raises:
        OSError: If it is gone.
    """
    status = path.stat()
    return SegmentFile(path, status.st_ino, status.st_size, status.st_mtime_ns)


def encode_trailer(metadata_offset: int, metadata: bytes, num_bytes: int, checksum: int) -> bytes:
    """Encode what closes a segment off.

    Args:
        metadata_offset: Where the metadata lies.
        metadata: The metadata.
        num_bytes: The size of the file before the trailer.
        checksum: The checksum of all of it that belongs to no record.
    """
    head = _TRAILER.pack(
        _TRAILER_MAGIC,
        FORMAT_VERSION,
        0,
        metadata_offset,
        len(metadata),
        crc32(metadata),
        num_bytes,
        checksum,
        0,
    )[:-4]
    return head + struct.pack("<I", crc32(head))


def checksum_between(fd: int, num_bytes: int, stretches: Sequence[tuple[int, int]]) -> int:
    """Return the checksum of a file's first bytes, leaving stretches (offset, size) out."""
    checksum, position = 0, 0
    for start, size in (*sorted(stretch for stretch in stretches if stretch[1]), (num_bytes, 0)):
        while position < start:
            chunk = read_at(fd, min(_CHUNK_BYTES, start - position), position)
            if not chunk:
                return -1
            checksum = crc32(chunk, checksum)
            position += len(chunk)
        position = start + size
    return checksum


class Segment:
    """A segment whose metadata was checked. It holds no file open.

    Args:
        file: The file.

    Raises:
        DamageError: If its trailer or metadata is damaged.
        FormatError: If it is of a newer format.
        OSError: If it cannot be read.
    """

    def __init__(self, file: SegmentFile) -> None:
        self.file = file
        offset, num_bytes, checksum, self._num_bytes, self._checksum = _read_trailer(file)
        encoded = _read_bytes(file, offset, num_bytes)
        if crc32(encoded) != checksum:
            raise DamageError(f"{file.name}: the metadata does not match its checksum")
        metadata = json.loads(encoded)
        self.frames: list[dict[str, Any]] = metadata["frames"]
        self.tables: list[dict[str, Any]] = metadata["tables"]
        self.damage: list[dict[str, Any]] = metadata["damage"]
        self.groups = tuple(SegmentRecords(file, entry) for entry in metadata["groups"])

    def table(self, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
        """Return an array that does not depend on the step.

        Raises:
            DamageError: If it does not match its checksum.
        """
        return read_place(self.file, Place.of(entry), f"table '{entry['field']}'")

    def verify(self) -> Iterator[str]:
        """Check every byte; yield what is damaged, record by record.

        Raises:
            OSError: If the file cannot be read.
        """
        stretches = [stretch for group in self.groups for stretch in group.stretches()]
        with _open(self.file) as fd:
            if checksum_between(fd, self._num_bytes, stretches) != self._checksum:
                yield "bytes that belong to no record do not match their checksum"
        for table in self.tables:
            for entry in table["arrays"]:
                try:
                    self.table(entry)
                except DamageError as error:
                    yield str(error)
        for group in self.groups:
            yield from group.verify()


class SegmentRecords:
    """The records of one measure × source of a segment.

    Args:
        file: The segment.
        entry: What its metadata says of them.

    Raises:
        DamageError: If a table that describes them is damaged.
        OSError: If the segment cannot be read.
    """

    def __init__(self, file: SegmentFile, entry: Mapping[str, Any]) -> None:
        self.file = file
        self.measure: str = entry["measure"]
        self.source: str = entry["source"]
        self.steps: list[int] = entry["steps"]
        self.sequences: list[int] = entry["sequences"]
        self.times: list[float | None] = entry["times"]
        self.attributes: list[dict[str, Any]] = entry["attributes"]
        self.streams = _decode_streams(self._table(entry, "streams").tobytes())
        self._offsets: npt.NDArray[np.int64] = self._table(entry, "offsets")
        self._shape_tables: dict[int, npt.NDArray[np.int64]] = {
            int(column): read_place(file, Place.of(place), "a table of shapes")
            for column, place in entry["shapes"].items()
        }
        self._present = [frozenset(columns) for columns in entry["present"]["streams"]]
        self._present_of: list[int] = entry["present"]["records"]
        self._checksums_at: int = entry["crc32"]["offset"]

    def has(self, row: int, stream: Stream) -> bool:
        """Tell whether a record has a stream."""
        return stream.column in self._present[self._present_of[row]]

    def shapes(self, stream: Stream) -> list[tuple[int, ...]]:
        """Return the shape of a stream in each record."""
        return [self.shape(stream, row) for row in range(len(self.steps))]

    def shape(self, stream: Stream, row: int) -> tuple[int, ...]:
        """Return the shape of a stream in one record; where it is absent, of no element."""
        if stream.shape is not None:
            return stream.shape
        if not self.has(row, stream):
            return (0,)
        return tuple(n for n in self._shape_tables[stream.column][row].tolist() if n >= 0)

    def num_bytes(self, rows: Sequence[int]) -> int:
        """Return the size of all arrays of some records in bytes."""
        counts = Counter(self._present_of[row] for row in rows)
        return sum(
            int(np.diff(self._starts(stream))[rows].sum())
            if stream.shape is None
            else sum(counts[i] for i, has in enumerate(self._present) if stream.column in has)
            * self._row_bytes(stream)
            for stream in self.streams.values()
        )

    def stretches(self) -> list[tuple[int, int]]:
        """Return where the streams lie in the file, as (offset, size)."""
        return [
            (int(self._offsets[stream.column]), int(self._starts(stream)[-1]))
            for stream in self.streams.values()
        ]

    def read(self, stream: Stream, rows: Sequence[int]) -> list[npt.NDArray[Any]]:
        """Return one stream of several records, in order; neighbouring ones in one read.

        Raises:
            DamageError: If one does not match its checksum; the message names it.
        """
        storage = storage_dtype(stream.dtype)
        shapes = None if stream.shape is not None else self.shapes(stream)
        arrays = []
        for row, raw in self._raw(stream, rows):
            if raw is None:
                raise DamageError(self._damaged(stream, row))
            shape = stream.shape if shapes is None else shapes[row]
            assert shape is not None
            values = np.frombuffer(raw, storage).reshape(shape)
            arrays.append(from_storage(values, stream.dtype))
        return arrays

    def checksums(self, stream: Stream, data: memoryview) -> list[int]:
        """Return the checksum of a stream in each record, of the bytes as they stand.

        Args:
            stream: The stream.
            data: The whole file.
        """
        starts = (self._starts(stream) + int(self._offsets[stream.column])).tolist()
        return [slot_checksum(data[start:end]) for start, end in pairwise(starts)]

    def verify(self) -> Iterator[str]:
        """Check every record; yield those that are damaged.

        Raises:
            OSError: If the file cannot be read.
        """
        for stream in self.streams.values():
            for row, raw in self._raw(stream, range(len(self.steps))):
                if raw is None:
                    yield self._damaged(stream, row)

    def _raw(self, stream: Stream, rows: Sequence[int]) -> Iterator[tuple[int, memoryview | None]]:
        """Yield (row, its bytes), None for bytes that do not match their checksum."""
        starts = self._starts(stream)
        offset = int(self._offsets[stream.column])
        num_rows = len(self.steps)
        with _open(self.file) as fd:
            # Of a checksum that is damaged itself no bytes will hold.
            table = read_at(fd, 4 * num_rows, self._checksums_at + 4 * num_rows * stream.column)
            expected = np.frombuffer(table, "<u4").tolist()
            for first, last in _spans(rows, starts):
                begin, end = int(starts[first]), int(starts[last + 1])
                block = memoryview(read_at(fd, end - begin, offset + begin))
                bounds = (starts[first : last + 2] - begin).tolist()
                for row, (start, stop) in enumerate(pairwise(bounds), first):
                    raw = block[start:stop]
                    yield row, raw if slot_checksum(raw) == expected[row] else None

    def _starts(self, stream: Stream) -> npt.NDArray[np.int64]:
        """Return where each record begins within a stream, and where the last one ends."""
        if stream.shape is not None:
            return np.arange(len(self.steps) + 1, dtype=np.int64) * self._row_bytes(stream)
        itemsize = storage_dtype(stream.dtype).itemsize
        sizes = [itemsize * int(np.prod(shape, dtype=np.int64)) for shape in self.shapes(stream)]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])

    @staticmethod
    def _row_bytes(stream: Stream) -> int:
        assert stream.shape is not None
        return storage_dtype(stream.dtype).itemsize * int(np.prod(stream.shape, dtype=np.int64))

    def _table(self, entry: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
        return read_place(self.file, Place.of(entry[name]), f"the table '{name}'")

    def _damaged(self, stream: Stream, row: int) -> str:
        return (
            f"{self.file.name}: {stream.label} of record {self.sequences[row]} "
            f"({self.measure}, step {self.steps[row]}) does not match its checksum"
        )


def read_place(file: SegmentFile, place: Place, what: str) -> npt.NDArray[Any]:
    """Read an array as a whole.

    Raises:
        DamageError: If it does not match its checksum.
        OSError: If the segment cannot be read.
    """
    storage = storage_dtype(place.dtype)
    num_bytes = storage.itemsize * int(np.prod(place.shape, dtype=np.int64))
    raw = _read_bytes(file, place.offset, num_bytes)
    if crc32(raw) != place.crc32:
        raise DamageError(f"{file.name}: {what} does not match its checksum")
    return from_storage(np.frombuffer(raw, storage).reshape(place.shape), place.dtype)


def _read_trailer(file: SegmentFile) -> tuple[int, int, int, int, int]:
    """Return (metadata offset, its bytes, its crc, bytes before the trailer, their crc).

    Raises:
        DamageError: If it is damaged.
        FormatError: If it is of a newer format.
    """
    if file.num_bytes < _TRAILER.size:
        raise DamageError(f"{file.name}: the segment is cut short")
    trailer = _read_bytes(file, file.num_bytes - _TRAILER.size, _TRAILER.size)
    magic, version, _, offset, num_bytes, checksum, before, before_checksum, own = _TRAILER.unpack(
        trailer
    )
    if magic != _TRAILER_MAGIC or crc32(trailer[:-4]) != own:
        raise DamageError(
            f"{file.name}: the segment has no valid trailer: it is cut short or damaged"
        )
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{file.path} has log format {version}; this sonde reads up to {FORMAT_VERSION}. "
            "Install a newer sonde."
        )
    if before + _TRAILER.size != file.num_bytes:
        raise DamageError(f"{file.name}: the segment does not have the size its trailer states")
    return offset, num_bytes, checksum, before, before_checksum


@contextmanager
def _open(file: SegmentFile) -> Iterator[int]:
    """Open a segment that is still the one that was listed.

    Raises:
        FileNotFoundError: If it is gone, or another one has taken its place.
        OSError: If it cannot be opened.
    """
    fd = os.open(file.path, READ_ONLY)
    try:
        status = os.fstat(fd)
        if (status.st_ino, status.st_size, status.st_mtime_ns) != (
            file.inode,
            file.num_bytes,
            file.changed_ns,
        ):
            raise FileNotFoundError(f"{file.path} was replaced since it was listed")
        yield fd
    finally:
        os.close(fd)


def _read_bytes(file: SegmentFile, offset: int, num_bytes: int) -> bytes:
    with _open(file) as fd:
        return read_at(fd, num_bytes, offset)


def _spans(rows: Sequence[int], starts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Join neighbouring rows into (first, last) of a readable size."""
    first = last = -1
    for row in rows:
        if last >= 0 and row == last + 1 and starts[row + 1] - starts[first] <= _CHUNK_BYTES:
            last = row
            continue
        if last >= 0:
            yield first, last
        first = last = row
    if last >= 0:
        yield first, last
