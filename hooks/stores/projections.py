"""Projections: count sketches of features (Charikar, Chen and Farach-Colton, 2002)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_DENSE_DIM = 256
_DENSE_FEATURES = 4096


def projected(
    pieces: Iterable[tuple[slice, Tensor]],
    num_features: int,
    dim: int,
    seed: int,
) -> Tensor:
    """Add up features, each with its sign, to the sums that they go to.

    Args:
        pieces: Which columns these are, and the features, [examples, columns].
        num_features: The number of features of all pieces together.
        dim: The number of sums.
        seed: Another seed is another projection.

    Returns:
        The sums, [examples, dim].
    """
    sums: Tensor | None = None
    for columns, piece in pieces:
        of_piece = _sums_of(piece, columns, num_features, dim, seed)
        sums = of_piece if sums is None else sums.add_(of_piece)
    assert sums is not None  # There is a piece even of no features.
    return sums


def _sums_of(features: Tensor, columns: slice, num_features: int, dim: int, seed: int) -> Tensor:
    dtype, device = features.dtype, features.device
    bucket, sign = _projection_on(device, num_features, dim, seed)
    bucket, sign = bucket[columns], sign[columns].to(dtype)
    if dim > _DENSE_DIM:
        sums = torch.zeros(dim, len(features), dtype=dtype, device=device)
        return sums.index_add_(0, bucket, (features * sign).T).T
    sums = torch.zeros(len(features), dim, dtype=dtype, device=device)
    for start in range(0, features.shape[1], _DENSE_FEATURES):
        some = slice(start, start + _DENSE_FEATURES)
        # Nearly all of it is zero; for a small dim a product of matrices is faster yet.
        projection = torch.zeros(len(sign[some]), dim, dtype=dtype, device=device)
        projection.scatter_(1, bucket[some, None], sign[some, None])
        sums.addmm_(features[:, some], projection)
    return sums


@lru_cache(maxsize=32)
def _projection(num_features: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the sum each feature goes to, and its sign, on the CPU."""
    # Raw bits of a specified generator: they outlive versions of torch and NumPy.
    raw = np.random.PCG64([seed, num_features, dim]).random_raw(num_features)
    bucket = torch.from_numpy(((raw >> np.uint64(32)) % np.uint64(dim)).astype(np.int64))
    sign = torch.from_numpy((raw & np.uint64(1)).astype(np.int64) * 2 - 1)
    return bucket, sign


@lru_cache(maxsize=32)
def _projection_on(
    device: torch.device, num_features: int, dim: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the same on a device."""
    bucket, sign = _projection(num_features, dim, seed)
    return bucket.to(device), sign.to(device)
