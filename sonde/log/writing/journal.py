"""The open end of a log: one journal file, appended to by one thread, without libhdf5."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sonde.log.format.frames import encode_file_header, encode_header
from sonde.log.format.payload import Layout
from sonde.log.format.positioned import reserve, write_at

_LARGE_BYTES = 1 << 20


class Journal:
    """A journal open for appending.

    Every append is one positioned write of header, index and payload. When a write fails, the file
    is cut back to its last whole frame, so a later append continues at the same offset.
    """

    def __init__(self, folder: Path, first_sequence: int, token: int) -> None:
        """Create the journal; the number of its first frame is its name.

        Raises:
            OSError: If the file exists or cannot be written.
        """
        self.path = folder / f"{first_sequence:012d}.journal"
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        self._fd = os.open(self.path, flags, 0o644)
        self._token = token
        self._first_sequence = self.next_sequence = first_sequence
        self.num_bytes = 0
        try:
            self._write([memoryview(encode_file_header(token, first_sequence))])
        except OSError:
            os.close(self._fd)
            self.path.unlink(missing_ok=True)
            raise

    @property
    def num_frames(self) -> int:
        """How many frames were appended."""
        return self.next_sequence - self._first_sequence

    def append(self, index: bytes, layout: Layout, payload: Sequence[memoryview], step: int) -> int:
        """Append one frame, as `encode_header` takes it, and return its sequence number.

        Raises:
            OSError: If the frame could not be written; the file is as it was before.
        """
        header = encode_header(
            index, layout, payload, token=self._token, sequence=self.next_sequence, step=step
        )
        if layout.num_bytes >= _LARGE_BYTES:
            reserve(self._fd, len(header) + layout.num_bytes, self.num_bytes)
        self._write([memoryview(header), *payload])
        self.next_sequence += 1
        return self.next_sequence - 1

    def close(self) -> None:
        """Close the file; what was appended stays."""
        os.close(self._fd)

    def _write(self, buffers: list[memoryview]) -> None:
        try:
            end = write_at(self._fd, buffers, self.num_bytes)
            # A deleted file takes every write without an error and loses all of them.
            if os.fstat(self._fd).st_nlink == 0:
                raise FileNotFoundError(f"{self.path} was deleted")
        except OSError:
            self._cut_back()
            raise
        self.num_bytes = end

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self.num_bytes)
        except OSError:
            # The torn frame stays behind the last whole one, and the next append overwrites it.
            return
