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
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sonde.exceptions import DamageError, FormatError

from .checked import (
    COUNT,
    DETAILS,
    LIST,
    MAX_SECONDS,
    MAX_SEQUENCE,
    SECONDS,
    TEXT,
    check,
    check_event,
    check_ids,
    check_layout,
    parse,
)
from .damage import Damage
from .payload import ArrayEntry, Layout, padded
from .positioned import read_at

FORMAT_VERSION = 1

_FILE_MAGIC = b"SONDEJNL"
_FILE = struct.Struct("<8sIIQQII")  # magic, version, reserved, token, first sequence, reserved, crc
FILE_HEADER_BYTES = _FILE.size
FRAME_MAGIC = b"\x93SONDE\r\n"
# magic; bytes of index, number of arrays; token, payload bytes, sequence, step; reserved, crc
_FIXED = struct.Struct("<8sIIQQQqII")


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


def describe(frame: Frame) -> str:
    """Name a frame for people: `record 17 (activations, step 100)`, `table 1 (probe)`."""
    if frame.kind == "table":
        return f"table {frame.sequence} ({frame.body['name']})"
    measure = frame.body.get("measure")
    about = f"{measure}, step {frame.step}" if measure else f"step {frame.step}"
    return f"{frame.kind} {frame.sequence} ({about})"


def encode_index(kind: str, body: dict[str, Any], layout: Layout) -> bytes:
    """Encode the index of a frame, two lines of JSON padded with spaces to 8 bytes."""
    head = json.dumps({"kind": kind, **body}, separators=(",", ":"))
    encoded = f"{head}\n{layout.index}".encode()
    return encoded.ljust(padded(len(encoded)))


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
        FRAME_MAGIC, len(index), num_arrays, token, layout.num_bytes, sequence, step, 0, 0
    )[:-4]
    slots = payload
    if len(payload) != num_arrays:
        slots = [payload[0][start:end] for start, end in layout.slots]
    checksums = [crc32(slot) for slot in slots]
    table = struct.pack(f"<{num_arrays}I", *checksums).ljust(padded(4 * num_arrays), b"\0")
    rest = index + table
    return fixed + struct.pack("<I", crc32(rest, crc32(fixed))) + rest


def encode_file_header(token: int, first_sequence: int) -> bytes:
    """Encode the header a journal starts with."""
    head = _FILE.pack(_FILE_MAGIC, FORMAT_VERSION, 0, token, first_sequence, 0, 0)[:-4]
    return head + struct.pack("<I", crc32(head))


def read_file_header(fd: int, name: str, size: int) -> tuple[int | None, int | None, Damage | None]:
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
    is_cut_off = size < _FILE.size
    return None, None, Damage(name, 0, min(size, _FILE.size), reason, is_tail, is_cut_off)


def is_cut_off(read: Callable[[int, int], bytes | memoryview], offset: int, size: int) -> bool:
    """Tell whether the file ends within the frame at `offset`, as far as its bytes tell.

    A frame that is whole but for a damaged length is not cut off: its index is there to its end.

    Args:
        read: Returns so many bytes at an offset.
        offset: Where the frame begins.
        size: The size of the file.
    """
    fixed = bytes(read(min(_FIXED.size, size - offset), offset))
    if len(fixed) < _FIXED.size:
        return FRAME_MAGIC.startswith(fixed[: len(FRAME_MAGIC)])
    magic, index_bytes, num_arrays, _, payload_bytes, *_, header_crc = _FIXED.unpack(fixed)
    if magic != FRAME_MAGIC:
        return False
    rest_bytes = index_bytes + padded(4 * num_arrays)
    rest = bytes(read(min(rest_bytes, size - offset - _FIXED.size), offset + _FIXED.size))
    if len(rest) == rest_bytes:
        if crc32(rest, crc32(fixed[:-4])) != header_crc:
            return False
        return bool(offset + _FIXED.size + rest_bytes + payload_bytes > size)
    _, _, arrays = rest.partition(b"\n")
    try:
        entries, end = json.JSONDecoder().raw_decode(arrays.decode(errors="replace"))
    except (ValueError, RecursionError):
        return True  # The index is not there to its end.
    return isinstance(entries, list) and len(arrays) - end < padded(4 * len(entries))


def read_frame(
    read: Callable[[int, int], bytes | memoryview], offset: int, size: int
) -> tuple[Frame, int, int] | str:
    """Read the frame at `offset` but not its payload: (frame, token, end), or what is wrong.

    Args:
        read: Returns so many bytes at an offset; fewer at the end of the file.
        offset: Where the frame begins.
        size: The size of the file.
    """
    fixed = read(_FIXED.size, offset)
    if len(fixed) < _FIXED.size:
        return "a record ends inside its header"
    magic, index_bytes, num_arrays, token, payload_bytes, sequence, step, _, header_crc = (
        _FIXED.unpack(fixed)
    )
    rest_bytes = index_bytes + padded(4 * num_arrays)
    payload_offset = offset + _FIXED.size + rest_bytes
    if magic != FRAME_MAGIC or payload_offset > size:
        return "no valid record header"
    rest = bytes(read(rest_bytes, offset + _FIXED.size))
    if crc32(rest, crc32(fixed[:-4])) != header_crc:
        return "a record header does not match its checksum"
    if payload_offset + payload_bytes > size:
        return f"record {sequence} ends inside its payload"
    head, _, arrays = rest[:index_bytes].partition(b"\n")
    try:
        kind, body = _parse_head(head)
        layout = parse_layout(arrays.rstrip())
        if layout.num_bytes != payload_bytes or len(layout.entries) != num_arrays:
            return f"the arrays of record {sequence} are not as large as its header states"
        if kind == "table":
            for entry in layout.entries:
                check_ids(entry.field, entry.dtype, len(entry.shape))
    except DamageError as error:
        return f"the header of record {sequence} has no meaning: {error}"
    if sequence > MAX_SEQUENCE:
        return f"record {sequence} has a number that no record has"
    if kind == "attempt":
        body["token"] = f"{token:016x}"  # In a segment too, this tells whose frames they are.
    checksums = np.frombuffer(rest, "<u4", num_arrays, index_bytes)
    frame = Frame(kind, step, sequence, body, layout, checksums, payload_offset)
    return frame, token, payload_offset + payload_bytes


# With fewer brackets nothing is nested deeply.
_FEW_BRACKETS = 48
_RECORD = {"measure": TEXT, "source": TEXT, "attributes": DETAILS, "time": SECONDS}
_TABLE = {"name": TEXT, "attributes": DETAILS}


def _parse_head(head: bytes) -> tuple[str, dict[str, Any]]:
    """Return the kind of a frame and what it says.

    Raises:
        DamageError: If it says what no frame says.
    """
    body = parse(head)
    try:
        if body["kind"] == "record" and _is_plain_record(body, head):
            del body["kind"]
            return "record", body
    except (TypeError, KeyError):
        pass  # Said below.
    check(body, {"kind": TEXT})
    kind = body.pop("kind")
    if kind == "record":
        check({"attributes": {}, "time": None, **body}, _RECORD)
    elif kind == "table":
        check(body, _TABLE)
    else:
        check_event({**body, "kind": kind})
    return kind, body


def _is_plain_record(body: dict[str, Any], head: bytes) -> bool:
    """Tell, fast, whether a record says what nearly all of them say."""
    return (
        type(body["measure"]) is str
        and type(body["source"]) is str
        and type(body["attributes"]) is dict
        and type(body["time"]) is float
        and 0.0 <= body["time"] <= MAX_SECONDS
        and head.count(b"[") + head.count(b"{") < _FEW_BRACKETS
    )


@lru_cache(maxsize=64)
def parse_layout(arrays: bytes) -> Layout:
    """Read a layout from the entries that stand in the index of a frame.

    Raises:
        DamageError: If they are no arrays, one behind the other.
    """
    listed = parse(arrays)
    check({"arrays": listed}, {"arrays": LIST})
    entries, end = [], 0
    for item in listed:
        if not isinstance(item, list) or len(item) != 6:
            raise DamageError("an array is not described by its six values")
        layer, field, dtype, shape, dims, start = item
        check({"offset": start, "shape": shape}, {"offset": COUNT, "shape": LIST})
        check_layout(layer, field, dtype, shape, dims)
        entries.append(ArrayEntry(layer, field, dtype, tuple(shape), tuple(dims), start))
        if start % 8 or start < end:
            raise DamageError(f"array {len(entries)} lies where the one before it does")
        end = start + padded(entries[-1].num_bytes)
    layout = Layout(tuple(entries))
    if len(layout.columns) < len(entries):
        raise DamageError("two arrays have one name")
    return layout
