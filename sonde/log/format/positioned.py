"""Reading and writing at a position of a file, whole, also where the system lacks the calls."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from sonde.exceptions import DamageError

_READ_ONLY = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
# Opening a pipe waits for somebody who writes into it; opening a terminal may make it one's own.
NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

# Up to here memory for a read is there before it is known how much the file has.
_SMALL_BYTES = 1 << 20

# How many buffers one call of the system takes.
_MAX_BUFFERS = 1024

# Python has only posix_fallocate, which changes the size, and may write zeros page by page.
_fallocate = getattr(ctypes.CDLL(None), "fallocate", None) if sys.platform == "linux" else None
_KEEP_SIZE = 1
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open an ordinary file for reading; the only way in which files of a log are opened.

    Raises:
        DamageError: If it is a folder, a pipe, a device or a socket.
        OSError: If it cannot be opened.
    """
    fd = os.open(path, _READ_ONLY | NO_WAITING)
    try:
        check_regular(os.fstat(fd), path)
    except DamageError:
        os.close(fd)
        raise
    return fd


def check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Refuse what is no ordinary file.

    Raises:
        DamageError: If it is none; the message begins with its folder and name.
    """
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        where = Path(path)
        name = f"{where.parent.name}/{where.name}"
        raise DamageError(f"{name}: it is {kind}; expected an ordinary file")


def read_at(fd: int, num_bytes: int, offset: int) -> bytes:
    """Return the bytes at `offset`; fewer at the end of the file, whatever is asked for.

    Raises:
        OSError: If they cannot be read.
    """
    if num_bytes > _SMALL_BYTES or offset >> 62:
        # Memory is taken for all that is asked for, which a file may state as it likes.
        num_bytes = min(num_bytes, os.fstat(fd).st_size - offset)
    if num_bytes <= 0 or offset < 0:
        return b""
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
