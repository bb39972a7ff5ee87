"""Scanning a journal: its valid frames, and as damage what lies between them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from zlib_ng.zlib_ng import crc32

from sonde.log.format.damage import Damage
from sonde.log.format.frames import (
    FILE_HEADER_BYTES,
    FRAME_MAGIC,
    Frame,
    describe,
    is_cut_off,
    read_file_header,
    read_frame,
)
from sonde.log.format.payload import Layout
from sonde.log.format.positioned import read_at

_CHUNK_BYTES = 4 << 20
# Of small records many are read at once; of large ones nothing is read twice.
_WINDOW_BYTES = 64 << 10
_SEARCHED_BYTES = 256 << 20


class _Window:
    """Reads a journal from front to back, a stretch at a time.

    Args:
        fd: The open journal.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._start = 0
        self._bytes = memoryview(b"")

    def read(self, num_bytes: int, offset: int) -> memoryview:
        """Return the bytes at an offset; fewer at the end of the file."""
        begin = offset - self._start
        if not 0 <= begin <= len(self._bytes) - num_bytes:
            self._bytes = memoryview(read_at(self.fd, max(num_bytes, _WINDOW_BYTES), offset))
            self._start, begin = offset, 0
        return self._bytes[begin : begin + num_bytes]


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
            self.token, self.first_sequence, damage = read_file_header(fd, self._name, size)
            self._expected = self.first_sequence
            if damage is not None:
                yield damage
                if damage.is_tail:
                    return
            self._offset = FILE_HEADER_BYTES
        window = _Window(fd)
        while self._offset < size:
            item = self._next(window, size)
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

    def _next(self, window: _Window, size: int) -> Frame | Damage:
        """Read the frame or damage at the offset, and go on behind it unless it is the tail."""
        self._start = self._offset
        parsed = read_frame(window.read, self._start, size)
        if isinstance(parsed, str):
            following = _find_frame(window.fd, self._start + 1, size)
            if following is None:
                after = f", after {describe(self._last)}" if self._last is not None else ""
                cut_off = is_cut_off(window.read, self._start, size)
                return self._damage(parsed + after, size, is_tail=True, is_cut_off=cut_off)
            self._offset, frame = following
            return self._damage(f"{parsed}, before {describe(frame)}", self._offset)
        frame, token, end = parsed
        if self.token is None:
            self.token = token
        is_checked = self._verify or frame.kind == "table"
        if is_checked and not _payload_is_valid(window, frame):
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

    def _damage(
        self, reason: str, end: int, *, is_tail: bool = False, is_cut_off: bool = False
    ) -> Damage:
        start = self._start
        return Damage(self._name, start, end - start, reason, is_tail, is_cut_off)


def _payload_is_valid(window: _Window, frame: Frame) -> bool:
    actual = _slot_checksums(window, frame.payload_offset, frame.layout)
    return all(a == b for a, b in zip(actual, frame.checksums.tolist(), strict=True))


def _slot_checksums(window: _Window, payload_offset: int, layout: Layout) -> Iterator[int]:
    """Yield the checksum of each array as it stands in the file, with the zeros behind it."""
    for start, end in layout.slots:
        checksum = 0
        while start < end:
            piece = window.read(min(_CHUNK_BYTES, end - start), payload_offset + start)
            if not piece:
                break  # The file became shorter.
            checksum = crc32(piece, checksum)
            start += len(piece)
        yield checksum


def _find_frame(fd: int, offset: int, size: int) -> tuple[int, Frame] | None:
    """Return where the next frame with a valid header and a whole payload starts, and the frame.

    What looks like the begin of frames over and over, each of which states that it is long, would
    be read over and over: no more is read than the file would need many times over.
    """
    allowed = _SEARCHED_BYTES + 8 * size

    def read(num_bytes: int, at: int) -> bytes:
        nonlocal allowed
        allowed -= num_bytes
        return read_at(fd, num_bytes, at)

    while offset < size and allowed > 0:
        chunk = read_at(fd, _CHUNK_BYTES, offset)
        position = chunk.find(FRAME_MAGIC)
        while position >= 0 and allowed > 0:
            parsed = read_frame(read, offset + position, size)
            if not isinstance(parsed, str):
                return offset + position, parsed[0]
            position = chunk.find(FRAME_MAGIC, position + 1)
        if offset + len(chunk) >= size:
            return None
        offset += len(chunk) - len(FRAME_MAGIC) + 1
    return None
