"""Segments, as they are read: immutable HDF5 files whose bytes are checked first.

A segment is an ordinary HDF5 file for everyone else. sonde itself reads it without libhdf5, which
can hang on a damaged file: behind the HDF5 data stands a trailer that says where the metadata lies,
the metadata says where each array lies (datasets are contiguous), and every record of every array
has a checksum. So opening a segment reads its metadata only, and a flipped byte costs the record it
is in.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError, FormatError

from .frames import FORMAT_VERSION, from_storage, storage_dtype

# magic, version, reserved; metadata: offset, bytes, crc; what precedes the trailer: bytes, crc; and
# the trailer's own crc
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
        offset: Where its data starts in the file, in bytes.
        shapes: Where it differs, the table of shapes, [records, axes], padded with -1.
        column: Its column in the tables of presence and checksums.
    """

    layer: str | None
    field: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...] | None
    offset: int
    shapes: Place | None
    column: int


@dataclass(frozen=True)
class SegmentGroup:
    """One measure × source of a segment: its streams, and one entry per record."""

    measure: str
    source: str
    streams: tuple[Stream, ...]
    records: tuple[dict[str, Any], ...]
    presence: Place
    checksums: Place


def identify(path: Path) -> SegmentFile:
    """Return the present state of a segment's file.

    Raises:
        OSError: If it is gone.
    """
    status = path.stat()
    return SegmentFile(path, status.st_ino, status.st_size, status.st_mtime_ns)


def append_trailer(path: Path, metadata_offset: int, metadata: bytes) -> None:
    """Close a segment off with the checksum of everything before, and force it to the disk."""
    with path.open("r+b") as file:
        checksum = 0
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
        head = _TRAILER.pack(
            _TRAILER_MAGIC,
            FORMAT_VERSION,
            0,
            metadata_offset,
            len(metadata),
            zlib.crc32(metadata),
            file.tell(),
            checksum,
            0,
        )[:-4]
        file.write(head + struct.pack("<I", zlib.crc32(head)))
        file.flush()
        os.fsync(file.fileno())


def check_segment(path: Path) -> str | None:
    """Check the checksum of a whole segment, byte for byte.

    Returns:
        None if it holds, otherwise what is wrong.

    Raises:
        FormatError: If the segment is of a newer format.
        OSError: If it cannot be read.
    """
    file = identify(path)
    try:
        *_, num_bytes, checksum = _read_trailer(file)
    except DamageError as error:
        return str(error).removeprefix(f"{file.name}: ")
    actual = 0
    with path.open("rb") as stream:
        while num_bytes and (chunk := stream.read(min(_CHUNK_BYTES, num_bytes))):
            actual = zlib.crc32(chunk, actual)
            num_bytes -= len(chunk)
    return None if actual == checksum else "the segment does not match its checksum"


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
        offset, num_bytes, checksum, _, _ = _read_trailer(file)
        encoded = _read_bytes(file, offset, num_bytes)
        if zlib.crc32(encoded) != checksum:
            raise DamageError(f"{file.name}: the metadata does not match its checksum")
        metadata = json.loads(encoded)
        self.frames: list[dict[str, Any]] = metadata["frames"]
        self.tables: list[dict[str, Any]] = metadata["tables"]
        self.damage: list[dict[str, Any]] = metadata["damage"]
        self.groups = tuple(SegmentRecords(file, _group_from(e)) for e in metadata["groups"])

    def table(self, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
        """Return an array that does not depend on the step.

        Raises:
            DamageError: If it does not match its checksum.
        """
        return read_place(self.file, Place.of(entry), f"table '{entry['field']}'")


class SegmentRecords:
    """The records of one measure × source of a segment.

    Args:
        file: The segment.
        group: What its metadata says of them.
    """

    def __init__(self, file: SegmentFile, group: SegmentGroup) -> None:
        self.file = file
        self.group = group

    @cached_property
    def presence(self) -> npt.NDArray[np.bool_]:
        """Which record has which stream, [records, streams]."""
        table = read_place(self.file, self.group.presence, "the table of presence")
        return table.astype(bool)

    def shapes(self, stream: Stream) -> list[tuple[int, ...]]:
        """Return the shape of a stream in each record; where it is absent, of no element."""
        if stream.shapes is None:
            assert stream.shape is not None
            return [stream.shape] * len(self.group.records)
        table = read_place(self.file, stream.shapes, f"the shapes of '{stream.field}'")
        present = self.presence[:, stream.column]
        return [
            tuple(int(size) for size in row if size >= 0) if there else (0,)
            for row, there in zip(table, present, strict=True)
        ]

    def read(self, stream: Stream, rows: list[int]) -> list[npt.NDArray[Any]]:
        """Return one stream of several records, in order; neighbouring ones in one read.

        Raises:
            DamageError: If one does not match its checksum; the message names it.
        """
        storage = storage_dtype(stream.dtype)
        shapes = self.shapes(stream)
        sizes = np.array([storage.itemsize * int(np.prod(s, dtype=np.int64)) for s in shapes])
        starts = np.concatenate([[0], np.cumsum(sizes)])
        arrays = []
        for first, last in _spans(rows):
            start, end = int(starts[first]), int(starts[last + 1])
            block = _read_bytes(self.file, stream.offset + start, end - start)
            for row in range(first, last + 1):
                begin = int(starts[row]) - start
                raw = block[begin : begin + int(sizes[row])]
                if zlib.crc32(raw) != self._checksums[row, stream.column]:
                    raise DamageError(self._damaged(stream, row))
                values = np.frombuffer(raw, storage).reshape(shapes[row])
                arrays.append(from_storage(values, stream.dtype))
        return arrays

    @cached_property
    def _checksums(self) -> npt.NDArray[np.uint32]:
        return read_place(self.file, self.group.checksums, "the table of checksums")

    def _damaged(self, stream: Stream, row: int) -> str:
        record = self.group.records[row]
        layer = f" of layer '{stream.layer}'" if stream.layer is not None else ""
        return (
            f"{self.file.name}: '{stream.field}'{layer} of record {record['sequence']} "
            f"({self.group.measure}, step {record['step']}) does not match its checksum"
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
    if zlib.crc32(raw) != place.crc32:
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
    if magic != _TRAILER_MAGIC or zlib.crc32(trailer[:-4]) != own:
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


def _read_bytes(file: SegmentFile, offset: int, num_bytes: int) -> bytes:
    with file.path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        if (status.st_ino, status.st_size, status.st_mtime_ns) != (
            file.inode,
            file.num_bytes,
            file.changed_ns,
        ):
            raise FileNotFoundError(f"{file.path} was replaced since it was listed")
        stream.seek(offset)
        return stream.read(num_bytes)


def _spans(rows: list[int]) -> list[tuple[int, int]]:
    """Join neighbouring rows into (first, last)."""
    spans: list[tuple[int, int]] = []
    for row in rows:
        if spans and row == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], row)
        else:
            spans.append((row, row))
    return spans


def _group_from(entry: Mapping[str, Any]) -> SegmentGroup:
    streams = tuple(
        Stream(
            stream["layer"],
            stream["field"],
            stream["dtype"],
            tuple(stream["dims"]),
            None if stream["shape"] is None else tuple(stream["shape"]),
            stream["offset"],
            None if stream["shapes"] is None else Place.of(stream["shapes"]),
            column,
        )
        for column, stream in enumerate(entry["streams"])
    )
    return SegmentGroup(
        entry["measure"],
        entry["source"],
        streams,
        tuple(entry["records"]),
        Place.of(entry["presence"]),
        Place.of(entry["checksums"]),
    )
