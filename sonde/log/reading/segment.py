"""Segments, as they are read: immutable HDF5 files whose bytes are checked first.

A segment is an ordinary HDF5 file for everyone else. sonde itself reads it without libhdf5, which
can hang on a damaged file: behind the HDF5 data stands a trailer that says where the metadata lies,
the metadata says where each array lies (datasets are contiguous), and every record of every array
has a checksum. So opening a segment reads its metadata only, and a flipped byte costs the record it
is in. One more checksum covers all that belongs to no record, so that every byte is covered once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sonde.exceptions import DamageError, FormatError
from sonde.log.format.checked import EVENT, OBJECT, check, check_event, list_of, parse
from sonde.log.format.frames import FORMAT_VERSION

from .segment_file import (
    DAMAGE,
    Place,
    SegmentFile,
    check_table,
    checksum_between,
    naming,
    open_segment,
    read_bytes,
    read_place,
)
from .segment_records import SegmentRecords

# magic, version, reserved; metadata: offset, bytes, crc; what precedes the trailer: bytes, crc of
# what of it belongs to no record; and the trailer's own crc
_TRAILER = struct.Struct("<8sIIQQIQII")
_TRAILER_MAGIC = b"SONDESEG"
_METADATA = {
    "frames": list_of(OBJECT),
    "tables": list_of(OBJECT),
    "damage": list_of(OBJECT),
    "groups": list_of(OBJECT),
}


def encode_trailer(metadata_offset: int, metadata: bytes, num_bytes: int, checksum: int) -> bytes:
    """Encode what closes a segment off.

    Args:
        metadata_offset: Where the metadata lies.
        metadata: The metadata.
        num_bytes: The size of the file before the trailer.
        checksum: The checksum of all of it that belongs to no record.
    """
    head = _TRAILER.pack(
        _TRAILER_MAGIC,
        FORMAT_VERSION,
        0,
        metadata_offset,
        len(metadata),
        crc32(metadata),
        num_bytes,
        checksum,
        0,
    )[:-4]
    return head + struct.pack("<I", crc32(head))


class Segment:
    """A segment whose metadata was checked. It holds no file open.

    Args:
        file: The file.

    Raises:
        DamageError: If its trailer or metadata is damaged.
        FormatError: If it is of a newer format.
        OSError: If it cannot be read.
    """

    def __init__(self, file: SegmentFile) -> None:
        self.file = file
        offset, num_bytes, checksum, self._num_bytes, self._checksum = _read_trailer(file)
        encoded = read_bytes(file, offset, num_bytes)
        if crc32(encoded) != checksum:
            raise DamageError(f"{file.name}: the metadata does not match its checksum")
        with naming(file):
            metadata = parse(encoded)
            check(metadata, _METADATA)
            for event in metadata["frames"]:
                check(event, EVENT)
                check_event(event)
            for table in metadata["tables"]:
                check_table(table, file)
            for item in metadata["damage"]:
                check(item, DAMAGE)
            self.frames: list[dict[str, Any]] = metadata["frames"]
            self.tables: list[dict[str, Any]] = metadata["tables"]
            self.damage: list[dict[str, Any]] = metadata["damage"]
            self.groups = tuple(SegmentRecords(file, entry) for entry in metadata["groups"])

    def table(self, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
        """Return an array that does not depend on the step.

        Raises:
            DamageError: If it does not match its checksum.
        """
        return read_place(self.file, Place.of(entry), f"table '{entry['field']}'")

    def verify(self) -> Iterator[str]:
        """Check every byte; yield what is damaged, record by record.

        Raises:
            OSError: If the file cannot be read.
        """
        stretches = [stretch for group in self.groups for stretch in group.stretches()]
        with open_segment(self.file) as fd:
            if checksum_between(fd, self._num_bytes, stretches) != self._checksum:
                yield "bytes that belong to no record do not match their checksum"
        for table in self.tables:
            for entry in table["arrays"]:
                try:
                    self.table(entry)
                except DamageError as error:
                    yield str(error)
        for group in self.groups:
            yield from group.verify()


def _read_trailer(file: SegmentFile) -> tuple[int, int, int, int, int]:
    """Return (metadata offset, its bytes, its crc, bytes before the trailer, their crc).

    Raises:
        DamageError: If it is damaged.
        FormatError: If it is of a newer format.
    """
    if file.num_bytes < _TRAILER.size:
        raise DamageError(f"{file.name}: the segment is cut short")
    trailer = read_bytes(file, file.num_bytes - _TRAILER.size, _TRAILER.size)
    magic, version, _, offset, num_bytes, checksum, before, before_checksum, own = _TRAILER.unpack(
        trailer
    )
    if magic != _TRAILER_MAGIC or crc32(trailer[:-4]) != own:
        raise DamageError(
            f"{file.name}: the segment has no valid trailer: it is cut short or damaged"
        )
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{file.path} has log format {version}; this sonde reads up to {FORMAT_VERSION}. "
            "Install a newer sonde."
        )
    if before + _TRAILER.size != file.num_bytes:
        raise DamageError(f"{file.name}: the segment does not have the size its trailer states")
    return offset, num_bytes, checksum, before, before_checksum
