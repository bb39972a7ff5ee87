"""Segments: the sealed form of a journal, one immutable HDF5 file.

Each measure × source is a group `measure/source`; in it each stream (a field of a layer, or a field
alone) is a dataset whose first axis is the record, named `layer:field` or `field`. Axes carry HDF5
dimension scales, so that h5py, xarray (engine h5netcdf) and `h5dump` show names. `/metadata` holds
what is not an array, as JSON in uint8. Behind the HDF5 data stands a trailer with the checksum of the
whole file, which is checked before libhdf5 sees the file.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from sonde.exceptions import FormatError

from .frames import FORMAT_VERSION, from_storage

_TRAILER = struct.Struct("<8sIIQII")  # magic, version, reserved, bytes before it, their crc, own crc
_TRAILER_MAGIC = b"SONDESEG"
_CHUNK_BYTES = 4 << 20

_checked: dict[tuple[int, int, int], bool] = {}


@dataclass(frozen=True)
class Stream:
    """A field of a layer (or a field alone) over the records of one segment."""

    layer: str | None
    field: str
    dtype: str
    dims: tuple[str, ...]
    shape: tuple[int, ...] | None  # None: the shape differs between records.
    path: str
    column: int  # Its column in the presence and checksum tables.


@dataclass(frozen=True)
class SegmentGroup:
    """One measure × source of a segment: its streams, and one entry per record."""

    path: str
    measure: str
    source: str
    streams: tuple[Stream, ...]
    records: tuple[dict[str, Any], ...]


def append_trailer(path: Path) -> None:
    """Close a segment off with the checksum of everything before, and force it to the disk."""
    with path.open("r+b") as file:
        checksum = 0
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
        head = _TRAILER.pack(_TRAILER_MAGIC, FORMAT_VERSION, 0, file.tell(), checksum, 0)[:-4]
        file.write(head + struct.pack("<I", zlib.crc32(head)))
        file.flush()
        os.fsync(file.fileno())


def check_segment(path: Path) -> str | None:
    """Check the checksum of a whole segment; the answer is remembered until the file changes.

    Returns:
        None if it holds, otherwise what is wrong.

    Raises:
        FormatError: If the segment is of a newer format.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        key = (status.st_ino, status.st_size, status.st_mtime_ns)
        if _checked.get(key):
            return None
        file.seek(max(0, status.st_size - _TRAILER.size))
        trailer = file.read()
        if len(trailer) < _TRAILER.size:
            return "the segment is cut short"
        magic, version, _, num_bytes, checksum, own = _TRAILER.unpack(trailer)
        if magic != _TRAILER_MAGIC or zlib.crc32(trailer[:-4]) != own:
            return "the segment has no valid trailer: it is cut short or damaged"
        if version > FORMAT_VERSION:
            raise FormatError(
                f"{path} has log format {version}; this sonde reads up to {FORMAT_VERSION}. "
                "Install a newer sonde."
            )
        if num_bytes + _TRAILER.size != status.st_size:
            return "the segment does not have the size its trailer states"
        file.seek(0)
        actual = 0
        remaining = num_bytes
        while remaining and (chunk := file.read(min(_CHUNK_BYTES, remaining))):
            actual = zlib.crc32(chunk, actual)
            remaining -= len(chunk)
        if actual != checksum:
            return "the segment does not match its checksum"
    _checked[key] = True
    return None


class Segment:
    """A segment that was checked, open for reading.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # The default locking: libhdf5 refuses a second opening, by xarray say, whose flag differs.
        self._file = h5py.File(path, "r")
        metadata = json.loads(self._file["metadata"][()].tobytes())
        self.frames: list[dict[str, Any]] = metadata["frames"]
        self.tables: list[dict[str, Any]] = metadata["tables"]
        self.damage: list[dict[str, Any]] = metadata["damage"]
        self.groups = tuple(_group_from(entry) for entry in metadata["groups"])

    def table(self, path: str, dtype: str) -> npt.NDArray[Any]:
        """Return an array that does not depend on the step."""
        return from_storage(self._raw(self._file[path], dtype, ()), dtype)

    def presence(self, group: SegmentGroup) -> npt.NDArray[np.bool_]:
        """Return which record has which stream, [records, streams]."""
        present: npt.NDArray[np.bool_] = self._file[group.path]["presence"][()].astype(bool)
        return present

    def shape(self, group: SegmentGroup, stream: Stream, row: int) -> tuple[int, ...]:
        """Return the shape of one stream in one record."""
        if stream.shape is not None:
            return stream.shape
        sizes = self._file[group.path][f"{stream.path}::shape"][row]
        return tuple(int(size) for size in sizes if size >= 0)

    def read(self, group: SegmentGroup, stream: Stream, row: int) -> npt.NDArray[Any]:
        """Return one stream of one record."""
        dataset = self._file[group.path][stream.path]
        if stream.shape is not None:
            return from_storage(self._raw(dataset, stream.dtype, (row,)), stream.dtype)
        shapes = self._file[group.path][f"{stream.path}::shape"][()]
        sizes = np.where(shapes < 0, 1, shapes).prod(axis=1)
        start = int(sizes[:row][self.presence(group)[:row, stream.column]].sum())
        flat = self._raw(dataset, stream.dtype, (slice(start, start + int(sizes[row])),))
        return from_storage(flat, stream.dtype).reshape(self.shape(group, stream, row))

    def read_all(self, group: SegmentGroup, stream: Stream) -> Iterator[npt.NDArray[Any]]:
        """Yield one stream of every record that has it, in order, from one read when possible."""
        present = self.presence(group)[:, stream.column]
        if stream.shape is None:
            yield from (self.read(group, stream, int(row)) for row in np.flatnonzero(present))
            return
        block = self._raw(self._file[group.path][stream.path], stream.dtype, ())
        yield from from_storage(block, stream.dtype)[present]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _raw(
        self, dataset: h5py.Dataset, dtype: str, where: tuple[int | slice, ...]
    ) -> npt.NDArray[Any]:
        if dtype != "bfloat16":
            values: npt.NDArray[Any] = np.asarray(dataset[where])
            return values
        bits = np.empty(dataset.shape, np.uint16)
        if bits.size:
            dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, bits, dataset.id.get_type())
        return bits[where]


def _group_from(entry: Mapping[str, Any]) -> SegmentGroup:
    streams = tuple(
        Stream(
            stream["layer"],
            stream["field"],
            stream["dtype"],
            tuple(stream["dims"]),
            None if stream["shape"] is None else tuple(stream["shape"]),
            stream["path"],
            column,
        )
        for column, stream in enumerate(entry["streams"])
    )
    return SegmentGroup(
        entry["path"], entry["measure"], entry["source"], streams, tuple(entry["records"])
    )
