"""How the chunks of an exported run are compressed: by zstd, by gzip, or not at all.

libhdf5 brings gzip along; zstd is a filter of its own, which the package hdf5plugin brings. No
shuffle: it makes the floats of a training no smaller.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Literal

import numpy as np

from sonde.exceptions import InvalidInputError

if TYPE_CHECKING:
    import h5py

Compression = Literal["zstd", "gzip", "none"]

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
        InvalidInputError: If it is stored by zstd and hdf5plugin is not installed.
    """
    if compression == "none":
        return raw
    if compression == "gzip":
        return zlib.decompress(raw)
    return _decompress_zstd(raw, num_bytes)


def _decompress_zstd(raw: bytes, num_bytes: int) -> bytes:
    """Have the filter of libhdf5 decompress a chunk, in a file that is in memory only.

    Raises:
        InvalidInputError: If hdf5plugin is not installed.
    """
    import h5py

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
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, content)
    return content.tobytes()
