"""Reading and writing at a position of a file, whole, also where the system lacks the calls."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable

READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0)

# How many buffers one call of the system takes.
_MAX_BUFFERS = 1024

# Python has only posix_fallocate, which changes the size, and may write zeros page by page.
_fallocate = getattr(ctypes.CDLL(None), "fallocate", None) if sys.platform == "linux" else None
_KEEP_SIZE = 1
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


def read_at(fd: int, num_bytes: int, offset: int) -> bytes:
    """Return the bytes at `offset`; fewer at the end of the file.

    Raises:
        OSError: If they cannot be read.
    """
    data = _read_once(fd, num_bytes, offset)
    if len(data) == num_bytes or not data:
        return data
    chunks = [data]
    missing = num_bytes - len(data)
    while missing and (data := _read_once(fd, missing, offset + num_bytes - missing)):
        chunks.append(data)
        missing -= len(data)
    return b"".join(chunks)


def write_at(fd: int, buffers: Iterable[memoryview], offset: int) -> int:
    """Write buffers one behind the other, however short the single writes are.

    Args:
        fd: The file.
        buffers: Contiguous buffers.
        offset: Where the first one goes, in bytes.

    Returns:
        Where the last one ends.

    Raises:
        OSError: If they cannot be written; some of the bytes may be.
    """
    pending = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
    pending.reverse()  # The next one is last, where taking it costs nothing.
    while pending:
        count = _write_once(fd, pending[: -_MAX_BUFFERS - 1 : -1], offset)
        offset += count
        while pending and count >= pending[-1].nbytes:
            count -= pending.pop().nbytes
        if count:
            pending[-1] = pending[-1][count:]
    return offset


def reserve(fd: int, num_bytes: int, offset: int) -> None:
    """Set aside the blocks of a large write, which spares doing so page by page.

    The size of the file stays. Where this does not work the write does it, or says why not.
    """
    if _fallocate is not None:
        _fallocate(fd, _KEEP_SIZE, offset, num_bytes)


def _read_once(fd: int, num_bytes: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, num_bytes, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, num_bytes)


def _write_once(fd: int, buffers: list[memoryview], offset: int) -> int:
    if hasattr(os, "pwritev"):
        return os.pwritev(fd, buffers, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, buffers[0])
