"""Factors put together: of a parameter that is used in several ways, or of several batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from .dense import Dense, Factor
from .outer import Outer
from .rows import Rows


@dataclass
class Sum(Factor):
    """Sums of gradients, as a parameter has that is used in several ways."""

    parts: Sequence[Factor]

    def __post_init__(self) -> None:
        self.num_examples = self.parts[0].num_examples

    @property
    def num_parameters(self) -> int:
        """The size of the parameter."""
        return self.parts[0].num_parameters

    @property
    def sample(self) -> Tensor:
        """A tensor of their type, where they are."""
        return self.parts[0].sample

    @property
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""
        return sum(part.row_bytes for part in self.parts)

    def form(self, rows: slice) -> Tensor:
        """Return the gradients of some examples, [rows, p]."""
        total = self.parts[0].form(rows)
        for part in self.parts[1:]:
            total = total + part.form(rows)
        return total

    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, [p]."""
        return torch.stack([part.sum() for part in self.parts]).sum(0)

    def double(self) -> Sum:
        """Return the same gradients, of the same factors in float64."""
        return Sum([part.double() for part in self.parts])

    def are_nonzero(self) -> Tensor:
        """Return which gradients may be other than zero, bool [n]."""
        return torch.stack([part.are_nonzero() for part in self.parts]).any(0)

    def products_and_terms(self) -> tuple[Tensor, Tensor]:
        """Return the inner products of the gradients, and the squares of what adds up to them."""
        total = torch.zeros(self.num_examples, self.num_examples, dtype=torch.float64, device="cpu")
        terms = total.diagonal().clone()
        for at, part in enumerate(self.parts):
            products = part.gram()
            total += products
            terms += products.diagonal()
            for other in self.parts[:at]:
                products = other.cross(part) if isinstance(other, Rows) else part.cross(other)
                if isinstance(other, Rows):
                    products = products.T
                total += products + products.T
        return total, terms

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        return torch.stack([part.cross(other) for part in self.parts]).sum(0)


def summed(parts: Sequence[Factor]) -> Factor:
    """Return the gradients of a parameter that is used in several ways."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Dense) for part in parts):
        return Dense(torch.stack([cast(Dense, part).values for part in parts]).sum(0))
    return Sum(parts)


def joined(parts: Sequence[Factor]) -> Factor:
    """Return the gradients of some examples, then those of others, as one factor."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Sum) and all(
        isinstance(part, Sum) and len(part.parts) == len(first.parts) for part in parts
    ):
        of_each = zip(*(cast(Sum, part).parts for part in parts), strict=True)
        return Sum([joined(list(same)) for same in of_each])
    if isinstance(first, Rows) and all(isinstance(part, Rows) for part in parts):
        rows = [cast(Rows, part) for part in parts]
        longest = max(part.values.shape[1] for part in rows)
        return Rows(
            torch.cat([_padded(part.rows, longest) for part in rows]),
            torch.cat([_padded(part.values, longest) for part in rows]),
            first.num_rows,
        )
    if isinstance(first, Outer) and all(
        isinstance(part, Outer) and part.source.shape[1:] == first.source.shape[1:]
        for part in parts
    ):
        outers = [cast(Outer, part) for part in parts]
        delta = torch.cat([part.delta for part in outers])
        source = torch.cat([part.source for part in outers])
        return replace(first, delta=delta, source=source, of_outputs=None)
    return Dense(torch.cat([part.form(slice(0, part.num_examples)) for part in parts]))


def _padded(values: Tensor, length: int) -> Tensor:
    """Pad the positions with zeros, which add nothing."""
    missing = length - values.shape[1]
    if not missing:
        return values
    return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], 1)
