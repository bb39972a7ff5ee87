"""The streams of an exported run: chunks that are checked before they are unpacked."""

from __future__ import annotations

import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError
from sonde.log.damage import Damage
from sonde.log.parts import StreamKey
from sonde.log.payload import from_storage, slot_checksum, storage_dtype
from sonde.log.segment import Place, SegmentFile, read_place

from .compression import Compression, decompress

_CACHE_BYTES = 32 << 20

Array = npt.NDArray[Any]
Facts = dict[str, Any]  # Any: JSON values.


class ExportedGroup:
    """The records of one group of the file."""

    def __init__(self, file: SegmentFile, entry: Facts, chunks: Place) -> None:
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
        self._listed = Place(
            chunks.offset + 24 * listed["first"], "int64", (listed["count"], 3), listed["crc32"]
        )

    @cached_property
    def chunks(self) -> npt.NDArray[np.int64]:
        """Where each chunk lies, [chunks, 3]: offset, size, checksum; 0 if it is not stored."""
        return read_place(self._group.file, self._listed, f"the list of chunks of {self._label}")

    def dims(self, row: int) -> tuple[str, ...]:
        """Return the names of the axes in one record."""
        return self._dims[self._dims_at.get(str(row), 0)]

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
        """Check the chunks; yield those that are damaged."""
        file = self._group.file
        for number, (offset, size, checksum) in enumerate(self.chunks.tolist()):
            try:
                read_place(file, Place(offset, "uint8", (size,), checksum), "")
            except DamageError:
                rows = self._rows_in(number)
                reason = f"{self._label} {self._at(rows)} does not match its checksum"
                yield Damage(file.name, offset, size, reason)

    @cached_property
    def _shapes(self) -> npt.NDArray[np.int64]:
        place = Place.of(self._shape_table or {})
        return read_place(self._group.file, place, f"the table of shapes of {self._label}")

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
        """Put together what lies from `start` on along the first axis."""
        block = np.empty(count, storage_dtype(self.dtype))
        if not block.size:
            return block
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

    def _read_chunk(self, number: int) -> Array:
        offset, size, checksum = self.chunks[number].tolist()
        group = self._group
        storage = storage_dtype(self.dtype)
        num_bytes = int(np.prod(self._chunk, dtype=np.int64)) * storage.itemsize

        def unpack() -> bytes:
            place = Place(offset, "uint8", (size,), checksum)
            what = f"{self._label} {self._at(self._rows_in(number))}"
            raw = read_place(group.file, place, what).tobytes()
            return decompress(raw, num_bytes, self._compression)

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
        steps = [self._group.step(row) for row in rows]
        span = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        return f"({self._group.measure}, {span})"


class _Cache:
    """The chunks that were unpacked last, of which several records are read one by one."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._num_bytes = 0
        self._chunks: OrderedDict[tuple[SegmentFile, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

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


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[int]:
    return [-(-size // step) for size, step in zip(shape, chunk, strict=True)]
