"""The inner products of the rows of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# Of so few rows, or so few numbers, half of their products are not faster than all: measured.
_FEW_ROWS = 64
_FEW_VALUES = 1 << 16


def self_product(values: Tensor) -> Tensor:
    """Return the inner products of rows, [n, n]."""
    is_small = len(values) <= _FEW_ROWS or values.numel() < _FEW_VALUES
    if values.device.type != "cpu" or is_small:
        return values @ values.T
    # NumPy sees that the result is symmetric, and computes half of it.
    array = values.detach().numpy()
    return torch.from_numpy(array @ array.T)
