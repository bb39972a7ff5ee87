"""Ids of examples: integers that the log holds as int64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError

_LARGEST = np.iinfo(np.int64).max


def as_int64(ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """Return ids of any integer type as int64.

    Raises:
        InvalidInputError: If one is too large, as hashes in uint64 may be.
    """
    if ids.dtype.kind == "u" and ids.size and int(ids.max()) > _LARGEST:
        raise InvalidInputError(
            f"`ids` holds {ids.max()}; the log holds ids as int64, up to {_LARGEST}. Give smaller "
            "ones, such as positions in the data set, or a hash without its highest bit"
        )
    return ids.astype(np.int64)
