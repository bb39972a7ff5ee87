"""A file for libhdf5 to write, whose errors do not reach libhdf5.

Where a disk is full, libhdf5 fails again as it closes the file, keeps it open, and ends the process
with a segmentation fault at its exit. So the first error is kept here, what is written after it is
dropped, and libhdf5 closes its file in peace.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sonde.log.format.positioned import read_at, write_at

_SMALL_BYTES = 64 << 10
_MAX_WAITING_BYTES = 1 << 20


class Output:
    """A new file that h5py takes in place of a path, and that remembers what went wrong.

    Args:
        path: The file; it must not exist.

    Attributes:
        fd: The open file.

    Raises:
        OSError: If it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self.fd = os.open(path, flags, 0o666)
        self._position = 0
        self._size = 0
        self._error: BaseException | None = None
        # Pieces that follow each other are written at once: libhdf5 makes thousands of small ones.
        self._pieces: list[bytes] = []
        self._start = self._end = 0

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)

    def check(self) -> None:
        """Raise what went wrong, if anything did.

        Raises:
            OSError: If something could not be written.
        """
        self._write_pieces()
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position in bytes; return it."""
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self._size
        self._position = offset
        return offset

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def write(self, data: memoryview) -> int:
        """Write at the position, or drop it if something went wrong before."""
        piece = memoryview(data)
        num_bytes = piece.nbytes
        if self._position != self._end or self._end - self._start > _MAX_WAITING_BYTES:
            self._write_pieces()
            self._start = self._position
        if num_bytes > _SMALL_BYTES:
            self._write_pieces()
            self._try(lambda: write_at(self.fd, [piece], self._position))
            self._start = self._position + num_bytes
        else:
            self._pieces.append(piece.tobytes())  # A copy, as the memory is libhdf5's.
        self._position += num_bytes
        self._end = self._position
        self._size = max(self._size, self._end)
        return num_bytes

    def read(self, num_bytes: int) -> bytes:
        """Return the bytes at the position, zeros in place of what is not there."""
        self._write_pieces()
        data: list[bytes] = []
        self._try(lambda: data.append(read_at(self.fd, num_bytes, self._position)))
        self._position += num_bytes
        return b"".join(data).ljust(num_bytes, b"\0")

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer from the position on."""
        target = memoryview(buffer).cast("B")
        target[:] = self.read(target.nbytes)
        return target.nbytes

    def truncate(self, size: int) -> int:
        """Set the size of the file."""
        self._write_pieces()
        self._try(lambda: os.ftruncate(self.fd, size))
        self._size = size
        return size

    def flush(self) -> None:
        """Write what waits for more."""
        self._write_pieces()

    def _write_pieces(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces:
            self._try(lambda: write_at(self.fd, map(memoryview, pieces), self._start))
            self._start = self._end

    def _try(self, act: Callable[[], object]) -> None:
        if self._error is None:
            try:
                act()
            except BaseException as error:  # Also an interrupt must not reach libhdf5.
                self._error = error
