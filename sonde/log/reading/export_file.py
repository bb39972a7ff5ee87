"""The trailer of an exported file: it marks the file as an export, and as complete."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from zlib_ng.zlib_ng import crc32

from sonde.exceptions import DamageError, FormatError, RunNotFoundError
from sonde.log.format.checked import OBJECT, check, check_info, list_of, parse
from sonde.log.format.files import RUN_FILE
from sonde.log.format.positioned import open_regular, read_at

from .segment_file import SegmentFile, naming

EXPORT_VERSION = 1
MARK = "sonde_export"
"""The attribute of the root group by which a file is known that lacks its end."""

# magic, version, reserved; metadata: offset, bytes, crc; what precedes the trailer: bytes, crc of
# what of it belongs to no chunk; and the trailer's own crc
_TRAILER = struct.Struct("<8sIIQQIQII")
_MAGIC = b"SONDEEXP"
_SEGMENT_MAGIC = b"SONDESEG"
_HEAD_BYTES = 4096
_METADATA = {
    "info": OBJECT,
    "chunks": OBJECT,
    "groups": list_of(OBJECT),
    "tables": list_of(OBJECT),
    "writers": list_of(OBJECT),
}


@dataclass(frozen=True)
class Metadata:
    """What an exported run says of itself.

    Attributes:
        content: The metadata.
        num_bytes: The size of the file before the trailer.
        checksum: The checksum of all of it that belongs to no chunk.
    """

    content: dict[str, Any]  # Any: JSON values.
    num_bytes: int
    checksum: int


def encode_trailer(metadata_offset: int, metadata: bytes, num_bytes: int, checksum: int) -> bytes:
    """Encode what closes an export off.

    Args:
        metadata_offset: Where the metadata lies.
        metadata: The metadata.
        num_bytes: The size of the file before the trailer.
        checksum: The checksum of all of it that belongs to no chunk.
    """
    sizes = (len(metadata), crc32(metadata), num_bytes, checksum)
    head = _TRAILER.pack(_MAGIC, EXPORT_VERSION, 0, metadata_offset, *sizes, 0)[:-4]
    return head + struct.pack("<I", crc32(head))


def read_metadata(file: SegmentFile) -> Metadata:
    """Read the trailer and the metadata of an exported run, and check them.

    Raises:
        RunNotFoundError: If it is no exported run.
        DamageError: If it is cut short or damaged.
        FormatError: If it is of a newer format, or a part of a run directory.
        OSError: If it cannot be read.
    """
    trailer = _read_bytes(file, max(0, file.num_bytes - _TRAILER.size), _TRAILER.size)
    if len(trailer) < _TRAILER.size or not trailer.startswith(_MAGIC):
        _explain(file, trailer)
    fields = _TRAILER.unpack(trailer)
    _, version, _, offset, encoded_bytes, encoded_checksum, num_bytes, checksum, own = fields
    if crc32(trailer[:-4]) != own:
        raise DamageError(f"{file.name}: the trailer does not match its checksum")
    if version > EXPORT_VERSION:
        raise FormatError(
            f"{file.path} has export format {version}; this sonde reads up to {EXPORT_VERSION}. "
            "Install a newer sonde."
        )
    if num_bytes + _TRAILER.size != file.num_bytes:
        raise DamageError(f"{file.name}: the file does not have the size its trailer states")
    encoded = _read_bytes(file, offset, encoded_bytes)
    if crc32(encoded) != encoded_checksum:
        raise DamageError(f"{file.name}: the metadata does not match its checksum")
    with naming(file):
        content = parse(encoded)
        check(content, _METADATA)
        try:
            check_info(content["info"])
        except DamageError as error:
            raise DamageError(f"`info`: {error}") from None
    return Metadata(content, num_bytes, checksum)


def _explain(file: SegmentFile, trailer: bytes) -> NoReturn:
    """Say what a file is that does not end as an export does.

    Raises:
        DamageError: If it is an export that is cut short or damaged.
        FormatError: If it is a segment.
        RunNotFoundError: If it is something else.
    """
    if MARK.encode() in _read_bytes(file, 0, _HEAD_BYTES):
        raise DamageError(f"{file.name}: the file has no valid trailer: it is cut short or damaged")
    if trailer.startswith(_SEGMENT_MAGIC):
        raise FormatError(
            f"{file.path} is a part of a run; expected its run directory, which holds {RUN_FILE}"
        )
    raise RunNotFoundError(
        f"{file.path} is a file; expected a run directory (a folder with {RUN_FILE}), or a file "
        "that `sonde export` wrote"
    )


def _read_bytes(file: SegmentFile, offset: int, num_bytes: int) -> bytes:
    fd = open_regular(file.path)
    try:
        return read_at(fd, num_bytes, offset)
    finally:
        os.close(fd)
