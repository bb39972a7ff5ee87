"""Frames: the CRC-checked unit a journal is made of.

A journal is a file header followed by frames. A frame is a fixed part, a JSON index and a payload
of array bytes; both are padded to 8 bytes. One checksum covers the fixed part and the index, a
second one, stored in the fixed part, covers the payload. Every frame repeats the token of its
writer, so a frame of another journal is never taken for one of this.

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
import zlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import FormatError, InvalidInputError

FORMAT_VERSION = 1

_FILE_MAGIC = b"SONDEJNL"
_FILE = struct.Struct("<8sIIQQII")  # magic, version, reserved, token, first sequence, reserved, crc
FILE_HEADER_BYTES = _FILE.size
_FRAME_MAGIC = b"\x93SONDE\r\n"
_FIXED = struct.Struct("<8sIIQQQqII")  # magic, index bytes, reserved, token, payload bytes, …
_CHUNK_BYTES = 4 << 20

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
    """

    field: str
    values: npt.NDArray[Any]
    dims: tuple[str, ...]
    layer: str | None = None
    dtype: str | None = None


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


@dataclass(frozen=True)
class Frame:
    """A frame that was read and whose checksums hold.

    Attributes:
        kind: One of the frame kinds.
        step: The step it speaks of, or -1.
        sequence: Its number in the order of writing, counted over all journals of one writer.
        body: The JSON index without its arrays.
        arrays: The arrays of the payload.
        payload_offset: Where the payload starts in the file, in bytes.
    """

    kind: str
    step: int
    sequence: int
    body: dict[str, Any]
    arrays: tuple[ArrayEntry, ...]
    payload_offset: int


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


def link_name(name: str) -> str:
    """Make a link name of any string: HDF5 forbids `/` and gives `.` a meaning of its own."""
    kept = "".join(
        f"%{ord(char):02X}" if char in "%/:" or ord(char) < 32 else char for char in name
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


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a payload lie.

    Attributes:
        entries: One per array.
        num_bytes: The size of the payload.
        index: The entries as they stand in the index of a frame.
        is_gapless: True if every array fills its 8-byte slots.
    """

    entries: tuple[ArrayEntry, ...]
    num_bytes: int
    index: str
    is_gapless: bool


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
    index = [[e.layer, e.field, e.dtype, e.shape, e.dims, e.offset] for e in entries]
    is_gapless = all(entry.num_bytes % 8 == 0 for entry in entries)
    return Layout(tuple(entries), offset, json.dumps(index, separators=(",", ":")), is_gapless)


def fill_payload(
    payload: npt.NDArray[np.uint8], layout: Layout, arrays: Sequence[LogArray]
) -> None:
    """Copy arrays into a payload laid out by `lay_out`; the only copy on the training thread."""
    flat = _flat_bytes(layout, arrays)
    if flat:
        np.concatenate(flat, out=payload)
        return
    end = 0
    for entry, array in zip(layout.entries, arrays, strict=True):
        payload[end : entry.offset] = 0
        end = entry.offset + entry.num_bytes
        target = payload[entry.offset : end].view(storage_dtype(entry.dtype)).reshape(entry.shape)
        np.copyto(target, array.values)
    payload[end:] = 0


def _flat_bytes(layout: Layout, arrays: Sequence[LogArray]) -> list[npt.NDArray[np.uint8]]:
    """Return the arrays as bytes, if they can be copied in one go; otherwise nothing."""
    if not layout.is_gapless or sys.byteorder != "little":
        return []
    values = [array.values for array in arrays]
    if not all([v.flags.c_contiguous and v.dtype.isnative for v in values]):
        return []
    return [v.reshape(-1).view(np.uint8) for v in values]


def encode_index(kind: str, body: dict[str, Any], layout: Layout) -> bytes:
    """Encode the JSON index of a frame, padded with spaces to 8 bytes."""
    head = json.dumps({"kind": kind, **body}, separators=(",", ":"))
    encoded = f'{head[:-1]},"arrays":{layout.index}}}'.encode()
    return encoded.ljust(_padded(len(encoded)))


def encode_header(
    index: bytes, payload: npt.NDArray[np.uint8], *, token: int, sequence: int, step: int
) -> bytes:
    """Encode the fixed part of a frame in front of its index, with both checksums."""
    fixed = _FIXED.pack(
        _FRAME_MAGIC,
        len(index),
        0,
        token,
        payload.nbytes,
        sequence,
        step,
        zlib.crc32(payload.data),
        0,
    )
    checksum = zlib.crc32(index, zlib.crc32(fixed[:-4]))
    return fixed[:-4] + struct.pack("<I", checksum) + index


def encode_file_header(token: int, first_sequence: int) -> bytes:
    """Encode the header a journal starts with."""
    head = _FILE.pack(_FILE_MAGIC, FORMAT_VERSION, 0, token, first_sequence, 0, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def scan_journal(fd: int, name: str) -> Iterator[Frame | Damage]:
    """Yield every valid frame of a journal, and what lies between them as damage.

    After damage the scan goes on at the next valid frame, so one flipped byte costs one record.

    Args:
        fd: The open journal.
        name: How damage reports name it.

    Yields:
        Frames in order of their sequence, and damage where it stands.

    Raises:
        FormatError: If the journal is of a newer format.
    """
    size = os.fstat(fd).st_size
    token, expected, damage = _read_file_header(fd, name, size)
    if damage is not None:
        yield damage
    offset = min(_FILE.size, size)
    last_sequence = -1
    while offset < size:
        parsed = _read_frame(fd, offset, size)
        if isinstance(parsed, str):
            following = _find_frame(fd, offset + 1, size)
            end = size if following is None else following
            yield Damage(name, offset, end - offset, parsed, is_tail=following is None)
            offset, expected = end, None
            continue
        frame, frame_token, end, payload_is_valid = parsed
        if token is None:
            token = frame_token
        problem = None
        if not payload_is_valid:
            problem = f"the payload of {describe(frame)} does not match its checksum"
        elif frame_token != token:
            problem = f"{describe(frame)} belongs to another journal"
        elif frame.sequence <= last_sequence:
            problem = f"{describe(frame)} is out of order"
        if problem is not None:
            yield Damage(name, offset, end - offset, problem)
            offset, expected = end, None
            continue
        if expected is not None and frame.sequence > expected:
            missing = f"frames {expected} to {frame.sequence - 1} are missing"
            yield Damage(name, offset, 0, f"{missing} before {describe(frame)}")
        last_sequence, expected = frame.sequence, frame.sequence + 1
        yield frame
        offset = end


def describe(frame: Frame) -> str:
    """Name a frame for people: `record 17 (activations, step 100)`."""
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
    head = os.pread(fd, _FILE.size, 0)
    if len(head) == _FILE.size:
        magic, version, _, token, first_sequence, _, checksum = _FILE.unpack(head)
        if magic == _FILE_MAGIC and zlib.crc32(head[:-4]) == checksum:
            if version > FORMAT_VERSION:
                raise FormatError(
                    f"{name} has log format {version}; this sonde reads up to {FORMAT_VERSION}. "
                    "Install a newer sonde."
                )
            return int(token), int(first_sequence), None
    is_tail = size <= _FILE.size
    reason = "the journal ends inside its header" if is_tail else "the file header is damaged"
    return None, None, Damage(name, 0, min(size, _FILE.size), reason, is_tail)


def _read_frame(fd: int, offset: int, size: int) -> tuple[Frame, int, int, bool] | str:
    """Read the frame at `offset`: (frame, token, end, payload is valid), or what is wrong."""
    fixed = os.pread(fd, _FIXED.size, offset)
    if len(fixed) < _FIXED.size:
        return "a record ends inside its header"
    magic, index_bytes, _, token, payload_bytes, sequence, step, payload_crc, header_crc = (
        _FIXED.unpack(fixed)
    )
    index_end = offset + _FIXED.size + index_bytes
    if magic != _FRAME_MAGIC or index_end > size:
        return "no valid record header"
    index = os.pread(fd, index_bytes, offset + _FIXED.size)
    if zlib.crc32(index, zlib.crc32(fixed[:-4])) != header_crc:
        return "a record header does not match its checksum"
    if index_end + payload_bytes > size:
        return f"record {sequence} ends inside its payload"
    body = json.loads(index)
    arrays = tuple(
        ArrayEntry(layer, field, dtype, tuple(shape), tuple(dims), start)
        for layer, field, dtype, shape, dims, start in body.pop("arrays")
    )
    frame = Frame(body.pop("kind"), step, sequence, body, arrays, index_end)
    is_valid = _checksum(fd, index_end, payload_bytes) == payload_crc
    return frame, token, index_end + payload_bytes, is_valid


def _checksum(fd: int, offset: int, num_bytes: int) -> int:
    checksum = 0
    end = offset + num_bytes
    while offset < end:
        chunk = os.pread(fd, min(_CHUNK_BYTES, end - offset), offset)
        if not chunk:
            return -1
        checksum = zlib.crc32(chunk, checksum)
        offset += len(chunk)
    return checksum


def _find_frame(fd: int, offset: int, size: int) -> int | None:
    """Return where the next frame with a valid header and a whole payload starts, if any."""
    while offset < size:
        chunk = os.pread(fd, _CHUNK_BYTES, offset)
        position = chunk.find(_FRAME_MAGIC)
        while position >= 0:
            if not isinstance(_read_frame(fd, offset + position, size), str):
                return offset + position
            position = chunk.find(_FRAME_MAGIC, position + 1)
        if offset + len(chunk) >= size:
            return None
        offset += len(chunk) - len(_FRAME_MAGIC) + 1
    return None
