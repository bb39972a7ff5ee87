"""Sparse rows: the gradients of what looks up rows of a parameter, as factors.

Axes: n, m examples; g groups; t, s positions; o outputs; i inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from sonde.hooks.stores.row_products import are_nonzero
from sonde.hooks.stores.self_products import self_product

from .dense import Factor, block_size, pairs
from .outer import Outer


@dataclass
class Rows(Factor):
    """Gradients that are zero but for some rows, as the weight of an embedding has.

    Attributes:
        rows: The row each position goes to, [n, t]; negative where it goes nowhere.
        values: The gradients at the positions, [n, t, o].
        num_rows: The number of rows of the parameter.
    """

    rows: Tensor
    values: Tensor
    num_rows: int

    def __post_init__(self) -> None:
        self.num_examples = len(self.values)
        self.values = self.values * (self.rows >= 0)[..., None]
        self.rows = self.rows.clamp(min=0)

    @property
    def num_parameters(self) -> int:
        """The size of the parameter."""
        return self.num_rows * self.values.shape[2]

    @property
    def sample(self) -> Tensor:
        """A tensor of their type, where they are."""
        return self.values

    @property
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""
        return (self.rows.nbytes + self.values.nbytes) // max(1, self.num_examples)

    def form(self, rows: slice) -> Tensor:
        """Return the gradients of some examples, [rows, p]."""
        return self._sum(self.rows[rows], self.values[rows], self.num_rows).flatten(1)

    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, [p]."""
        values = self.values.flatten(0, 1)[None]
        return self._sum(self.rows.reshape(1, -1), values, self.num_rows).flatten()

    def double(self) -> Rows:
        """Return the same gradients, of the same values in float64."""
        return replace(self, values=self.values.double())

    def are_nonzero(self) -> Tensor:
        """Return which gradients may be other than zero, bool [n]."""
        return are_nonzero(self.values)

    def products_and_terms(self) -> tuple[Tensor, Tensor]:
        """Return the inner products of the gradients, and their squared norms."""
        used, position = torch.unique(self.rows, return_inverse=True)
        n, _, o = self.values.shape
        width = block_size(n * len(used) * self.dtype.itemsize)
        total = torch.zeros(n, n, dtype=torch.float64, device="cpu")
        for start in range(0, o, width):
            values = self.values[:, :, start : start + width]
            total += self_product(self._sum(position, values, len(used)).flatten(1)).cpu()
        return total, total.diagonal()

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        is_plain = isinstance(other, Outer) and other.delta.shape[1] == 1
        if not is_plain or cast(Outer, other).is_transposed:
            return super().cross(other)
        # As between two outer products, terms may cancel.
        return self.double()._factored_cross(cast(Outer, other).double())

    def _factored_cross(self, outer: Outer) -> Tensor:
        """Return the inner products with outer products from the factors alone, float64 [n, m]."""
        m, _, s, _ = outer.delta.shape
        n, t, _ = self.values.shape
        total = torch.zeros(n, m, dtype=torch.float64, device=self.values.device)
        delta, inputs = outer.delta[:, 0].flatten(0, 1), outer._inputs(slice(0, m))[:, 0]
        size = block_size(t * m * s * self.dtype.itemsize)
        for start in range(0, n, size):
            block = slice(start, start + size)
            products = pairs(self.values[block], inputs)
            # The row of a position picks the outputs that its values meet.
            products *= delta[:, self.rows[block].reshape(-1)].T
            total[block] = products.view(-1, t, m, s).sum((1, 3))
        return total.cpu()

    def _sum(self, rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
        n, t, o = values.shape
        example = torch.arange(n, device=values.device)[:, None] * num_rows
        sums = torch.zeros(n * num_rows, o, dtype=values.dtype, device=values.device)
        sums.index_add_(0, (example + rows).reshape(-1), values.reshape(n * t, o))
        return sums.reshape(n, num_rows, o)
