"""Groups of an export: records that stand side by side in a file, and their streams.

A group holds the records of one rank, measure and source. Where an earlier attempt had other
examples, or had them in another order, its records are a group of their own, so that in every group
an axis `example` means the same examples throughout.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.log.reading.parts import Part, StreamKey, StreamShape
from sonde.log.reading.ranks import Key

from .origin import Address, Origin, TableContent


class Column:
    """A stream of one element type over the records of a group.

    Args:
        key: Its layer and field.
        stream: What it is in the first record that has it.

    Attributes:
        rows: The numbers of the records that have it.
        dims: The names of its axes; more than one set of them where records differ.
        dims_at: Which of them each of `rows` has; None where there is one.
        shapes: Its shape in each of `rows`; None where it is the same in all.
    """

    def __init__(self, key: StreamKey, stream: StreamShape) -> None:
        self.key = key
        self.dtype = stream.dtype
        self.rows = array("Q")
        self.dims = [stream.dims]
        self.dims_at: list[int] | None = None
        self.shapes: list[tuple[int, ...]] | None = None
        self._first_shape = stream.shape

    def add(self, row: int, stream: StreamShape) -> None:
        """Take in one more record."""
        if self.shapes is None and stream.shape != self._first_shape:
            self.shapes = [self._first_shape] * len(self.rows)
        if self.shapes is not None:
            self.shapes.append(stream.shape)
        if stream.dims not in self.dims:
            self.dims.append(stream.dims)
            self.dims_at = self.dims_at or [0] * len(self.rows)
        if self.dims_at is not None:
            self.dims_at.append(self.dims.index(stream.dims))
        self.rows.append(row)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape in every record; None where it, or the names of its axes, differ."""
        return self._first_shape if self.shapes is None and self.dims_at is None else None

    def sizes(self) -> list[int]:
        """Return its number of elements in each of `rows`."""
        shapes = self.shapes or [self._first_shape] * len(self.rows)
        return [math.prod(shape) for shape in shapes]

    def shape_table(self, num_records: int) -> npt.NDArray[np.int64]:
        """Return its shape in every record of the group, [records, axes], padded with -1."""
        shapes = self.shapes or [self._first_shape] * len(self.rows)
        table = np.full((num_records, max(map(len, shapes))), -1, "<i8")
        for row, shape in zip(self.rows, shapes, strict=True):
            table[row, : len(shape)] = shape
        return table


@dataclass
class Group:
    """Records that are exported side by side.

    Attributes:
        key: Their measure and source.
        rank: The rank that recorded them.
        attempt: The attempt that recorded them, where they are set apart from others; or None.
        addresses: The records, in order of their steps.
        columns: Their streams, in the order they were recorded.
        present: The sets of streams that records have, by number.
        present_of: The number of the set that each record has.
        coordinates: Arrays of the source, such as `id`.
    """

    key: Key
    rank: int
    attempt: int | None
    addresses: list[Address] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    present: list[list[int]] = field(default_factory=list)
    present_of: list[int] = field(default_factory=list)
    coordinates: dict[str, npt.NDArray[Any]] = field(default_factory=dict)


def group_records(
    origin: Origin, key: Key, addresses: Sequence[Address], layers: frozenset[str] | None
) -> list[Group]:
    """Put records of one rank, measure and source into groups.

    Args:
        origin: The run.
        key: The measure and source.
        addresses: The records, in order of their steps.
        layers: Only these layers, and what belongs to none; None takes all.
    """
    if not addresses:
        return []
    rank = addresses[0][1]
    last = origin.tables(addresses[-1][:2], key[1])
    groups: dict[int | None, Group] = {}
    for address in addresses:
        attempt = address[0]
        own = origin.tables((attempt, rank), key[1])
        apart = None if _agree(own, last) else attempt
        if apart not in groups:
            content = last if apart is None else own
            coordinates = {} if content is None else content.readable
            groups[apart] = Group(key, rank, apart, coordinates=coordinates)
        groups[apart].addresses.append(address)
    for group in groups.values():
        _find_columns(origin, group, layers)
    return [group for group in groups.values() if group.addresses]


def _agree(own: TableContent | None, last: TableContent | None) -> bool:
    """Tell whether two tables name the same examples in the same order, if both name any."""
    if own is None or last is None or own is last:
        return True
    mine, theirs = own.arrays.get("id"), last.arrays.get("id")
    if mine is None or theirs is None:
        return True
    if isinstance(mine, str) or isinstance(theirs, str):
        return False
    return np.array_equal(mine, theirs)


def _find_columns(origin: Origin, group: Group, layers: frozenset[str] | None) -> None:
    """Look through the records of a group; leave out those of which nothing is wanted."""
    columns: dict[tuple[StreamKey, str], Column] = {}
    sets: dict[tuple[tuple[StreamKey, str], ...], int] = {}
    kept: list[Address] = []
    parts: dict[Part, None] = {}
    for address in group.addresses:
        record = origin.record(address)
        streams = record.part.streams(record.row)
        wanted = {
            key: stream
            for key, stream in streams.items()
            if layers is None or key[0] is None or key[0] in layers
        }
        if streams and not wanted:
            continue
        parts[record.part] = None
        for key, stream in wanted.items():
            name = (key, stream.dtype)
            if name not in columns:
                columns[name] = Column(key, stream)
            columns[name].add(len(kept), stream)
        present = tuple((key, stream.dtype) for key, stream in wanted.items())
        group.present_of.append(sets.setdefault(present, len(sets)))
        kept.append(address)
    keys = dict.fromkeys(key for part in parts for key in part.stream_keys())
    order = {key: place for place, key in enumerate(keys)}
    names = sorted(columns, key=lambda name: order[name[0]])
    places = {name: place for place, name in enumerate(names)}
    group.addresses = kept
    group.columns = [columns[name] for name in names]
    group.present = [[places[name] for name in present] for present in sets]
