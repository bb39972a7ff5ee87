"""The records of one measure × source of a segment: which streams they have, and where."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError
from sonde.log.format.checked import (
    ALL_DETAILS,
    COUNTS,
    LIST,
    OBJECT,
    SEQUENCES,
    STEPS,
    TEXT,
    TIMES,
    check,
    check_layout,
    check_shapes,
    list_of,
    nbytes,
    parse,
)
from sonde.log.format.payload import from_storage, slot_checksum, storage_dtype
from sonde.log.format.positioned import read_at

from .segment_file import Place, SegmentFile, open_segment, read_place

_CHUNK_BYTES = 4 << 20

_GROUP = {
    "measure": TEXT,
    "source": TEXT,
    "steps": STEPS,
    "sequences": SEQUENCES,
    "times": TIMES,
    "attributes": ALL_DETAILS,
    "streams": OBJECT,
    "offsets": OBJECT,
    "crc32": OBJECT,
    "shapes": OBJECT,
    "present": OBJECT,
}
_PRESENT = {"streams": list_of(COUNTS), "records": COUNTS}


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
    """Return streams by layer and field; segments of a run mostly have the same ones.

    Raises:
        DamageError: If the bytes describe no streams.
    """
    listed = parse(encoded)
    check({"streams": listed}, {"streams": list_of(LIST)})
    streams = {}
    for column, item in enumerate(listed):
        if len(item) != 5:
            raise DamageError("a stream is not described by its five values")
        layer, field, dtype, dims, shape = item
        check_layout(layer, field, dtype, shape, dims)
        at = None if shape is None else tuple(shape)
        streams[layer, field] = Stream(layer, field, dtype, tuple(dims), at, column)
    if len(streams) < len(listed):
        raise DamageError("two streams have one name")
    return streams


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
        check(entry, _GROUP)
        check(entry["present"], _PRESENT)
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
            if column.isascii() and column.isdecimal()
        }
        self._present = [frozenset(columns) for columns in entry["present"]["streams"]]
        self._present_of: list[int] = entry["present"]["records"]
        self._checksums_at = Place.of(entry["crc32"]).offset
        self._check(entry)

    def _check(self, entry: Mapping[str, Any]) -> None:
        """Check that what is said of the records fits together, and into the file.

        Raises:
            DamageError: If it does not.
        """
        num_rows, num_streams = len(self.steps), len(self.streams)
        for name in ("sequences", "times", "attributes"):
            if len(entry[name]) != num_rows:
                raise DamageError(f"`{name}` has {len(entry[name])} entries for {num_rows} records")
        if len(self._present_of) != num_rows or not num_rows:
            raise DamageError(f"`present` has {len(self._present_of)} for {num_rows} records")
        if max(self._present_of) >= len(self._present):
            raise DamageError("`present` names a set of streams that is not there")
        if set().union(*self._present) != set(range(num_streams)):
            raise DamageError("`present` does not name the streams that are there")
        table = self._offsets
        if table.dtype != np.int64 or table.shape != (num_streams,) or (table < 0).any():
            raise DamageError("`offsets` does not say where each stream begins")
        for stream in self.streams.values():
            if stream.shape is None:
                if stream.column not in self._shape_tables:
                    raise DamageError(f"{stream.label} does not say its shapes")
                check_shapes(self._shape_tables[stream.column], num_rows, "a table of shapes")
            begin, size = self._offsets[stream.column], self._row_bytes(stream) * num_rows
            if int(begin) + size > self.file.num_bytes:
                raise DamageError(f"{stream.label} is said to lie beyond the end of the file")

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
        with open_segment(self.file) as fd:
            # Of a checksum that is damaged itself no bytes will hold.
            table = read_at(fd, 4 * num_rows, self._checksums_at + 4 * num_rows * stream.column)
            is_there = len(table) == 4 * num_rows
            expected = np.frombuffer(table, "<u4").tolist() if is_there else [None] * num_rows
            for first, last in _spans(rows, starts):
                begin, end = int(starts[first]), int(starts[last + 1])
                block = memoryview(read_at(fd, end - begin, offset + begin))
                bounds = (starts[first : last + 2] - begin).tolist()
                for row, (start, stop) in enumerate(pairwise(bounds), first):
                    raw = block[start:stop]
                    is_whole = len(raw) == stop - start and slot_checksum(raw) == expected[row]
                    yield row, raw if is_whole else None

    def _starts(self, stream: Stream) -> npt.NDArray[np.int64]:
        """Return where each record begins within a stream, and where the last one ends."""
        if stream.shape is not None:
            return np.arange(len(self.steps) + 1, dtype=np.int64) * self._row_bytes(stream)
        itemsize = storage_dtype(stream.dtype).itemsize
        sizes = [itemsize * int(np.prod(shape, dtype=np.int64)) for shape in self.shapes(stream)]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])

    @staticmethod
    def _row_bytes(stream: Stream) -> int:
        """Return the size of the stream in a record; 0 where it varies."""
        return 0 if stream.shape is None else nbytes(stream.shape, stream.dtype)

    def _table(self, entry: Mapping[str, Any], name: str) -> npt.NDArray[Any]:
        return read_place(self.file, Place.of(entry[name]), f"the table '{name}'")

    def _damaged(self, stream: Stream, row: int) -> str:
        return (
            f"{self.file.name}: {stream.label} of record {self.sequences[row]} "
            f"({self.measure}, step {self.steps[row]}) does not match its checksum"
        )


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
