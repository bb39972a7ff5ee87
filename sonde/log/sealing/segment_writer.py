"""Segments, as they are written: the frames of a journal as one HDF5 file.

Each measure × source is a group `measure/source`; in it each stream (a field of a layer, or a field
alone) is a contiguous dataset whose first axis is the record, named `layer:field` or `field`.
`/metadata` holds what is not an array, and where each array lies, as JSON in uint8.

libhdf5 makes the datasets, and the arrays are copied to their places past it, a stretch of the
journal at a time, together with the checksums they had in the journal.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sonde.exceptions import FormatError
from sonde.log.format.frames import FORMAT_VERSION, Frame
from sonde.log.format.names import link_name, stream_name
from sonde.log.format.payload import ArrayEntry, Layout, slot_checksum, storage_dtype
from sonde.log.format.positioned import read_at, reserve, write_at
from sonde.log.reading.segment import encode_trailer
from sonde.log.reading.segment_file import checksum_between
from sonde.log.reading.segment_records import Stream, encode_streams

from .hdf5 import RESERVED_NAMES, NamedGroup, contiguous, offset_of, set_text
from .output import Output

_ROOT_NAMES = {"metadata", "metadata_byte", "tables"}
_BATCH_BYTES = 64 << 20


def write_segment(
    path: Path,
    journal: BinaryIO,
    frames: Sequence[Frame],
    first: int,
    damage: Sequence[Mapping[str, Any]],
) -> None:
    """Write the frames of one journal as a segment, with its trailer, and force it to the disk.

    Args:
        path: The file to write; it must not exist.
        journal: The open journal the frames were read from; another sealer may delete it.
        frames: Its valid frames, in order.
        first: The number of its first frame, valid or not.
        damage: What could not be read, for the metadata.

    Raises:
        FormatError: If one stream has several element types.
        OSError: If it cannot be written.
    """
    tables = {frame.body["name"]: frame for frame in frames if frame.kind == "table"}
    grouped: dict[tuple[str, str], list[Frame]] = {}
    for frame in frames:
        if frame.kind == "record":
            grouped.setdefault((frame.body["measure"], frame.body["source"]), []).append(frame)
    # libhdf5 may take a failed write for one that succeeded, or end the process: it sees none.
    with closing(Output(path)) as output:
        with h5py.File(output, "w", libver=("v108", "v108")) as file:
            file.attrs["sonde_format"] = FORMAT_VERSION
            written_tables = [_write_table(file, journal, frame) for frame in tables.values()]
            groups = [
                _Group(file, journal, key, records, tables.get(key[1]))
                for key, records in grouped.items()
            ]
            metadata = {
                "format": FORMAT_VERSION,
                "first_sequence": first,
                "end_sequence": frames[-1].sequence + 1,
                "frames": [_without_arrays(f) for f in frames if f.kind not in ("record", "table")],
                "tables": written_tables,
                "groups": [group.describe() for group in groups],
                "damage": list(damage),
            }
            encoded = json.dumps(metadata, separators=(",", ":")).encode()
            root = NamedGroup(file)
            metadata_offset = offset_of(
                root.write("metadata", np.frombuffer(encoded, np.uint8), ["metadata_byte"])
            )
            root.finish()
        output.check()
        num_bytes = output.seek(0, os.SEEK_END)
        reserve(output.fd, num_bytes, 0)
        for group in groups:
            group.copy_arrays(output.fd)
        stretches = [stretch for group in groups for stretch in group.stretches()]
        checksum = checksum_between(output.fd, num_bytes, stretches)
        trailer = encode_trailer(metadata_offset, encoded, num_bytes, checksum)
        write_at(output.fd, [memoryview(trailer)], num_bytes)
        os.fsync(output.fd)


def _without_arrays(frame: Frame) -> dict[str, Any]:
    return {"kind": frame.kind, "step": frame.step, "sequence": frame.sequence, **frame.body}


def _array_of(journal: BinaryIO, frame: Frame, entry: ArrayEntry) -> npt.NDArray[Any]:
    raw = read_at(journal.fileno(), entry.num_bytes, frame.payload_offset + entry.offset)
    return np.frombuffer(raw, storage_dtype(entry.dtype)).reshape(entry.shape)


def _write_table(file: h5py.File, journal: BinaryIO, frame: Frame) -> dict[str, Any]:
    dims = {link_name(dim) for entry in frame.arrays for dim in entry.dims}
    group = NamedGroup(file.require_group(f"tables/{link_name(frame.body['name'])}"), reserved=dims)
    entries = []
    for entry in frame.arrays:
        values = _array_of(journal, frame, entry)
        name = group.free_name(link_name(entry.field))
        place = _write_place(group, name, values, entry.dims, entry.dtype)
        entries.append({"field": entry.field, "dims": entry.dims, **place})
    group.finish()
    return {"name": frame.body["name"], "attributes": frame.body["attributes"], "arrays": entries}


def _write_place(
    group: NamedGroup,
    name: str,
    values: npt.NDArray[Any],
    dims: Sequence[str],
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a small array, and say where it lies."""
    dataset = group.write(name, values, dims, dtype)
    return {
        "path": f"{group.group.name}/{name}",
        "offset": offset_of(dataset),
        "dtype": dtype or values.dtype.name,
        "shape": values.shape,
        "crc32": crc32(np.ascontiguousarray(values).data.cast("B") if values.size else b""),
    }


class _Column:
    """One stream, as the records of a group have it."""

    def __init__(self, entry: ArrayEntry) -> None:
        self.layer = entry.layer
        self.field = entry.field
        self.dtype = entry.dtype
        self.dims = entry.dims
        self.label = stream_name(entry.layer, entry.field)
        self.shapes: set[tuple[int, ...]] = set()
        self.num_bytes = 0  # Of all records.
        self.offset = 0  # Where it starts in the file.

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape in every record; None if it differs."""
        return next(iter(self.shapes)) if len(self.shapes) == 1 else None

    @property
    def fill(self) -> bytes:
        """What stands where a record lacks the stream."""
        if self.shape is None:
            return b""
        is_float = "float" in self.dtype
        missing = 0x7FC0 if self.dtype == "bfloat16" else np.nan if is_float else 0
        return np.full(self.shape, missing, storage_dtype(self.dtype)).tobytes()


class _Group:
    """The records of one measure × source.

    The constructor makes the datasets and writes the small tables; `copy_arrays` does the rest once
    libhdf5 has let go of the file.
    """

    def __init__(
        self,
        file: h5py.File,
        journal: BinaryIO,
        key: tuple[str, str],
        records: Sequence[Frame],
        table: Frame | None,
    ) -> None:
        self._key = key
        self._journal = journal
        self._records = records
        layouts = {id(frame.layout): frame.layout for frame in records}
        columns = _columns(records, layouts)
        places = {name: position for position, name in enumerate(columns)}
        self._columns = list(columns.values())
        self._present = {
            number: np.array([places[name] for name in layout.columns], np.intp)
            for number, layout in layouts.items()
        }
        coordinates = {}
        if table is not None:
            coordinates = {e.field: _array_of(journal, table, e) for e in table.arrays}
        dims = {link_name(dim) for column in self._columns for dim in column.dims}
        measure, source = (link_name(name) for name in key)
        top = f"{measure}::measure" if measure in _ROOT_NAMES else measure
        self._group = NamedGroup(
            file.create_group(f"{top}/{source}"), coordinates, RESERVED_NAMES | dims
        )
        self._group.add_scale("step", np.array([f.step for f in records], "<i8"))
        sequences = np.array([frame.sequence for frame in records], "<i8")
        self._group.write("sequence", sequences, ["step"])
        self._shapes = self._create_streams()
        self._tables = self._write_tables()
        self._group.finish()

    def describe(self) -> dict[str, Any]:
        """Return what the metadata says of the group."""
        numbers = {layout: number for number, layout in enumerate(self._present)}
        return {
            "measure": self._key[0],
            "source": self._key[1],
            **self._tables,
            "shapes": self._shapes,
            "present": {
                "streams": [columns.tolist() for columns in self._present.values()],
                "records": [numbers[id(frame.layout)] for frame in self._records],
            },
            "steps": [frame.step for frame in self._records],
            "sequences": [frame.sequence for frame in self._records],
            "times": [frame.body.get("time") for frame in self._records],
            "attributes": [frame.body.get("attributes", {}) for frame in self._records],
        }

    def stretches(self) -> list[tuple[int, int]]:
        """Return where the streams lie in the file, as (offset, size)."""
        return [(column.offset, column.num_bytes) for column in self._columns]

    def copy_arrays(self, out: int) -> None:
        """Copy every array from the journal to its place in the file."""
        ends = [column.offset for column in self._columns]  # Where the next record goes.
        for frames in _batches(self._records):
            layout = frames[0].layout
            present = self._present[id(layout)].tolist()
            stretch = _Stretch(self._journal, frames)
            for position, entry in zip(present, layout.entries, strict=True):
                starts = [frame.payload_offset + entry.offset for frame in frames]
                for pieces in stretch.pieces(starts, entry.num_bytes):
                    ends[position] = write_at(out, pieces, ends[position])
            for position in set(range(len(ends))).difference(present):
                fills = [memoryview(self._columns[position].fill)] * len(frames)
                ends[position] = write_at(out, fills, ends[position])

    def _create_streams(self) -> dict[int, Any]:
        """Create the datasets of the streams; return the shape tables of those that need one."""
        creation = contiguous()
        num_records = len(self._records)
        shapes = {}
        for position, column in enumerate(self._columns):
            name = self._group.free_name(column.label)
            shape: tuple[int, ...]
            dims: tuple[str, ...]
            if column.shape is None:
                size = column.num_bytes // storage_dtype(column.dtype).itemsize
                shape, dims = (size,), ("element",)
                table = self._shape_table(column)
            else:
                shape, dims = (num_records, *column.shape), ("step", *column.dims)
                table = None
            dataset = self._group.create(name, shape, column.dtype, dims, creation)
            set_text(dataset, "field", column.field)
            if column.layer is not None:
                set_text(dataset, "layer", column.layer)
            column.offset = offset_of(dataset)
            if table is not None:
                shapes[position] = _write_place(
                    self._group, f"{name}::shape", table, ["step", "axis"]
                )
        return shapes

    def _shape_table(self, column: _Column) -> npt.NDArray[np.int64]:
        num_axes = max(len(shape) for shape in column.shapes)
        table = np.full((len(self._records), num_axes), -1, "<i8")
        for row, frame in enumerate(self._records):
            entry = frame.layout.find(column.layer, column.field)
            if entry is not None:
                table[row, : len(entry.shape)] = entry.shape
        return table

    def _write_tables(self) -> dict[str, Any]:
        """Write which record has which stream, where each begins, and with which checksum."""
        num_records, num_columns = len(self._records), len(self._columns)
        presence = np.zeros((num_columns, num_records), np.uint8)
        checksums = np.zeros((num_columns, num_records), "<u4")
        for row, frame in enumerate(self._records):
            present = self._present[id(frame.layout)]
            presence[present, row] = 1
            checksums[present, row] = frame.checksums
        for position in np.flatnonzero(~presence.all(axis=1)):
            checksum = slot_checksum(self._columns[position].fill)
            checksums[position, presence[position] == 0] = checksum
        offsets = np.array([column.offset for column in self._columns], "<i8")
        streams = [
            Stream(c.layer, c.field, c.dtype, c.dims, c.shape, position)
            for position, c in enumerate(self._columns)
        ]
        encoded = np.frombuffer(encode_streams(streams), np.uint8)
        tables: dict[str, tuple[npt.NDArray[Any], list[str]]] = {
            "streams": (encoded, ["byte"]),
            "offsets": (offsets, ["stream"]),
            "presence": (presence, ["stream", "step"]),
            "crc32": (checksums, ["stream", "step"]),
        }
        return {
            name: _write_place(self._group, name, values, dims)
            for name, (values, dims) in tables.items()
        }


def _columns(
    records: Sequence[Frame], layouts: Mapping[int, Layout]
) -> dict[tuple[str | None, str], _Column]:
    """Gather the streams of records, by layer and field.

    Raises:
        FormatError: If one has several element types.
    """
    counts = Counter(id(frame.layout) for frame in records)
    columns: dict[tuple[str | None, str], _Column] = {}
    for number, layout in layouts.items():
        for entry in layout.entries:
            column = columns.setdefault((entry.layer, entry.field), _Column(entry))
            if entry.dtype != column.dtype:
                dtypes = ", ".join(sorted((entry.dtype, column.dtype)))
                raise FormatError(f"'{column.label}' is stored with dtypes {dtypes}")
            column.shapes.add(entry.shape)
            column.num_bytes += entry.num_bytes * counts[number]
    for column in columns.values():
        if column.shape is not None:
            size = math.prod(column.shape) * storage_dtype(column.dtype).itemsize
            column.num_bytes = size * len(records)
    return columns


def _batches(records: Sequence[Frame]) -> Iterator[list[Frame]]:
    """Join neighbouring records of one layout, as many as fit into a stretch of the journal."""
    batch: list[Frame] = []
    for frame in records:
        if batch and (
            frame.layout is not batch[0].layout
            or frame.payload_offset + frame.layout.num_bytes - batch[0].payload_offset
            > _BATCH_BYTES
        ):
            yield batch
            batch = []
        batch.append(frame)
    if batch:
        yield batch


class _Stretch:
    """The bytes of some neighbouring frames of a journal, mapped where they are not too many."""

    def __init__(self, journal: BinaryIO, frames: Sequence[Frame]) -> None:
        self._journal = journal
        self._start = frames[0].payload_offset
        num_bytes = frames[-1].payload_offset + frames[-1].layout.num_bytes - self._start
        is_small = num_bytes <= _BATCH_BYTES
        self._data = _map(journal, self._start, num_bytes) if is_small else None

    def pieces(self, starts: Sequence[int], size: int) -> Iterator[list[memoryview]]:
        """Yield the bytes of one stream of the frames, as many as may be mapped at a time."""
        if self._data is not None:
            begins = [start - self._start for start in starts]
            yield [self._data[begin : begin + size] for begin in begins]
            return
        for start in starts:
            for begin in range(start, start + size, _BATCH_BYTES):
                yield [_map(self._journal, begin, min(_BATCH_BYTES, start + size - begin))]


def _map(journal: BinaryIO, start: int, num_bytes: int) -> memoryview:
    """Map a part of a journal, which spares copying it; it is let go with the last view of it.

    Raises:
        OSError: If the journal became shorter.
    """
    before = start % mmap.ALLOCATIONGRANULARITY
    if os.fstat(journal.fileno()).st_size < start + num_bytes:
        raise OSError(f"{journal.name} became shorter while it was read")
    if not num_bytes:
        return memoryview(b"")
    where = {"length": before + num_bytes, "offset": start - before}
    if sys.platform == "linux":
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # One call instead of a fault per page.
        whole = mmap.mmap(journal.fileno(), flags=flags, prot=mmap.PROT_READ, **where)
    else:
        whole = mmap.mmap(journal.fileno(), access=mmap.ACCESS_READ, **where)
    return memoryview(whole)[before:]
