"""The inner products of the rows of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# Of so few rows, half of their products are not faster than all: measured.
_FEW = 64


def self_product(values: Tensor) -> Tensor:
    """Return the inner products of rows, [n, n]."""
    if values.device.type != "cpu" or len(values) <= _FEW:
        return values @ values.T
    # NumPy sees that the result is symmetric, and computes half of it.
    array = values.detach().numpy()
    return torch.from_numpy(array @ array.T)
