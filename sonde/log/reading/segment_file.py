"""The file of a segment or an export: its state, and arrays in it that are read as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sonde.exceptions import DamageError
from sonde.log.format.checked import (
    CHECKSUM,
    COUNT,
    DETAILS,
    DTYPE,
    FLAG,
    OBJECT,
    SHAPE,
    TEXT,
    TEXTS,
    check,
    check_ids,
    check_layout,
    list_of,
    nbytes,
)
from sonde.log.format.payload import from_storage, storage_dtype
from sonde.log.format.positioned import check_regular, open_regular, read_at

_CHUNK_BYTES = 4 << 20

_PLACE = {"offset": COUNT, "dtype": DTYPE, "shape": SHAPE, "crc32": CHECKSUM}
_TABLE = {"attributes": DETAILS, "arrays": list_of(OBJECT)}
_TABLE_ARRAY = {"field": TEXT, "dims": TEXTS}
DAMAGE = {"path": TEXT, "offset": COUNT, "num_bytes": COUNT, "reason": TEXT, "is_tail": FLAG}


@dataclass(frozen=True)
class SegmentFile:
    """One state of a segment's file, so that another one at the same path is told apart."""

    path: Path
    inode: int
    num_bytes: int
    changed_ns: int

    @property
    def name(self) -> str:
        """How reports name it: relative to the run directory."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(frozen=True)
class Place:
    """Where an array that is read as a whole lies, and its checksum."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Place:
        """Return what an entry of the metadata says.

        Raises:
            DamageError: If it is no place of an array.
        """
        check(entry, _PLACE)
        return cls(entry["offset"], entry["dtype"], tuple(entry["shape"]), entry["crc32"])


def identify(path: Path) -> SegmentFile:
    """Return the present state of a segment's file.

    Raises:
        DamageError: If it is no ordinary file.
        OSError: If it is gone.
    """
    status = path.stat()
    check_regular(status, path)
    return SegmentFile(path, status.st_ino, status.st_size, status.st_mtime_ns)


def checksum_between(fd: int, num_bytes: int, stretches: Sequence[tuple[int, int]]) -> int:
    """Return the checksum of a file's first bytes, leaving stretches (offset, size) out."""
    checksum, position = 0, 0
    for start, size in (*sorted(stretch for stretch in stretches if stretch[1]), (num_bytes, 0)):
        while position < start:
            chunk = read_at(fd, min(_CHUNK_BYTES, start - position), position)
            if not chunk:
                return -1
            checksum = crc32(chunk, checksum)
            position += len(chunk)
        position = start + size
    return checksum


def read_place(file: SegmentFile, place: Place, what: str) -> npt.NDArray[Any]:
    """Read an array as a whole.

    Raises:
        DamageError: If it does not match its checksum.
        OSError: If the segment cannot be read.
    """
    num_bytes = nbytes(place.shape, place.dtype)
    raw = read_bytes(file, place.offset, num_bytes)
    if len(raw) != num_bytes or crc32(raw) != place.crc32:
        raise DamageError(f"{file.name}: {what} does not match its checksum")
    values = np.frombuffer(raw, storage_dtype(place.dtype)).reshape(place.shape)
    return from_storage(values, place.dtype)


@contextmanager
def naming(file: SegmentFile) -> Iterator[None]:
    """Have messages about what a file says begin with its name.

    Raises:
        DamageError: In place of one that does not.
    """
    try:
        yield
    except DamageError as error:
        text = str(error)
        if not text.startswith(file.name):
            text = f"{file.name}: the metadata has no meaning: {text}"
        raise DamageError(text) from None


def check_table(table: Any, file: SegmentFile, name: str = "name") -> None:
    """Check what the metadata says of arrays of a source that do not depend on the step.

    Raises:
        DamageError: If it is no table, or lies beyond the end of the file.
    """
    check(table, {name: TEXT, **_TABLE})
    for entry in table["arrays"]:
        check(entry, _TABLE_ARRAY)
        if "reason" in entry:
            continue  # It could not be exported.
        place = Place.of(entry)
        check_layout(None, entry["field"], place.dtype, list(place.shape), entry["dims"])
        if place.offset + nbytes(place.shape, place.dtype) > file.num_bytes:
            raise DamageError(f"table '{entry['field']}' is said to lie beyond the end of the file")
        check_ids(entry["field"], place.dtype, len(place.shape))


@contextmanager
def open_segment(file: SegmentFile) -> Iterator[int]:
    """Open a segment that is still the one that was listed.

    Raises:
        FileNotFoundError: If it is gone, or another one has taken its place.
        OSError: If it cannot be opened.
    """
    fd = open_regular(file.path)
    try:
        status = os.fstat(fd)
        if (status.st_ino, status.st_size, status.st_mtime_ns) != (
            file.inode,
            file.num_bytes,
            file.changed_ns,
        ):
            raise FileNotFoundError(f"{file.path} was replaced since it was listed")
        yield fd
    finally:
        os.close(fd)


def read_bytes(file: SegmentFile, offset: int, num_bytes: int) -> bytes:
    """Read bytes of a segment; fewer at the end of the file."""
    with open_segment(file) as fd:
        return read_at(fd, num_bytes, offset)
