"""Exported runs, as they are written: chunked HDF5 datasets, and a checksum of every chunk.

A stream is written one stretch of records at a time, each chunk once, so that chunks lie in the
file without gaps and little is held in memory. libhdf5 compresses them; what it stored is read back
for its checksum, so that a reader can check a chunk before anything unpacks it.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sonde.exceptions import DamageError
from sonde.log.format.names import link_name, stream_name
from sonde.log.format.payload import slot_checksum, storage_dtype
from sonde.log.format.positioned import read_at
from sonde.log.reading.compression import Compression, add_filter
from sonde.log.sealing.hdf5 import (
    RESERVED_NAMES,
    NamedGroup,
    chunked,
    contiguous,
    offset_of,
    set_text,
)
from sonde.log.sealing.output import Output

from .groups import Column, Group
from .origin import Origin, TableContent, Writer

CHUNK_BYTES = 1 << 20
# A stream as small as this is smaller without chunks, whose index alone takes 3 KiB.
_PLAIN_BYTES = 8 << 10

Array = npt.NDArray[Any]
Facts = dict[str, Any]  # Any: JSON values.


class ExportWriter:
    """Writes groups, tables and metadata into one file.

    Args:
        output: The file, which must be empty.
        file: The same, opened by h5py.
        origin: Where the records are read.
        compression: How chunks are compressed.
        on_part: Called with the name of each stream before it is written.

    Attributes:
        unread: What could not be read in the run, with its writer; None for tables.
    """

    def __init__(
        self,
        output: Output,
        file: h5py.File,
        origin: Origin,
        compression: Compression,
        on_part: Callable[[str], object],
    ) -> None:
        self._output = output
        self._file = file
        self._origin = origin
        self._compression = compression
        self._on_part = on_part
        self._chunks: list[npt.NDArray[np.int64]] = []
        self._num_chunks = 0
        self.unread: list[tuple[Writer | None, str]] = []

    def write_table(self, path: str, source: str, content: TableContent) -> Facts:
        """Write the tables of a source as a group, and describe them."""
        dims = {link_name(dim) for names in content.dims.values() for dim in names}
        group = NamedGroup(self._file.create_group(path), reserved=dims)
        entries: list[Facts] = []
        for field, values in content.arrays.items():
            entry: Facts = {"field": field, "dims": content.dims[field]}
            if isinstance(values, str):
                entry["reason"] = values
                self.unread.append((None, values))
            else:
                name = group.free_name(link_name(field))
                entry |= _write_place(group, name, values, content.dims[field])
            entries.append(entry)
        group.finish()
        return {"source": source, "attributes": content.attributes, "arrays": entries}

    def write_group(self, path: str, group: Group) -> Facts:
        """Write records, stream by stream, and describe them.

        Raises:
            OSError: If the file cannot be written, or the run not be read.
        """
        dims = {link_name(d) for column in group.columns for names in column.dims for d in names}
        named = NamedGroup(self._file.create_group(path), group.coordinates, RESERVED_NAMES | dims)
        records = [self._origin.record(address) for address in group.addresses]
        named.add_scale("step", np.array([record.step for record in records], "<i8"))
        presence = np.zeros((len(group.columns), len(records)), np.uint8)
        checksums = np.zeros(presence.shape, "<u4")
        streams = []
        for place, column in enumerate(group.columns):
            self._on_part(f"{'/'.join(group.key)}, {place + 1} of {len(group.columns)}")
            presence[place, column.rows] = 1
            facts = self._write_column(named, group, place, checksums[place])
            presence[place, list(facts.get("unread", ()))] = 0
            streams.append(facts)
        named.write("presence", presence, ["stream", "step"])
        place_of_checksums = _write_place(named, "crc32", checksums, ["stream", "step"])
        named.finish()
        return {
            "path": path,
            "rank": group.rank,
            "measure": group.key[0],
            "source": group.key[1],
            "attempts": [address[0] for address in group.addresses],
            "steps": [record.step for record in records],
            "sequences": [record.sequence for record in records],
            "times": [record.time for record in records],
            "attributes": [record.attributes for record in records],
            "present": {"streams": group.present, "records": group.present_of},
            "streams": streams,
            "crc32": place_of_checksums,
        }

    def finish(self, metadata: Facts) -> tuple[int, bytes]:
        """Write where each chunk lies, and the metadata; return its offset and bytes."""
        root = NamedGroup(self._file)
        chunks = np.concatenate([*self._chunks, np.zeros((0, 3), "<i8")])
        place = _write_place(root, "chunks", chunks, ["chunk", "chunk_place"])
        encoded = json.dumps({**metadata, "chunks": place}, separators=(",", ":")).encode()
        content = np.frombuffer(encoded, np.uint8)
        offset = offset_of(root.write("metadata", content, ["metadata_byte"]))
        root.finish()
        return offset, encoded

    def stretches(self) -> list[tuple[int, int]]:
        """Return where the chunks lie in the file, as (offset, size)."""
        return [(offset, size) for chunks in self._chunks for offset, size, _ in chunks.tolist()]

    def _write_column(
        self, named: NamedGroup, group: Group, place: int, checksums: npt.NDArray[np.uint32]
    ) -> Facts:
        column = group.columns[place]
        num_records = len(group.addresses)
        storage = storage_dtype(column.dtype)
        shape: tuple[int, ...] = (num_records, *(column.shape or ()))
        dims: tuple[str, ...] = ("step", *column.dims[0])
        if column.shape is None:
            shape, dims = (sum(column.sizes()),), ("element",)
        num_bytes = math.prod(shape) * storage.itemsize
        is_plain = num_bytes <= _PLAIN_BYTES
        chunk = (
            (shape if is_plain else _chunk_shape(shape, storage.itemsize)) if num_bytes else None
        )
        creation = contiguous() if chunk is None or is_plain else chunked(chunk, column.dtype)
        if not is_plain:
            add_filter(creation, self._compression)
        name = named.free_name(stream_name(*column.key))
        if any(other.key == column.key for other in group.columns[:place]):
            name = f"{stream_name(*column.key)}::{column.dtype}"
        dataset = named.create(name, shape, column.dtype, dims, creation)
        layer, field = column.key
        set_text(dataset, "field", field)
        if layer is not None:
            set_text(dataset, "layer", layer)
        facts: Facts = {
            "layer": layer,
            "field": field,
            "dtype": column.dtype,
            "dims": column.dims,
            "shape": column.shape,
            "chunk": chunk,
            "compression": "none" if is_plain else self._compression,
        }
        if column.dims_at is not None:
            facts["dims_at"] = dict(zip(column.rows, column.dims_at, strict=True))
        if column.shape is None:
            table = column.shape_table(num_records)
            facts["shapes"] = _write_place(named, f"{name}::shape", table, ["step", "axis"])
        stream = _Stream(self._origin, dataset, group, column, checksums)
        written = stream.write_flat(chunk) if column.shape is None else stream.write_dense(chunk)
        facts["chunks"] = self._list_chunks(dataset, shape, chunk or (), written)
        if stream.unread:
            facts["unread"] = stream.unread
            self.unread += [(group.addresses[row][:2], why) for row, why in stream.unread.items()]
        return facts

    def _list_chunks(
        self,
        dataset: h5py.h5d.DatasetID,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        written: Sequence[tuple[int, ...]],
    ) -> Facts:
        """Take down where the chunks of a dataset lie, how large they are, and their checksums."""
        self._output.check()
        dataset.flush()
        self._output.check()
        grid = [-(-n // c) for n, c in zip(shape, chunk, strict=False)]  # No chunk: no element.
        chunks = np.zeros((math.prod(grid) if grid else 0, 3), "<i8")
        is_plain = dataset.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        for place in written:
            if is_plain:
                offset, size = offset_of(dataset), dataset.get_storage_size()
            else:
                stored = dataset.get_chunk_info_by_coord(tuple(map(operator.mul, place, chunk)))
                assert stored.filter_mask == 0
                offset, size = stored.byte_offset, stored.size
            checksum = crc32(read_at(self._output.fd, size, offset))
            chunks[np.ravel_multi_index(place, grid)] = offset, size, checksum
        first, self._num_chunks = self._num_chunks, self._num_chunks + len(chunks)
        self._chunks.append(chunks)
        return {"first": first, "count": len(chunks), "crc32": _checksum(chunks)}


class _Stream:
    """Writes one stream of a group."""

    def __init__(
        self,
        origin: Origin,
        dataset: h5py.h5d.DatasetID,
        group: Group,
        column: Column,
        checksums: npt.NDArray[np.uint32],
    ) -> None:
        self._origin = origin
        self._dataset = dataset
        self._addresses = group.addresses
        self._column = column
        self._storage = storage_dtype(column.dtype)
        self._checksums = checksums
        self.unread: dict[int, str] = {}

    def write_dense(self, chunk: tuple[int, ...] | None) -> list[tuple[int, ...]]:
        """Write arrays of one shape along a first axis of records; return the chunks written."""
        shape = self._column.shape
        assert shape is not None
        if chunk is None:
            for row in self._column.rows:
                self._read([row])
            return []
        grid = [range(-(-n // c)) for n, c in zip(shape, chunk[1:], strict=True)]
        written: list[tuple[int, ...]] = []
        for number, group in itertools.groupby(self._column.rows, lambda row: row // chunk[0]):
            rows = list(group)
            start = number * chunk[0]
            count = min(chunk[0], len(self._addresses) - start)
            arrays = self._read(rows)
            if count == 1:
                block = arrays[0] if arrays[0] is not None else self._missing(shape)
            else:
                block = self._missing((count, *shape))
                for row, values in zip(rows, arrays, strict=True):
                    if values is not None:
                        block[row - start] = values
            self._write((start, *[0] * len(shape)), (count, *shape), block)
            written += [(number, *rest) for rest in itertools.product(*grid)]
        return written

    def write_flat(self, chunk: tuple[int, ...] | None) -> list[tuple[int, ...]]:
        """Write arrays of any shapes one behind the other; return the chunks written."""
        sizes = self._column.sizes()
        buffer = self._missing(chunk or (0,))
        filled = written = 0
        for rows in self._batches(sizes):
            arrays = self._read([self._column.rows[at] for at in rows])
            for at, values in zip(rows, arrays, strict=True):
                rest = self._missing((sizes[at],)) if values is None else values.reshape(-1)
                while len(rest):
                    taken = rest[: len(buffer) - filled]
                    buffer[filled : filled + len(taken)] = taken
                    rest, filled = rest[len(taken) :], filled + len(taken)
                    if filled == len(buffer):
                        self._write((written * filled,), (filled,), buffer)
                        filled, written = 0, written + 1
        if filled:
            self._write((written * len(buffer),), (filled,), buffer[:filled])
            written += 1
        return [(number,) for number in range(written)]

    def _batches(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Join records into batches that may be held in memory."""
        batch: list[int] = []
        num_elements = 0
        for at, size in enumerate(sizes):
            if batch and (num_elements + size) * self._storage.itemsize > CHUNK_BYTES:
                yield batch
                batch, num_elements = [], 0
            batch.append(at)
            num_elements += size
        if batch:
            yield batch

    def _read(self, rows: Sequence[int]) -> list[Array | None]:
        """Read arrays as they are stored, and take down their checksums; None for damaged ones."""
        arrays: list[Array | None] = []
        found = self._origin.read([self._addresses[row] for row in rows], self._column.key)
        for row, values in zip(rows, found, strict=True):
            if isinstance(values, DamageError):
                self.unread[row] = str(values)
                arrays.append(None)
                continue
            stored = _as_stored(values, self._column.dtype)
            self._checksums[row] = slot_checksum(stored.reshape(-1).view(np.uint8).data)
            arrays.append(stored)
        return arrays

    def _missing(self, shape: tuple[int, ...]) -> Array:
        """Return what stands where there is no array."""
        dtype = self._column.dtype
        missing = 0x7FC0 if dtype == "bfloat16" else np.nan if "float" in dtype else 0
        return np.full(shape, missing, self._storage)

    def _write(self, start: tuple[int, ...], count: tuple[int, ...], block: Array) -> None:
        space = self._dataset.get_space()
        space.select_hyperslab(start, count)
        memory = h5py.h5s.create_simple(count)
        self._dataset.write(memory, space, block, self._dataset.get_type())


def _as_stored(values: Array, dtype: str) -> Array:
    """Return an array as its bytes are in the log; a bfloat16 is the upper half of its float32."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, storage_dtype(dtype)).reshape(values.shape)
    halves = np.ascontiguousarray(values, "<f4").reshape(-1).view("<u2")[1::2]
    return np.ascontiguousarray(halves).reshape(values.shape)


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Choose chunks: whole records together, or else one split along its first axis, and so on.

    Chunks of several records are smaller, as who reads one record unpacks all of them.
    """
    sizes = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    axis = next(axis for axis, num_bytes in enumerate(sizes) if num_bytes <= CHUNK_BYTES)
    limit = CHUNK_BYTES if axis else CHUNK_BYTES // 4
    num_chunks = -(-shape[axis] // max(1, limit // sizes[axis]))
    together = -(-shape[axis] // num_chunks)  # All of one size, as the last one is padded.
    return (*[1] * axis, together, *shape[axis + 1 :])


def _write_place(
    group: NamedGroup, name: str, values: Array, dims: Sequence[str]
) -> Mapping[str, Any]:
    """Write a small array, and say where it lies."""
    dataset = group.write(name, values, dims)
    return {
        "offset": offset_of(dataset),
        "dtype": values.dtype.name,
        "shape": values.shape,
        "crc32": _checksum(values),
    }


def _checksum(values: Array) -> int:
    return crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
