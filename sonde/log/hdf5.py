"""Segments, as they are written: the frames of a journal as one HDF5 file.

Each measure × source is a group `measure/source`; in it each stream (a field of a layer, or a field
alone) is a contiguous dataset whose first axis is the record, named `layer:field` or `field`. Axes
carry HDF5 dimension scales, so that h5py, xarray (engine h5netcdf) and `h5dump` show names.
`/metadata` holds what is not an array, and where each array lies, as JSON in uint8.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from sonde.exceptions import FormatError

from .frames import (
    FORMAT_VERSION,
    ArrayEntry,
    Frame,
    link_name,
    storage_dtype,
    stream_name,
)
from .segment import append_trailer

_COORDINATES = {"example": "id", "other_example": "id"}
# Names of a segment's own. No stream is called so, and none contains "::", which sets helpers
# apart.
_ROOT_NAMES = {"metadata", "metadata_byte", "tables"}
_TABLE_NAMES = {"sequence", "presence", "crc32"}
_DIMENSION_NAMES = {"step", "stream", "axis", "element"}


class _Journaled:
    """The arrays of a journal's frames, in memory-mapped form."""

    def __init__(self, file: BinaryIO) -> None:
        # As a plain array: slices of a memmap object cost ten times as much.
        self._bytes: npt.NDArray[np.uint8] = np.asarray(np.memmap(file, np.uint8, "r"))

    def raw(self, frame: Frame, entry: ArrayEntry) -> npt.NDArray[np.uint8]:
        start = frame.payload_offset + entry.offset
        return self._bytes[start : start + entry.num_bytes]

    def array(self, frame: Frame, entry: ArrayEntry) -> npt.NDArray[Any]:
        return self.raw(frame, entry).view(storage_dtype(entry.dtype)).reshape(entry.shape)


def write_segment(
    path: Path, journal: BinaryIO, frames: Sequence[Frame], damage: Sequence[Mapping[str, Any]]
) -> None:
    """Write the frames of one journal as a segment, with its trailer, and force it to the disk.

    Args:
        path: The file to write; it must not exist.
        journal: The open journal the frames were read from; another sealer may delete it.
        frames: Its valid frames, in order.
        damage: What could not be read, for the metadata.

    Raises:
        FormatError: If one stream has several element types.
        OSError: If it cannot be written.
    """
    arrays = _Journaled(journal)
    tables = {frame.body["name"]: frame for frame in frames if frame.kind == "table"}
    grouped: dict[tuple[str, str], list[Frame]] = {}
    for frame in frames:
        if frame.kind == "record":
            grouped.setdefault((frame.body["measure"], frame.body["source"]), []).append(frame)
    with h5py.File(path, "x", libver=("v108", "v108")) as file:
        file.attrs["sonde_format"] = FORMAT_VERSION
        metadata = {
            "format": FORMAT_VERSION,
            "first_sequence": frames[0].sequence,
            "end_sequence": frames[-1].sequence + 1,
            "frames": [_without_arrays(f) for f in frames if f.kind not in ("record", "table")],
            "tables": [_write_table(file, arrays, frame) for frame in tables.values()],
            "groups": [
                _write_group(file, arrays, key, records, tables.get(key[1]))
                for key, records in grouped.items()
            ],
            "damage": list(damage),
        }
        offset, encoded = _write_metadata(file, metadata)
    append_trailer(path, offset, encoded)


def _without_arrays(frame: Frame) -> dict[str, Any]:
    return {"kind": frame.kind, "step": frame.step, "sequence": frame.sequence, **frame.body}


def _write_metadata(file: h5py.File, metadata: Mapping[str, Any]) -> tuple[int, bytes]:
    """Write the metadata; return where it lies in the file, and what was written."""
    encoded = json.dumps(metadata, separators=(",", ":")).encode()
    file["metadata"] = np.frombuffer(encoded, np.uint8)
    scale = _dimension(file, "metadata_byte", len(encoded))
    file["metadata"].dims[0].attach_scale(scale)
    return _offset(file["metadata"]), encoded


def _write_table(file: h5py.File, arrays: _Journaled, frame: Frame) -> dict[str, Any]:
    group = file.require_group(f"tables/{link_name(frame.body['name'])}")
    scales: dict[tuple[str, int], h5py.Dataset] = {}
    dims = {link_name(dim) for entry in frame.arrays for dim in entry.dims}
    entries = []
    for entry in frame.arrays:
        name = _stream_dataset_name(group, link_name(entry.field), dims)
        dataset = group.create_dataset(
            name, entry.shape, _hdf5_type(entry.dtype), track_times=False
        )
        values = arrays.array(frame, entry)
        _write_raw(dataset, values, entry.dtype)
        for axis, (dim, size) in enumerate(zip(entry.dims, entry.shape, strict=True)):
            if (dim, size) not in scales:
                name = _dimension_name(group, scales, dim, size)
                scales[dim, size] = _dimension(group, name, size)
            dataset.dims[axis].attach_scale(scales[dim, size])
        place = _place(dataset, values, entry.dtype)
        entries.append({"field": entry.field, "dims": entry.dims, "path": dataset.name, **place})
    return {"name": frame.body["name"], "attributes": frame.body["attributes"], "arrays": entries}


def _write_group(
    file: h5py.File,
    arrays: _Journaled,
    key: tuple[str, str],
    records: Sequence[Frame],
    table: Frame | None,
) -> dict[str, Any]:
    measure, source = key
    top = f"{measure}::measure" if measure in _ROOT_NAMES else link_name(measure)
    group = file.create_group(f"{top}/{link_name(source)}")
    by_stream: dict[tuple[str | None, str], list[tuple[int, Frame, ArrayEntry]]] = {}
    for row, frame in enumerate(records):
        for entry in frame.arrays:
            by_stream.setdefault((entry.layer, entry.field), []).append((row, frame, entry))
    writer = _GroupWriter(group, arrays, records, table, len(by_stream))
    streams = [writer.write(column, cells) for column, cells in enumerate(by_stream.values())]
    return {
        "path": group.name,
        **writer.finish(),
        "measure": measure,
        "source": source,
        "streams": streams,
        "records": [
            {
                "step": frame.step,
                "sequence": frame.sequence,
                "time": frame.body.get("time"),
                "attributes": frame.body.get("attributes", {}),
            }
            for frame in records
        ],
    }


class _GroupWriter:
    """Writes the streams of one measure × source."""

    def __init__(
        self,
        group: h5py.Group,
        arrays: _Journaled,
        records: Sequence[Frame],
        table: Frame | None,
        num_streams: int,
    ) -> None:
        self._group = group
        self._arrays = arrays
        self._num_records = len(records)
        self._coordinates: dict[str, npt.NDArray[Any]] = {}
        if table is not None:
            self._coordinates = {e.field: arrays.array(table, e) for e in table.arrays}
        dims = {link_name(dim) for f in records for e in f.arrays for dim in e.dims}
        self._reserved = _TABLE_NAMES | _DIMENSION_NAMES | dims
        self._scales: dict[tuple[str, int], h5py.Dataset] = {}
        self._presence = np.zeros((len(records), num_streams), np.uint8)
        self._checksums = np.zeros((len(records), num_streams), "<u4")
        group["step"] = np.array([frame.step for frame in records], "<i8")
        group["step"].make_scale("step")
        self._scales["step", len(records)] = group["step"]
        group["sequence"] = np.array([frame.sequence for frame in records], "<i8")
        group["sequence"].dims[0].attach_scale(group["step"])

    def write(self, column: int, cells: list[tuple[int, Frame, ArrayEntry]]) -> dict[str, Any]:
        """Write one stream; `cells` holds a row, frame and entry per record that has it.

        Raises:
            FormatError: If it has several element types.
        """
        first = cells[0][2]
        label = stream_name(first.layer, first.field)
        name = _stream_dataset_name(self._group, label, self._reserved)
        for row, frame, entry in cells:
            self._presence[row, column] = 1
            self._checksums[row, column] = zlib.crc32(self._arrays.raw(frame, entry).data)
        dtypes = {entry.dtype for _, _, entry in cells}
        if len(dtypes) > 1:
            raise FormatError(f"'{label}' is stored with dtypes {', '.join(sorted(dtypes))}")
        dtype = first.dtype
        is_dense = len({entry.shape for _, _, entry in cells}) == 1
        write = self._write_dense if is_dense else self._write_ragged
        dataset, shapes = write(name, cells, dtype)
        dataset.attrs["field"] = np.bytes_(first.field.encode())
        if first.layer is not None:
            dataset.attrs["layer"] = np.bytes_(first.layer.encode())
        return {
            "layer": first.layer,
            "field": first.field,
            "dtype": dtype,
            "dims": first.dims,
            "shape": first.shape if is_dense else None,
            "path": name,
            "offset": _offset(dataset),
            "shapes": shapes,
        }

    def finish(self) -> dict[str, Any]:
        """Write the tables of which record has which stream, and with which checksum."""
        return {
            "presence": self._write_table("presence", self._presence, ("step", "stream")),
            "checksums": self._write_table("crc32", self._checksums, ("step", "stream")),
        }

    def _write_table(
        self, name: str, values: npt.NDArray[Any], dims: Sequence[str]
    ) -> dict[str, Any]:
        self._group[name] = values
        self._attach(self._group[name], dims)
        return _place(self._group[name], values, values.dtype.name)

    def _write_dense(
        self, name: str, cells: list[tuple[int, Frame, ArrayEntry]], dtype: str
    ) -> tuple[h5py.Dataset, None]:
        shape = cells[0][2].shape
        storage = storage_dtype(dtype)
        block = np.zeros((self._num_records, *shape), storage)
        if len(cells) < self._num_records and dtype.startswith("float"):
            block[...] = np.nan
        for row, frame, entry in cells:
            block[row] = self._arrays.array(frame, entry)
        dataset = self._group.create_dataset(
            name, block.shape, _hdf5_type(dtype), track_times=False
        )
        _write_raw(dataset, block, dtype)
        self._attach(dataset, ("step", *cells[0][2].dims))
        return dataset, None

    def _write_ragged(
        self, name: str, cells: list[tuple[int, Frame, ArrayEntry]], dtype: str
    ) -> tuple[h5py.Dataset, dict[str, Any]]:
        flat = np.concatenate([self._arrays.array(frame, e).ravel() for _, frame, e in cells])
        num_axes = max(len(entry.shape) for _, _, entry in cells)
        shapes = np.full((self._num_records, num_axes), -1, "<i8")
        for row, _, entry in cells:
            shapes[row, : len(entry.shape)] = entry.shape
        dataset = self._group.create_dataset(name, flat.shape, _hdf5_type(dtype), track_times=False)
        _write_raw(dataset, flat, dtype)
        self._attach(dataset, ("element",))
        return dataset, self._write_table(f"{name}::shape", shapes, ("step", "axis"))

    def _attach(self, dataset: h5py.Dataset, dims: Sequence[str]) -> None:
        for axis, (dim, size) in enumerate(zip(dims, dataset.shape, strict=True)):
            if (dim, size) not in self._scales:
                self._scales[dim, size] = self._new_scale(dim, size)
            dataset.dims[axis].attach_scale(self._scales[dim, size])

    def _new_scale(self, dim: str, size: int) -> h5py.Dataset:
        name = _dimension_name(self._group, self._scales, dim, size)
        ids = self._coordinates.get(_COORDINATES.get(dim, ""))
        if name == dim and ids is not None and ids.shape == (size,):
            self._group[name] = ids
            self._group[name].make_scale(name)
            return self._group[name]
        return _dimension(self._group, name, size)


def _stream_dataset_name(group: h5py.Group, label: str, reserved: Set[str]) -> str:
    """Name the dataset of a stream by its label, unless something else is called so."""
    return f"{label}::data" if label in reserved or label in group else label


def _dimension_name(
    group: h5py.Group, scales: Mapping[tuple[str, int], object], dim: str, size: int
) -> str:
    """Name a dimension; a second size of the same name is told apart by its size."""
    name = link_name(dim)
    if any(known == dim for known, _ in scales):
        name = f"{name}_{size}"
    while name in group or name in _TABLE_NAMES:
        name += "_"
    return name


def _dimension(group: h5py.Group, name: str, size: int) -> h5py.Dataset:
    """Create a dimension that has a size but no values, the way netCDF-4 writes one."""
    dataset = group.create_dataset(name, (size,), np.int8, track_times=False)
    dataset.make_scale(f"This is a netCDF dimension but not a netCDF variable. {size:9d}")
    return dataset


def _place(dataset: h5py.Dataset, values: npt.NDArray[Any], dtype: str) -> dict[str, Any]:
    """Say where an array that is read as a whole lies, and its checksum."""
    return {
        "offset": _offset(dataset),
        "dtype": dtype,
        "shape": dataset.shape,
        "crc32": zlib.crc32(np.ascontiguousarray(values).tobytes()),
    }


def _offset(dataset: h5py.Dataset) -> int:
    """Return where a contiguous dataset starts in the file; an empty one starts nowhere."""
    return dataset.id.get_offset() or 0


def _hdf5_type(dtype: str) -> Any:  # h5py takes a NumPy dtype or a type object of its own here.
    if dtype != "bfloat16":
        return storage_dtype(dtype)
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    return h5py.Datatype(kind)


def _write_raw(dataset: h5py.Dataset, values: npt.NDArray[Any], dtype: str) -> None:
    if not values.size:
        return
    contiguous = np.ascontiguousarray(values).reshape(values.shape)
    if dtype == "bfloat16":
        # The memory type is the file's, so libhdf5 converts nothing.
        dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, contiguous, dataset.id.get_type())
    else:
        dataset[...] = contiguous
