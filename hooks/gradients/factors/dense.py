"""Factors: per-example gradients of one parameter, without forming them.

For a linear layer the gradient of example n is a sum of outer products over positions t,
G_n = Σ_t δ_nt a_ntᵀ, so an inner product of two gradients needs only the factors δ and a:
⟨G_n, G_m⟩ = Σ_ts (δ_nt·δ_ms)(a_nt·a_ms). A Gram matrix is computed either that way or by forming
gradients in blocks, whichever takes fewer operations.

The factored form may lose digits that forming keeps. Where inputs are far from zero and δ adds up
to nothing over positions, large products cancel, and rounding is about Σ_t ‖δ_nt‖² ‖a_nt‖², which
may be many times ‖G_n‖². That sum is on the diagonal of the products. Where it is too large, or
squares leave the range of float32, the same factors are multiplied again in float64.

Axes: n, m examples; g groups; t, s positions; o outputs; i inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sonde.hooks.stores.row_products import (
    are_inside,
    are_nonzero,
    are_outside,
    products_between,
    row_squares,
)
from sonde.hooks.stores.self_products import self_product

# What a block of formed gradients, or of products between positions, may take.
_BLOCK_BYTES = 16 << 20
# How many times the square of a gradient its terms may have: at 4 the products are off by 1e-6.
_CANCELLATION = 4.0


class Factor(ABC):
    """The gradients of one parameter, one per example."""

    num_examples: int

    @abstractmethod
    def form(self, rows: slice) -> Tensor:
        """Return the gradients of some examples, flattened as the parameter is, [rows, p]."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """The size p of the parameter."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""

    @property
    @abstractmethod
    def sample(self) -> Tensor:
        """A tensor of their type, where they are."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the gradients."""
        return self.sample.dtype

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.sample.device

    @abstractmethod
    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, flattened, [p]."""

    @abstractmethod
    def double(self) -> Factor:
        """Return the same gradients, of the same factors in float64."""

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        total = torch.zeros(
            self.num_examples, other.num_examples, dtype=torch.float64, device="cpu"
        )
        for rows, formed in self.blocks():
            for columns, formed_other in other.blocks():
                total[rows, columns] = products_between(formed, formed_other)
        return total

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, n], on the CPU."""
        products, terms = self.products_and_terms()
        if self.dtype != torch.float64 and self._loses_digits(products.diagonal(), terms):
            products, _ = self.double().products_and_terms()
        return products

    @abstractmethod
    def products_and_terms(self) -> tuple[Tensor, Tensor | None]:
        """Return the inner products of the gradients, computed in their own type.

        Returns:
            The inner products, float64 [n, n]; and for each gradient the sum of the squared norms
            of what the products add up, float64 [n], None where that is its own square, as of one
            that was formed. Both are on the CPU.
        """

    @abstractmethod
    def are_nonzero(self) -> Tensor:
        """Return which gradients may be other than zero, bool [n]."""

    def _loses_digits(self, squares: Tensor, terms: Tensor | None) -> bool:
        """Return whether float32 loses digits of a gradient that is not zero."""
        if terms is None:
            if are_inside(squares):
                return False
            are_lost = are_outside(squares)
        else:
            are_lost = ~(terms <= _CANCELLATION * squares)
            if are_inside(terms) and not bool(are_lost.any()):
                return False
            are_lost |= are_outside(terms)
        return bool((are_lost & self.are_nonzero().cpu()).any())

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each gradient, float64 [n], on the CPU."""
        return torch.cat([row_squares(formed) for _, formed in self.blocks()])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield gradients of as many examples at once as a block holds."""
        size = block_size(self.num_parameters * self.dtype.itemsize)
        for start in range(0, self.num_examples, size):
            rows = slice(start, min(start + size, self.num_examples))
            yield rows, self.form(rows)


@dataclass
class Dense(Factor):
    """Gradients that are formed already, [n, …]."""

    values: Tensor

    def __post_init__(self) -> None:
        # Not flatten(1): the gradient of a scalar has no axis of its own.
        self.values = self.values.reshape(len(self.values), -1)
        self.num_examples = len(self.values)

    @property
    def num_parameters(self) -> int:
        """The size of the parameter."""
        return self.values.shape[1]

    @property
    def sample(self) -> Tensor:
        """A tensor of their type, where they are."""
        return self.values

    @property
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""
        return self.num_parameters * self.values.itemsize

    def form(self, rows: slice) -> Tensor:
        """Return the gradients of some examples, [rows, p]."""
        return self.values[rows]

    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, [p]."""
        return self.values.sum(0)

    @cached_property
    def products(self) -> Tensor:
        """The inner products of the gradients, [n, n], in their type."""
        return self_product(self.values)

    def products_and_terms(self) -> tuple[Tensor, Tensor | None]:
        """Return the inner products of the gradients, which add up nothing else."""
        return self.products.double().cpu(), None

    def double(self) -> Dense:
        """Return the same gradients in float64."""
        return Dense(self.values.double())

    def are_nonzero(self) -> Tensor:
        """Return which gradients are not zero, bool [n]."""
        return are_nonzero(self.values)

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        if isinstance(other, Dense):
            return products_between(self.values, other.values)
        return super().cross(other)


def block_size(row_bytes: int) -> int:
    """Return how many rows of so many bytes, at least one, a block holds."""
    return max(1, _BLOCK_BYTES // max(1, row_bytes))


def pairs(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products of all positions, [n · t, m · s]."""
    return left.flatten(0, 1) @ right.flatten(0, 1).T
