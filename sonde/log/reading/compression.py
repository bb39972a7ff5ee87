"""How the chunks of an exported run are compressed: by zstd, by gzip, or not at all.

libhdf5 brings gzip along; zstd is a filter of its own, which the package hdf5plugin brings. No
shuffle: it makes the floats of a training no smaller.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Literal

import numpy as np

from sonde.exceptions import DamageError, InvalidInputError

if TYPE_CHECKING:
    import h5py

Compression = Literal["zstd", "gzip", "none"]
COMPRESSIONS = ("zstd", "gzip", "none")

_ZSTD_FILTER, _ZSTD_LEVEL = 32015, 3
_GZIP_LEVEL = 4


def choose_compression(wanted: Compression | None) -> Compression:
    """Check that a compression can be used, and choose one if none is named.

    Args:
        wanted: The compression; None takes zstd where hdf5plugin is installed, else gzip.

    Raises:
        InvalidInputError: If there is no such compression, or hdf5plugin is not installed.
    """
    if wanted is None:
        try:
            require_zstd("zstd")
        except InvalidInputError:
            return "gzip"
        return "zstd"
    if wanted not in ("zstd", "gzip", "none"):
        raise InvalidInputError(f"`compression` (={wanted!r}) must be 'zstd', 'gzip' or 'none'")
    if wanted == "zstd":
        require_zstd("compression='zstd'")
    return wanted


def require_zstd(what: str) -> None:
    """Make libhdf5 know zstd.

    Args:
        what: What takes it, for the message.

    Raises:
        InvalidInputError: If hdf5plugin is not installed.
    """
    try:
        import hdf5plugin  # noqa: F401 - importing it makes the filter known
    except ImportError:
        raise InvalidInputError(
            f"{what} takes the package hdf5plugin: pip install 'sonde[compression]'; "
            "an export with gzip needs nothing"
        ) from None


def add_filter(creation: h5py.h5p.PropDCID, compression: Compression) -> None:
    """Have the chunks of a dataset compressed."""
    import h5py

    # Mandatory: no chunk is ever stored in another way than its dataset says.
    if compression == "gzip":
        creation.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_MANDATORY, (_GZIP_LEVEL,))
    elif compression == "zstd":
        creation.set_filter(_ZSTD_FILTER, h5py.h5z.FLAG_MANDATORY, (_ZSTD_LEVEL,))


def decompress(raw: bytes, num_bytes: int, compression: Compression) -> bytes:
    """Return what a chunk holds.

    Args:
        raw: The chunk as it is stored; to be checked before, as libhdf5 trusts it.
        num_bytes: The size of what it holds.
        compression: How it is stored.

    Raises:
        DamageError: If it does not hold so many bytes, or cannot be unpacked.
        InvalidInputError: If it is stored by zstd and hdf5plugin is not installed.
    """
    content = raw if compression == "none" else _UNPACK[compression](raw, num_bytes)
    if len(content) != num_bytes:
        raise DamageError(f"it holds {len(content)} bytes; expected {num_bytes}")
    return content


def _decompress_gzip(raw: bytes, num_bytes: int) -> bytes:
    """Unpack a chunk, and no more of it than it should hold.

    Raises:
        DamageError: If it holds more, or cannot be unpacked.
    """
    unpacking = zlib.decompressobj()
    try:
        content = unpacking.decompress(raw, num_bytes + 1)
    except zlib.error as error:
        raise DamageError(f"it cannot be unpacked: {error}") from None
    if len(content) == num_bytes and not unpacking.eof:
        raise DamageError("it has no end")
    return content


def _zstd_size(raw: bytes) -> int | None:
    """Return how many bytes a frame of zstd says that it holds; None if it does not say it.

    RFC 8878, section 3.1.1.1: magic, descriptor, window, dictionary, size.
    """
    if len(raw) < 6 or raw[:4] != b"\x28\xb5\x2f\xfd":
        return None
    size_flag, is_single, dictionary_flag = raw[4] >> 6, raw[4] >> 5 & 1, raw[4] & 3
    start = 5 + (not is_single) + (0, 1, 2, 4)[dictionary_flag]
    num_bytes = (1 if is_single else 0, 2, 4, 8)[size_flag]
    if not num_bytes:
        return None
    size = int.from_bytes(raw[start : start + num_bytes], "little")
    return size + 256 if num_bytes == 2 else size


def _decompress_zstd(raw: bytes, num_bytes: int) -> bytes:
    """Have the filter of libhdf5 decompress a chunk, in a file that is in memory only.

    Raises:
        DamageError: If it does not hold so many bytes, or cannot be unpacked.
        InvalidInputError: If hdf5plugin is not installed.
    """
    import h5py

    # libhdf5 takes as much memory as the chunk asks for.
    if (size := _zstd_size(raw)) != num_bytes:
        raise DamageError(f"it holds {size} bytes; expected {num_bytes}")
    require_zstd("reading a run exported with zstd")
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(backing_store=False)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((num_bytes,))
    add_filter(creation, "zstd")
    file = h5py.h5f.create(b"chunk", h5py.h5f.ACC_TRUNC, fapl=access)
    space = h5py.h5s.create_simple((num_bytes,))
    dataset = h5py.h5d.create(file, b"chunk", h5py.h5t.STD_U8LE, space, creation)
    dataset.write_direct_chunk((0,), raw)
    content = np.empty(num_bytes, np.uint8)
    try:
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, content)
    except OSError:
        raise DamageError("it cannot be unpacked") from None
    return content.tobytes()


_UNPACK = {"gzip": _decompress_gzip, "zstd": _decompress_zstd}
