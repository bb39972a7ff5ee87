"""Scanning a journal: its valid frames, and as damage what lies between them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from zlib_ng.zlib_ng import crc32

from .damage import Damage
from .frames import FILE_HEADER_BYTES, FRAME_MAGIC, Frame, describe, read_file_header, read_frame
from .payload import Layout
from .positioned import read_at

_CHUNK_BYTES = 4 << 20


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
        parsed = read_frame(fd, self._start, size)
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
        position = chunk.find(FRAME_MAGIC)
        while position >= 0:
            parsed = read_frame(fd, offset + position, size)
            if not isinstance(parsed, str):
                return offset + position, parsed[0]
            position = chunk.find(FRAME_MAGIC, position + 1)
        if offset + len(chunk) >= size:
            return None
        offset += len(chunk) - len(FRAME_MAGIC) + 1
    return None
