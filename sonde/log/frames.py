"""Frames: the CRC-checked unit a journal is made of.

A journal is a file header followed by frames. A frame is a fixed part, an index in two lines of
JSON, a checksum for each array, and a payload of array bytes; each is padded to 8 bytes. One
checksum covers all before the payload. The checksum of an array goes with it into the segment, so
what was wrong once is never taken for right. Every frame repeats the token of its writer, so a
frame of another journal is never taken for one of this.

Frame kinds: `record` (what one measure wrote for one step), `table` (arrays that do not depend on
the step, such as the ids of a probe), `attempt` (who writes), `note` (an event), `gap` (records
that were dropped) and `end` (the writer closed). `attempt` and the tables stand at the head of
every journal.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sonde.exceptions import FormatError, InvalidInputError

from .positioned import read_at

FORMAT_VERSION = 1

_FILE_MAGIC = b"SONDEJNL"
_FILE = struct.Struct("<8sIIQQII")  # magic, version, reserved, token, first sequence, reserved, crc
FILE_HEADER_BYTES = _FILE.size
_FRAME_MAGIC = b"\x93SONDE\r\n"
# magic; bytes of index, number of arrays; token, payload bytes, sequence, step; reserved, crc
_FIXED = struct.Struct("<8sIIQQQqII")
_CHUNK_BYTES = 4 << 20
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
        ends = [_padded(entry.offset + n) for entry, n in zip(entries, sizes, strict=True)]
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


@dataclass(frozen=True)
class Frame:
    """A frame that was read and whose header is valid.

    Attributes:
        kind: One of the frame kinds.
        step: The step it speaks of, or -1.
        sequence: Its number in the order of writing, counted over all journals of one writer.
        body: The first line of the index.
        layout: The arrays of the payload.
        checksums: One per array, uint32, over its bytes and the zeros behind them.
        payload_offset: Where the payload starts in the file, in bytes.
    """

    kind: str
    step: int
    sequence: int
    body: dict[str, Any]
    layout: Layout
    checksums: npt.NDArray[np.uint32]
    payload_offset: int

    @property
    def arrays(self) -> tuple[ArrayEntry, ...]:
        """The arrays of the payload."""
        return self.layout.entries


@dataclass(frozen=True)
class Damage:
    """Bytes of a log file that hold no valid record.

    Attributes:
        path: The file, relative to the run directory.
        offset: Where the damage starts, in bytes.
        num_bytes: How many bytes could not be read.
        reason: What is wrong.
        is_tail: True at the very end of a journal, where a record that was still being written when
            its process was killed looks the same as damage.
    """

    path: str
    offset: int
    num_bytes: int
    reason: str
    is_tail: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} ({self.num_bytes} bytes at byte {self.offset})"


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
    return crc32(b"\0" * (-len(raw) % 8), crc32(raw))


def link_name(name: str) -> str:
    """Make a link name of any string.

    HDF5 forbids `/`, gives `.` a meaning of its own, and takes only what UTF-8 can encode.
    """
    kept = "".join(
        f"%{ord(char):02X}" if char in "%/:" or char < " " or "\ud800" <= char < "\ue000" else char
        for char in name
    )
    return {"": "%", ".": "%2E", "..": "%2E%2E"}.get(kept, kept)


def stream_name(layer: str | None, field: str) -> str:
    """Name a stream, in a segment and in xarray: `layer:field`, or `field` without a layer."""
    return link_name(field) if layer is None else f"{link_name(layer)}:{link_name(field)}"


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
        offset = _padded(offset + entry.num_bytes)
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


def encode_index(kind: str, body: dict[str, Any], layout: Layout) -> bytes:
    """Encode the index of a frame, two lines of JSON padded with spaces to 8 bytes."""
    head = json.dumps({"kind": kind, **body}, separators=(",", ":"))
    encoded = f"{head}\n{layout.index}".encode()
    return encoded.ljust(_padded(len(encoded)))


def encode_header(
    index: bytes,
    layout: Layout,
    payload: Sequence[memoryview],
    *,
    token: int,
    sequence: int,
    step: int,
) -> bytes:
    """Encode all of a frame that stands before its payload.

    Args:
        index: Its index, encoded.
        layout: The arrays of the payload.
        payload: The payload in one piece, or each of its arrays, none of which needs padding.
        token: The journal's.
        sequence: The number of the frame.
        step: The step it speaks of, or -1.
    """
    num_arrays = len(layout.entries)
    fixed = _FIXED.pack(
        _FRAME_MAGIC, len(index), num_arrays, token, layout.num_bytes, sequence, step, 0, 0
    )[:-4]
    slots = payload
    if len(payload) != num_arrays:
        slots = [payload[0][start:end] for start, end in layout.slots]
    checksums = [crc32(slot) for slot in slots]
    table = struct.pack(f"<{num_arrays}I", *checksums).ljust(_padded(4 * num_arrays), b"\0")
    rest = index + table
    return fixed + struct.pack("<I", crc32(rest, crc32(fixed))) + rest


def encode_file_header(token: int, first_sequence: int) -> bytes:
    """Encode the header a journal starts with."""
    head = _FILE.pack(_FILE_MAGIC, FORMAT_VERSION, 0, token, first_sequence, 0, 0)[:-4]
    return head + struct.pack("<I", crc32(head))


def scan_journal(fd: int, name: str, *, verify: bool = True) -> Iterator[Frame | Damage]:
    """Yield every valid frame of a journal, and what lies between them as damage; see `Scan`.

    Args:
        fd: The open journal.
        name: How damage reports name it.
        verify: Check all arrays. Without it, those of records are checked only if the journal is
            damaged elsewhere.
    """
    if not verify:
        items = list(Scan(name, verify=False).advance(fd))
        if not any(isinstance(item, Damage) for item in items):
            return iter(items)
    return Scan(name).advance(fd)


class Scan:
    """A reading of one journal, which can go on where the file has grown.

    After damage it goes on at the next valid frame, so one flipped byte costs one record.

    Args:
        name: How damage reports name the journal.
        verify: Check the arrays of records too. Those of tables are checked in any case, as a
            segment does not take over their checksums.

    Attributes:
        token: The token of the writer, once it is known.
        first_sequence: The number of the first frame, as the file header states it.
    """

    def __init__(self, name: str, *, verify: bool = True) -> None:
        self._name = name
        self._verify = verify
        self.token: int | None = None
        self.first_sequence: int | None = None
        self._offset = 0
        self._expected: int | None = None  # The next sequence, unless damage stands before it.
        self._last: Frame | None = None  # The last valid one.

    def advance(self, fd: int) -> Iterator[Frame | Damage]:
        """Yield what was not yielded before.

        What follows the last valid frame may be a record on its way: it is yielded as damage with
        `is_tail`, and read again by the next call.

        Args:
            fd: The open journal.

        Yields:
            Frames in order of their sequence, and damage where it stands.

        Raises:
            FormatError: If the journal is of a newer format.
        """
        size = os.fstat(fd).st_size
        if self._offset == 0:
            self.token, self.first_sequence, damage = _read_file_header(fd, self._name, size)
            self._expected = self.first_sequence
            if damage is not None:
                yield damage
                if damage.is_tail:
                    return
            self._offset = _FILE.size
        while self._offset < size:
            item = self._next(fd, size)
            if isinstance(item, Frame):
                if self._expected is not None and item.sequence > self._expected:
                    missing = f"frames {self._expected} to {item.sequence - 1} are missing"
                    reason = f"{missing} before {describe(item)}"
                    yield Damage(self._name, self._start, 0, reason)
                self._last, self._expected = item, item.sequence + 1
            yield item
            if isinstance(item, Damage):
                if item.is_tail:
                    return
                self._expected = None

    def _next(self, fd: int, size: int) -> Frame | Damage:
        """Read the frame or damage at the offset, and go on behind it unless it is the tail."""
        self._start = self._offset
        parsed = _read_frame(fd, self._start, size)
        if isinstance(parsed, str):
            following = _find_frame(fd, self._start + 1, size)
            if following is None:
                after = f", after {describe(self._last)}" if self._last is not None else ""
                return self._damage(parsed + after, size, is_tail=True)
            self._offset, frame = following
            return self._damage(f"{parsed}, before {describe(frame)}", self._offset)
        frame, token, end = parsed
        if self.token is None:
            self.token = token
        is_checked = self._verify or frame.kind == "table"
        if is_checked and not _payload_is_valid(fd, frame):
            # Of a record on its way the header may be there first.
            is_tail = end == size
            self._offset = self._start if is_tail else end
            problem = f"the payload of {describe(frame)} does not match its checksum"
            return self._damage(problem, end, is_tail=is_tail)
        self._offset = end
        if token != self.token:
            return self._damage(f"{describe(frame)} belongs to another journal", end)
        if self._last is not None and frame.sequence <= self._last.sequence:
            return self._damage(f"{describe(frame)} is out of order", end)
        return frame

    def _damage(self, reason: str, end: int, *, is_tail: bool = False) -> Damage:
        return Damage(self._name, self._start, end - self._start, reason, is_tail)


def describe(frame: Frame) -> str:
    """Name a frame for people: `record 17 (activations, step 100)`, `table 1 (probe)`."""
    if frame.kind == "table":
        return f"table {frame.sequence} ({frame.body['name']})"
    measure = frame.body.get("measure")
    about = f"{measure}, step {frame.step}" if measure else f"step {frame.step}"
    return f"{frame.kind} {frame.sequence} ({about})"


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // 8) * 8


def _read_file_header(
    fd: int, name: str, size: int
) -> tuple[int | None, int | None, Damage | None]:
    """Return (token, first sequence, damage) of a journal; None where it cannot be read.

    Raises:
        FormatError: If the journal is of a newer format.
    """
    head = read_at(fd, _FILE.size, 0)
    if len(head) == _FILE.size:
        magic, version, _, token, first_sequence, _, checksum = _FILE.unpack(head)
        if magic == _FILE_MAGIC and crc32(head[:-4]) == checksum:
            if version > FORMAT_VERSION:
                raise FormatError(
                    f"{name} has log format {version}; this sonde reads up to {FORMAT_VERSION}. "
                    "Install a newer sonde."
                )
            return int(token), int(first_sequence), None
    is_tail = size <= _FILE.size
    reason = "the journal ends inside its header" if is_tail else "the file header is damaged"
    return None, None, Damage(name, 0, min(size, _FILE.size), reason, is_tail)


def _read_frame(fd: int, offset: int, size: int) -> tuple[Frame, int, int] | str:
    """Read the frame at `offset` but not its payload: (frame, token, end), or what is wrong."""
    fixed = read_at(fd, _FIXED.size, offset)
    if len(fixed) < _FIXED.size:
        return "a record ends inside its header"
    magic, index_bytes, num_arrays, token, payload_bytes, sequence, step, _, header_crc = (
        _FIXED.unpack(fixed)
    )
    rest_bytes = index_bytes + _padded(4 * num_arrays)
    payload_offset = offset + _FIXED.size + rest_bytes
    if magic != _FRAME_MAGIC or payload_offset > size:
        return "no valid record header"
    rest = read_at(fd, rest_bytes, offset + _FIXED.size)
    if crc32(rest, crc32(fixed[:-4])) != header_crc:
        return "a record header does not match its checksum"
    if payload_offset + payload_bytes > size:
        return f"record {sequence} ends inside its payload"
    head, _, arrays = rest[:index_bytes].partition(b"\n")
    body = json.loads(head)
    kind = body.pop("kind")
    if kind == "attempt":
        body["token"] = f"{token:016x}"  # In a segment too, this tells whose frames they are.
    layout = _parse_layout(arrays.rstrip())
    checksums = np.frombuffer(rest, "<u4", num_arrays, index_bytes)
    frame = Frame(kind, step, sequence, body, layout, checksums, payload_offset)
    return frame, token, payload_offset + payload_bytes


@lru_cache(maxsize=_MAX_LAYOUTS)
def _parse_layout(arrays: bytes) -> Layout:
    return Layout(
        tuple(
            ArrayEntry(layer, field, dtype, tuple(shape), tuple(dims), start)
            for layer, field, dtype, shape, dims, start in json.loads(arrays)
        )
    )


def _payload_is_valid(fd: int, frame: Frame) -> bool:
    actual = _slot_checksums(fd, frame.payload_offset, frame.layout)
    return all(a == b for a, b in zip(actual, frame.checksums.tolist(), strict=True))


def _slot_checksums(fd: int, payload_offset: int, layout: Layout) -> Iterator[int]:
    """Yield the checksum of each array as it stands in the file, with the zeros behind it."""
    window, window_start = memoryview(b""), 0
    for start, end in layout.slots:
        checksum = 0
        while start < end:
            if not window_start <= start < window_start + len(window):
                window = memoryview(read_at(fd, _CHUNK_BYTES, payload_offset + start))
                window_start = start
                if not window:
                    break  # The file became shorter.
            piece = window[start - window_start : end - window_start]
            checksum = crc32(piece, checksum)
            start += len(piece)
        yield checksum


def _find_frame(fd: int, offset: int, size: int) -> tuple[int, Frame] | None:
    """Return where the next frame with a valid header and a whole payload starts, and the frame."""
    while offset < size:
        chunk = read_at(fd, _CHUNK_BYTES, offset)
        position = chunk.find(_FRAME_MAGIC)
        while position >= 0:
            parsed = _read_frame(fd, offset + position, size)
            if not isinstance(parsed, str):
                return offset + position, parsed[0]
            position = chunk.find(_FRAME_MAGIC, position + 1)
        if offset + len(chunk) >= size:
            return None
        offset += len(chunk) - len(_FRAME_MAGIC) + 1
    return None
