"""The payload of a frame: arrays, each on an 8-byte boundary, and a layout that says where."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sonde.exceptions import InvalidInputError

_LARGE_BYTES = 64 << 10

_NUMPY_DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()
)
_DTYPES = _NUMPY_DTYPES | {"bfloat16"}


@dataclass(frozen=True)
class LogArray:
    """One array of a record or table, named by layer and field.

    Attributes:
        field: What the array is, such as `gram` or `logits`.
        values: The array. A bfloat16 array is given as its raw bits, in uint16.
        dims: One name per axis, such as `("example", "other_example")`.
        layer: The layer it belongs to, or None.
        dtype: The element type, when it is not the one of `values` (`bfloat16`).
        is_owned: Nobody changes `values` any more, so that the log need not copy them.
    """

    field: str
    values: npt.NDArray[Any]
    dims: tuple[str, ...]
    layer: str | None = None
    dtype: str | None = None
    is_owned: bool = False


@dataclass(frozen=True)
class ArrayEntry:
    """Where an array lies in a payload, and what it is."""

    layer: str | None
    field: str
    dtype: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """The size of the array in bytes."""
        return math.prod(self.shape) * storage_dtype(self.dtype).itemsize


class Layout:
    """Where the arrays of a payload lie; shared by all frames whose arrays have the same layout.

    Args:
        entries: One per array.
        is_native: The arrays to be copied are in the byte order of this machine.

    Attributes:
        entries: One per array.
        num_bytes: The size of the payload.
        array_bytes: The size of the arrays alone.
        index: The entries as they stand in the index of a frame.
        is_joinable: The payload is the arrays as they are in memory, with nothing between them.
        slots: Where each array starts and, with the zeros behind it, ends.
        columns: The position of each array among the entries, by layer and field.
    """

    def __init__(self, entries: tuple[ArrayEntry, ...], *, is_native: bool = False) -> None:
        self.entries = entries
        sizes = [entry.num_bytes for entry in entries]
        ends = [padded(entry.offset + n) for entry, n in zip(entries, sizes, strict=True)]
        self.num_bytes = max(ends, default=0)
        self.array_bytes = sum(sizes)
        items = [[e.layer, e.field, e.dtype, e.shape, e.dims, e.offset] for e in entries]
        self.index = json.dumps(items, separators=(",", ":"))
        self.is_joinable = (
            is_native and sys.byteorder == "little" and all(size % 8 == 0 for size in sizes)
        )
        self.slots = [(entry.offset, end) for entry, end in zip(entries, ends, strict=True)]
        self.columns = {(e.layer, e.field): i for i, e in enumerate(entries)}

    def find(self, layer: str | None, field: str) -> ArrayEntry | None:
        """Return the entry of an array, if there is one."""
        column = self.columns.get((layer, field))
        return None if column is None else self.entries[column]


def is_dtype(name: str) -> bool:
    """Tell whether the log has elements of the named type."""
    return name in _DTYPES


@lru_cache(maxsize=32)
def storage_dtype(name: str) -> np.dtype[Any]:
    """Return the little-endian NumPy type that holds the elements of the named type."""
    return np.dtype("uint16" if name == "bfloat16" else name).newbyteorder("<")


def from_storage(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return what a reader sees: bfloat16 bits become float32, exactly; others stay as they are."""
    if dtype != "bfloat16":
        return values
    # Without asarray, an array without axes would become a scalar.
    return np.asarray(values.astype(np.uint32) << 16).view(np.float32)


def slot_checksum(raw: bytes | memoryview) -> int:
    """Return the checksum of an array: of its bytes and of zeros up to a multiple of 8."""
    checksum: int = crc32(raw)
    missing = -len(raw) % 8
    return crc32(b"\0" * missing, checksum) if missing else checksum


def padded(num_bytes: int) -> int:
    """Round a size up to a multiple of 8."""
    return -(-num_bytes // 8) * 8


def check_arrays(arrays: Sequence[LogArray]) -> None:
    """Refuse arrays the log cannot hold.

    Raises:
        InvalidInputError: If a type is not storable, or the names do not fit the axes.
    """
    seen: set[tuple[str | None, str]] = set()
    for array in arrays:
        dtype = array.dtype or array.values.dtype.name
        label = f"{array.layer}:{array.field}" if array.layer is not None else array.field
        if dtype not in _DTYPES:
            raise InvalidInputError(
                f"array '{label}' has dtype {dtype}, which the log cannot store; "
                f"convert it to one of: {', '.join(sorted(_DTYPES))}"
            )
        expected = storage_dtype(dtype).name
        if array.values.dtype.name != expected:
            raise InvalidInputError(
                f"array '{label}' is to be stored as {dtype} but has dtype "
                f"{array.values.dtype.name}; expected {expected}"
            )
        if len(array.dims) != array.values.ndim:
            raise InvalidInputError(
                f"array '{label}' has shape {array.values.shape} but dims {array.dims}; "
                "expected one name per axis"
            )
        if (array.layer, array.field) in seen:
            raise InvalidInputError(f"array '{label}' is given twice in one record")
        seen.add((array.layer, array.field))


# A measure writes arrays of the same names and shapes over and over.
_layouts: dict[Hashable, Layout] = {}
_MAX_LAYOUTS = 64


def lay_out(arrays: Sequence[LogArray]) -> Layout:
    """Place arrays one behind the other, each on an 8-byte boundary.

    Raises:
        InvalidInputError: If the log cannot hold one of them.
    """
    key = tuple(
        [(a.layer, a.field, a.dtype, a.values.dtype, a.values.shape, tuple(a.dims)) for a in arrays]
    )
    layout = _layouts.get(key)
    if layout is None:
        check_arrays(arrays)
        if len(_layouts) >= _MAX_LAYOUTS:
            _layouts.clear()
        layout = _layouts[key] = _new_layout(arrays)
    return layout


def _new_layout(arrays: Sequence[LogArray]) -> Layout:
    entries: list[ArrayEntry] = []
    offset = 0
    for array in arrays:
        dtype = array.dtype or array.values.dtype.name
        entry = ArrayEntry(
            array.layer, array.field, dtype, array.values.shape, tuple(array.dims), offset
        )
        entries.append(entry)
        offset = padded(offset + entry.num_bytes)
    return Layout(tuple(entries), is_native=all(array.values.dtype.isnative for array in arrays))


def fill_payload(
    payload: npt.NDArray[np.uint8], layout: Layout, arrays: Sequence[LogArray]
) -> None:
    """Copy arrays into a payload laid out by `lay_out`; the only copy on the training thread."""
    if layout.is_joinable and arrays:
        try:
            flat = [np.frombuffer(array.values, np.uint8) for array in arrays]
        except ValueError:
            pass  # One is not contiguous.
        else:
            np.concatenate(flat, out=payload)
            return
    end = 0
    for entry, array in zip(layout.entries, arrays, strict=True):
        payload[end : entry.offset] = 0
        end = entry.offset + entry.num_bytes
        target = payload[entry.offset : end].view(storage_dtype(entry.dtype)).reshape(entry.shape)
        np.copyto(target, array.values)
    payload[end:] = 0


def view_payload(layout: Layout, arrays: Sequence[LogArray]) -> list[memoryview] | None:
    """Return the arrays themselves as a payload; None where they have to be copied.

    Small ones are copied faster than they are written one by one.
    """
    if not layout.is_joinable or layout.num_bytes < _LARGE_BYTES * len(arrays):
        return None
    if not all(array.is_owned for array in arrays):
        return None
    return [array.values.reshape(-1).view(np.uint8).data for array in arrays]


def wider(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which readers hand out values of a type: float32 for float16."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def widened(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array in the type in which readers hand it out; a copy only if that differs."""
    return values.astype(wider(values.dtype), copy=False)
