"""The streams of an exported run: chunks that are checked before they are unpacked."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError, InvalidInputError
from sonde.log.format.checked import (
    ALL_DETAILS,
    CHECKSUM,
    COUNT,
    COUNTS,
    DTYPE,
    OBJECT,
    SEQUENCES,
    SHAPE,
    STEPS,
    TEXT,
    TEXTS,
    TIMES,
    check,
    check_layout,
    check_shapes,
    list_of,
    mapping_of,
    nbytes,
    whole,
)
from sonde.log.format.damage import Damage
from sonde.log.format.payload import from_storage, slot_checksum, storage_dtype
from sonde.sizes import size_text

from .compression import COMPRESSIONS, Compression, decompress
from .parts import StreamKey
from .segment_file import Place, SegmentFile, read_place

_CACHE_BYTES = 32 << 20
# Far more than a writer puts into one.
_MAX_CHUNK_BYTES = 64 << 20

_GROUP = {
    "rank": whole(0, 10**9),
    "measure": TEXT,
    "source": TEXT,
    "attempts": COUNTS,
    "steps": STEPS,
    "sequences": SEQUENCES,
    "times": TIMES,
    "attributes": ALL_DETAILS,
    "streams": list_of(OBJECT),
    "crc32": OBJECT,
    "present": OBJECT,
}
_PRESENT = {"streams": list_of(COUNTS), "records": COUNTS}
_STREAM = {
    "layer": TEXT.or_none(),
    "field": TEXT,
    "dtype": DTYPE,
    "dims": list_of(TEXTS),
    "shape": SHAPE.or_none(),
    "chunk": COUNTS.or_none(),
    "compression": TEXT,
    "chunks": OBJECT,
}
_MAY_STREAM = {"unread": mapping_of(TEXT), "dims_at": mapping_of(COUNT)}
_LISTED = {"first": whole(0, 1 << 40), "count": whole(0, 1 << 40), "crc32": CHECKSUM}

Array = npt.NDArray[Any]
Facts = dict[str, Any]  # Any: JSON values.


class ExportedGroup:
    """The records of one group of the file."""

    def __init__(self, file: SegmentFile, entry: Facts, chunks: Place) -> None:
        check(entry, _GROUP)
        check(entry["present"], _PRESENT)
        self.file = file
        self._entry = entry
        self.rank: int = entry["rank"]
        self.measure: str = entry["measure"]
        self.source: str = entry["source"]
        self.attempts: list[int] = entry["attempts"]
        self._present = [frozenset(columns) for columns in entry["present"]["streams"]]
        self._present_of: list[int] = entry["present"]["records"]
        self.streams = [
            ExportedStream(self, column, facts, chunks)
            for column, facts in enumerate(entry["streams"])
        ]
        self._by_key: dict[StreamKey, list[ExportedStream]] = {}
        for stream in self.streams:
            self._by_key.setdefault(stream.key, []).append(stream)
        self._check()

    def _check(self) -> None:
        """Check that what is said of the records fits together.

        Raises:
            DamageError: If it does not.
        """
        entry, num_records = self._entry, self.num_records
        lengths = {len(entry[name]) for name in ("steps", "sequences", "times", "attributes")}
        if lengths | {len(self._present_of)} != {num_records} or not num_records:
            raise DamageError(f"a group of {num_records} records says other things of more or less")
        if max(self._present_of) >= len(self._present):
            raise DamageError("`present` names a set of streams that is not there")
        if set().union(*self._present) != set(range(len(self.streams))):
            raise DamageError("`present` does not name the streams that are there")
        if Place.of(entry["crc32"]).shape != (len(self.streams), num_records):
            raise DamageError("`crc32` does not have a checksum for each array")

    @cached_property
    def checksums(self) -> npt.NDArray[np.uint32]:
        """The checksum of each array, [streams, records]."""
        what = f"the checksums of '{self.measure}'"
        return read_place(self.file, Place.of(self._entry["crc32"]), what)

    @property
    def num_records(self) -> int:
        """The number of records."""
        return len(self.attempts)

    def record(self, row: int) -> tuple[int, int, float | None, Facts]:
        """Return step, number, time and attributes of a record."""
        entry = self._entry
        step, sequence = entry["steps"][row], entry["sequences"][row]
        return step, sequence, entry["times"][row], entry["attributes"][row]

    def step(self, row: int) -> int:
        """Return the step of a record."""
        return int(self._entry["steps"][row])

    def set_of(self, row: int) -> frozenset[int]:
        """Return the columns of the streams that a record has."""
        return self._present[self._present_of[row]]

    def streams_of(self, row: int) -> list[ExportedStream]:
        """Return the streams that a record has."""
        return [self.streams[column] for column in sorted(self.set_of(row))]

    def find(self, row: int, key: StreamKey) -> ExportedStream | None:
        """Return the stream that a record has under a key, if it has one."""
        present = self.set_of(row)
        return next((s for s in self._by_key.get(key, ()) if s.column in present), None)


class ExportedStream:
    """One stream of a group, in chunks."""

    def __init__(self, group: ExportedGroup, column: int, facts: Facts, chunks: Place) -> None:
        check(facts, _STREAM)
        check({"unread": {}, "dims_at": {}, **facts}, _MAY_STREAM)
        self._group = group
        self.column = column
        self.key: StreamKey = (facts["layer"], facts["field"])
        self.dtype: str = facts["dtype"]
        self._dims = [tuple(dims) for dims in facts["dims"]]
        self._dims_at: dict[str, int] = facts.get("dims_at", {})
        self._shape = None if facts["shape"] is None else tuple(facts["shape"])
        self._shape_table = facts.get("shapes")
        self._chunk: tuple[int, ...] = tuple(facts["chunk"] or ())
        self._compression: Compression = facts["compression"]
        self._unread: dict[str, str] = facts.get("unread", {})
        listed = facts["chunks"]
        check(listed, _LISTED)
        self._listed = Place(
            chunks.offset + 24 * listed["first"], "int64", (listed["count"], 3), listed["crc32"]
        )
        self._check()

    def _check(self) -> None:
        """Check that what is said of the stream fits together.

        Raises:
            DamageError: If it does not.
        """
        layer, name = self.key
        shape = None if self._shape is None else list(self._shape)
        for dims in self._dims[: 1 if shape is not None else None]:
            check_layout(layer, name, self.dtype, shape, list(dims))
        if not self._dims or max(self._dims_at.values(), default=0) >= len(self._dims):
            raise DamageError(f"{self._label} does not say the names of its axes")
        if self._compression not in COMPRESSIONS:
            raise DamageError(f"{self._label} is compressed in no known way")
        if (shape is None) == (self._shape_table is None):
            raise DamageError(f"{self._label} does not say its shapes")
        if len(self._chunk) not in (0, 1 + len(shape or ())) or 0 in self._chunk:
            raise DamageError(f"{self._label} has chunks of no shape that chunks have")
        if nbytes(self._chunk or (0,), self.dtype) > _MAX_CHUNK_BYTES:
            raise DamageError(f"{self._label} has chunks that are too large")
        whole_shape = None if shape is None else (self._group.num_records, *shape)
        if whole_shape is not None and self._listed.shape[0] != self._num_chunks(whole_shape):
            raise DamageError(f"{self._label} has other chunks than its shape needs")
        if self._listed.offset + 24 * self._listed.shape[0] > self._group.file.num_bytes:
            raise DamageError(f"{self._label} has more chunks than the file")

    def _num_chunks(self, shape: tuple[int, ...]) -> int:
        return math.prod(_grid(shape, self._chunk)) if self._chunk else 0

    @cached_property
    def chunks(self) -> npt.NDArray[np.int64]:
        """Where each chunk lies, [chunks, 3]: offset, size, checksum; 0 if it is not stored.

        Raises:
            DamageError: If the list is damaged, or of other chunks.
        """
        what = f"the list of chunks of {self._label}"
        chunks: npt.NDArray[np.int64] = read_place(self._group.file, self._listed, what)
        if len(chunks) != self._num_chunks(self._full_shape) or (chunks < 0).any():
            raise DamageError(f"{self._group.file.name}: {what} has no meaning")
        return chunks

    def dims(self, row: int) -> tuple[str, ...]:
        """Return the names of the axes in one record."""
        dims, num_axes = self._dims[self._dims_at.get(str(row), 0)], len(self.shape(row))
        return dims if len(dims) == num_axes else tuple(f"axis_{n}" for n in range(num_axes))

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape in one record."""
        if self._shape is not None:
            return self._shape
        return tuple(size for size in self._shapes[row].tolist() if size >= 0)

    def num_bytes(self, rows: Sequence[int]) -> int:
        """Return the size of its arrays in some records that have it, in bytes."""
        if self._shape is not None:
            count: int = len(rows) * math.prod(self._shape)
        else:
            count = int(np.diff(self._starts)[rows].sum())
        return count * storage_dtype(self.dtype).itemsize

    def read(self, row: int) -> Array:
        """Read the array of one record.

        Raises:
            DamageError: If it cannot be read; the message says why.
        """
        if str(row) in self._unread:
            raise DamageError(f"{self._unread[str(row)]} (when the run was exported)")
        shape = self.shape(row)
        start, count = row, (1, *shape)
        if self._shape is None:
            start, stop = self._starts[row : row + 2].tolist()
            count = (stop - start,)
        values = self._read_block(start, count).reshape(shape)
        raw = values.reshape(-1).view(np.uint8).data
        if slot_checksum(raw) != self._group.checksums[self.column, row]:
            what = f"{self._label} {self._at([row])}"
            raise DamageError(f"{self._group.file.name}: {what} does not match its checksum")
        return from_storage(values, self.dtype)

    def verify(self) -> Iterator[Damage]:
        """Check the chunks, and then the arrays in them; yield those that are damaged."""
        file = self._group.file
        is_whole = True
        for number, (offset, size, checksum) in enumerate(self.chunks.tolist()):
            try:
                read_place(file, Place(offset, "uint8", (size,), checksum), "")
            except DamageError:
                rows = self._rows_in(number)
                reason = f"{self._label} {self._at(rows)} does not match its checksum"
                yield Damage(file.name, offset, size, reason)
                is_whole = False
        if is_whole:
            yield from self._verify_arrays()

    def _verify_arrays(self) -> Iterator[Damage]:
        """Read every array; yield those that cannot be, whatever the checksums of chunks say."""
        file = self._group.file
        for row in range(self._group.num_records):
            if self.column not in self._group.set_of(row) or str(row) in self._unread:
                continue
            try:
                self.read(row)
            except DamageError as error:
                yield Damage(file.name, 0, 0, str(error).removeprefix(f"{file.name}: "))
            except InvalidInputError:
                break  # Nothing here can unpack it; its bytes are what was written.
        _cache.clear()

    @cached_property
    def _shapes(self) -> npt.NDArray[np.int64]:
        place = Place.of(self._shape_table or {})
        what = f"the table of shapes of {self._label}"
        table: npt.NDArray[np.int64] = read_place(self._group.file, place, what)
        check_shapes(table, self._group.num_records, what)
        return table

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        """Where each record begins in a flat stream, and where the last one ends."""
        sizes = np.where(self._shapes < 0, 1, self._shapes).prod(axis=1, dtype=np.int64)
        sizes[[self.column not in self._group.set_of(row) for row in range(len(sizes))]] = 0
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])

    @property
    def _full_shape(self) -> tuple[int, ...]:
        if self._shape is None:
            return (int(self._starts[-1]),)
        return (self._group.num_records, *self._shape)

    def _read_block(self, start: int, count: tuple[int, ...]) -> Array:
        """Put together what lies from `start` on along the first axis.

        Raises:
            DamageError: If it cannot be read.
        """
        block = self._allocate(count)
        if not block.size:
            return block
        if not self._chunk:
            raise DamageError(f"{self._group.file.name}: {self._label} has no chunks")
        grid = _grid(self._full_shape, self._chunk)
        first, last = start // self._chunk[0], (start + count[0] - 1) // self._chunk[0]
        for place in itertools.product(range(first, last + 1), *map(range, grid[1:])):
            content = self._read_chunk(int(np.ravel_multi_index(place, grid)))
            source, target = [], []
            origins = [start, *[0] * (len(count) - 1)]
            for p, c, n, origin in zip(place, self._chunk, count, origins, strict=True):
                begin, end = max(p * c, origin), min((p + 1) * c, origin + n)
                source.append(slice(begin - p * c, end - p * c))
                target.append(slice(begin - origin, end - origin))
            block[tuple(target)] = content[tuple(source)]
        return block

    def _allocate(self, shape: tuple[int, ...]) -> Array:
        """Return a new array, if there is memory for it: what is compressed may say any size.

        Raises:
            DamageError: If there is not.
        """
        size = nbytes(shape, self.dtype)
        if size <= _physical_bytes():
            with suppress(MemoryError):
                return np.empty(shape, storage_dtype(self.dtype))
        what = f"{self._group.file.name}: an array of {self._label}"
        raise DamageError(f"{what} is said to have {size_text(size)}, more than there is memory")

    def _read_chunk(self, number: int) -> Array:
        offset, size, checksum = self.chunks[number].tolist()
        group = self._group
        storage = storage_dtype(self.dtype)
        num_bytes = int(np.prod(self._chunk, dtype=np.int64)) * storage.itemsize

        def unpack() -> bytes:
            place = Place(offset, "uint8", (size,), checksum)
            what = f"{self._label} {self._at(self._rows_in(number))}"
            raw = read_place(group.file, place, what).tobytes()
            try:
                return decompress(raw, num_bytes, self._compression)
            except DamageError as error:
                raise DamageError(f"{group.file.name}: {what}: {error}") from None

        # A chunk that holds one record, or a part of it, is not read for another one.
        is_shared = self._shape is None or self._chunk[0] > 1
        raw = _cache.get((group.file, offset), unpack) if is_shared else unpack()
        return np.frombuffer(raw, storage).reshape(self._chunk)

    def _rows_in(self, number: int) -> list[int]:
        """Return the records that have a part in a chunk."""
        first = int(np.unravel_index(number, _grid(self._full_shape, self._chunk))[0])
        begin, end = first * self._chunk[0], (first + 1) * self._chunk[0]
        rows = range(begin, min(end, self._group.num_records))
        if self._shape is None:
            starts = self._starts
            rows = range(
                int(np.searchsorted(starts[1:], begin, "right")),
                int(np.searchsorted(starts[:-1], end, "left")),
            )
        return [row for row in rows if self.column in self._group.set_of(row)]

    @property
    def _label(self) -> str:
        layer, name = self.key
        return f"'{name}'" + ("" if layer is None else f" of layer '{layer}'")

    def _at(self, rows: list[int]) -> str:
        steps = [self._group.step(row) for row in rows] or [-1]
        span = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        return f"({self._group.measure}, {span})"


class _Cache:
    """The chunks that were unpacked last, of which several records are read one by one."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._chunks: OrderedDict[tuple[SegmentFile, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget all chunks."""
        with self._lock:
            self._chunks.clear()
            self._num_bytes = 0

    def get(self, key: tuple[SegmentFile, int], unpack: Callable[[], bytes]) -> bytes:
        """Return a chunk, unpacked now or before."""
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        raw: bytes = unpack()
        with self._lock:
            if key not in self._chunks:
                self._chunks[key] = raw
                self._num_bytes += len(raw)
            while self._num_bytes > self._limit_bytes:
                self._num_bytes -= len(self._chunks.popitem(last=False)[1])
        return raw


_cache = _Cache(_CACHE_BYTES)


def _physical_bytes() -> float:
    """Return the memory of this machine, as far as it can be asked for."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[int]:
    return [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
