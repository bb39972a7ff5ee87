"""Factors: per-example gradients of one parameter, without forming them.

For a linear layer the gradient of example n is a sum of outer products over positions t,
G_n = Σ_t δ_nt a_ntᵀ, so an inner product of two gradients needs only the factors δ and a:
⟨G_n, G_m⟩ = Σ_ts (δ_nt·δ_ms)(a_nt·a_ms). A Gram matrix is computed either that way or by forming
gradients in blocks, whichever takes fewer operations.

Axes: n, m examples; g groups; t, s positions; o outputs; i inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

# What a block of formed gradients, or of products between positions, may take.
_BLOCK_BYTES = 16 << 20
# Of a product of small matrices, one for each example, to one of large matrices: measured.
_BATCHED_COST = 2.0
# Of so few rows, half of their products are not faster than all: measured.
_FEW = 64
# Of how many values a norm is taken in the type of the gradients.
_PIECE = 1024


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
    def dtype(self) -> torch.dtype:
        """The type of the gradients."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the gradients are."""

    @abstractmethod
    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, flattened, [p]."""

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        total = torch.zeros(self.num_examples, other.num_examples, dtype=torch.float64)
        for rows, formed in self.blocks():
            for columns, formed_other in other.blocks():
                total[rows, columns] = (formed @ formed_other.T).double().cpu()
        return total

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, n], on the CPU."""
        return self.cross(self)

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each gradient, float64 [n], on the CPU."""
        return torch.cat([row_squares(formed) for _, formed in self.blocks()])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield gradients of as many examples at once as a block holds."""
        row_bytes = max(1, self.num_parameters * self.dtype.itemsize)
        size = max(1, _BLOCK_BYTES // row_bytes)
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
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""
        return self.num_parameters * self.values.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """The type of the gradients."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.values.device

    def form(self, rows: slice) -> Tensor:
        """Return the gradients of some examples, [rows, p]."""
        return self.values[rows]

    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, [p]."""
        return self.values.sum(0)

    @cached_property
    def products(self) -> Tensor:
        """The inner products of the gradients, [n, n]."""
        return self_product(self.values)

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, n], on the CPU."""
        return self.products.double().cpu()

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        if isinstance(other, Dense):
            return (self.values @ other.values.T).double().cpu()
        return super().cross(other)


@dataclass
class Outer(Factor):
    """Sums of outer products, as linear and convolutional weights have.

    Attributes:
        delta: Gradients with respect to the outputs, [n, g, t, o].
        source: What the layer was given, [n, …].
        num_inputs: The size of axis i.
        view: Makes [rows, g, t, i] of the source; a convolution unfolds only when that is needed.
        is_transposed: The parameter is [g, i, o], not [g, o, i].
        form_at_once: Forms [rows, g, o, i] of delta and source, or returns None where it does not.
        of_outputs: The same as `delta` with one position and one group, whose products are shared.
    """

    delta: Tensor
    source: Tensor
    num_inputs: int
    view: Callable[[Tensor], Tensor]
    is_transposed: bool = False
    form_at_once: Callable[[Tensor, Tensor], Tensor | None] | None = None
    of_outputs: Dense | None = None

    def __post_init__(self) -> None:
        self.num_examples = len(self.delta)

    @property
    def num_parameters(self) -> int:
        """The size of the parameter."""
        return self.delta.shape[1] * self.delta.shape[3] * self.num_inputs

    @property
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""
        return (self.delta.nbytes + self.source.nbytes) // max(1, self.num_examples)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the gradients."""
        return self.delta.dtype

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.delta.device

    @property
    def is_cheaper_formed(self) -> bool:
        """Whether forming gradients takes fewer operations than the factored products."""
        n, g, t, o = self.delta.shape
        i = self.num_inputs
        # Gradients take n·t·o·i and their products n²·o·i / 2; the factored form n²·t²·(o + i) / 2.
        formed = n * g * o * i * (_BATCHED_COST * t + n / 2)
        return formed < n * n * t * t * g * (o + i) / 2

    def compact(self) -> Factor:
        """Return the gradients themselves where they are smaller than what makes them."""
        formed_bytes = self.num_parameters * self.dtype.itemsize
        if formed_bytes <= self.row_bytes and self.is_cheaper_formed:
            return Dense(self.form(slice(0, self.num_examples)))
        return self

    def form(self, rows: slice) -> Tensor:
        """Return the gradients of some examples, [rows, p]."""
        return self._form(rows, slice(0, self.delta.shape[3])).flatten(1)

    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, [p]."""
        inputs = self._inputs(slice(0, self.num_examples))
        delta = self.delta.transpose(0, 1).flatten(1, 2)
        total = delta.transpose(1, 2) @ inputs.transpose(0, 1).flatten(1, 2)
        return (total.transpose(1, 2) if self.is_transposed else total).flatten()

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, n], on the CPU."""
        if not self.is_cheaper_formed:
            return self.factored(self)
        o, row_bytes = self.delta.shape[3], self.num_parameters * self.dtype.itemsize
        every = slice(0, self.num_examples)
        width = max(1, _BLOCK_BYTES * o // max(1, self.num_examples * row_bytes))
        total = torch.zeros(self.num_examples, self.num_examples, dtype=torch.float64)
        for start in range(0, o, width):
            total += self_product(self._form(every, slice(start, start + width)).flatten(1)).cpu()
        return total

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        if isinstance(other, Outer) and other.is_transposed == self.is_transposed:
            if not self.is_cheaper_formed and not other.is_cheaper_formed:
                return self.factored(other)
        return super().cross(other)

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each gradient, float64 [n], on the CPU."""
        _, g, t, o = self.delta.shape
        if t * (o + self.num_inputs) > 2 * o * self.num_inputs:
            return super().squared_norms()
        parts = []
        size = max(1, _BLOCK_BYTES // (g * t * max(t, self.num_inputs) * self.dtype.itemsize))
        for start in range(0, self.num_examples, size):
            rows = slice(start, start + size)
            delta, inputs = self.delta[rows].double(), self._inputs(rows).double()
            products = (delta @ delta.transpose(2, 3)) * (inputs @ inputs.transpose(2, 3))
            parts.append(products.sum((1, 2, 3)).cpu())
        return torch.cat(parts)

    def factored(self, other: Outer) -> Tensor:
        """Return the inner products from the factors alone, float64 [n, m], on the CPU."""
        n, g, t, _ = self.delta.shape
        m, _, s, _ = other.delta.shape
        is_own = other is self
        if is_own and self.of_outputs is not None:
            products = self_product(self._inputs(slice(0, n)).flatten(1))
            return products.mul_(self.of_outputs.products).double().cpu()
        total = torch.zeros(n, m, dtype=torch.float64, device=self.delta.device)
        rows = max(1, _BLOCK_BYTES // max(1, m * t * s * self.dtype.itemsize))
        theirs = other._inputs(slice(0, m))
        for start in range(0, n, rows):
            block = slice(start, min(start + rows, n))
            ours = theirs[block] if is_own else self._inputs(block)
            # Gradients are symmetric in their examples: only what stands behind is computed.
            behind = slice(start if is_own else 0, m)
            for group in range(g):
                if is_own and rows >= n:  # Then half of each product is enough.
                    products = self_product(ours[:, group].flatten(0, 1))
                    products *= self_product(self.delta[:, group].flatten(0, 1))
                else:
                    products = _pairs(self.delta[block, group], other.delta[behind, group])
                    products *= _pairs(ours[:, group], theirs[behind, group])
                if t * s > 1:
                    products = products.view(-1, t, m - behind.start, s).sum((1, 3))
                total[block, behind] += products
                if is_own:
                    total[block.stop :, block] += products[:, block.stop - start :].T
        return total.cpu()

    def _inputs(self, rows: slice) -> Tensor:
        return self.view(self.source[rows])

    def _form(self, rows: slice, outputs: slice) -> Tensor:
        """Form the gradients of some examples and outputs, [rows, g, outputs, i]."""
        delta = self.delta[rows]
        n, g, t, _ = delta.shape
        if self.form_at_once is not None:
            formed = self.form_at_once(delta[..., outputs], self.source[rows])
            if formed is not None:
                return formed
        unfolded_bytes = g * t * self.num_inputs * self.dtype.itemsize
        size = max(1, _BLOCK_BYTES // max(1, unfolded_bytes))
        parts = []
        for start in range(0, n, size):
            block = slice(start, start + size)
            left = delta[block, :, :, outputs].transpose(2, 3)
            right = self.view(self.source[rows][block])
            formed = (left.flatten(0, 1) @ right.flatten(0, 1)).unflatten(0, (-1, g))
            parts.append(formed.transpose(2, 3) if self.is_transposed else formed)
        return torch.cat(parts) if len(parts) > 1 else parts[0]


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
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""
        return (self.rows.nbytes + self.values.nbytes) // max(1, self.num_examples)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the gradients."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.values.device

    def form(self, rows: slice) -> Tensor:
        """Return the gradients of some examples, [rows, p]."""
        return self._sum(self.rows[rows], self.values[rows], self.num_rows).flatten(1)

    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, [p]."""
        values = self.values.flatten(0, 1)[None]
        return self._sum(self.rows.reshape(1, -1), values, self.num_rows).flatten()

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, n], on the CPU."""
        used, position = torch.unique(self.rows, return_inverse=True)
        n, _, o = self.values.shape
        width = max(1, _BLOCK_BYTES // max(1, n * len(used) * self.dtype.itemsize))
        total = torch.zeros(n, n, dtype=torch.float64)
        for start in range(0, o, width):
            values = self.values[:, :, start : start + width]
            total += self_product(self._sum(position, values, len(used)).flatten(1)).cpu()
        return total

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        is_plain = isinstance(other, Outer) and other.delta.shape[1] == 1
        if not is_plain or cast(Outer, other).is_transposed:
            return super().cross(other)
        outer = cast(Outer, other)
        m, _, s, _ = outer.delta.shape
        n, t, _ = self.values.shape
        total = torch.zeros(n, m, dtype=torch.float64, device=self.values.device)
        delta, inputs = outer.delta[:, 0].flatten(0, 1), outer._inputs(slice(0, m))[:, 0]
        size = max(1, _BLOCK_BYTES // max(1, t * m * s * self.dtype.itemsize))
        for start in range(0, n, size):
            block = slice(start, start + size)
            products = _pairs(self.values[block], inputs)
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
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""
        return sum(part.row_bytes for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the gradients."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.parts[0].device

    def form(self, rows: slice) -> Tensor:
        """Return the gradients of some examples, [rows, p]."""
        total = self.parts[0].form(rows)
        for part in self.parts[1:]:
            total = total + part.form(rows)
        return total

    def sum(self) -> Tensor:
        """Return the sum of the gradients of all examples, [p]."""
        return torch.stack([part.sum() for part in self.parts]).sum(0)

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, n], on the CPU."""
        total = torch.zeros(self.num_examples, self.num_examples, dtype=torch.float64)
        for at, part in enumerate(self.parts):
            total += part.gram()
            for other in self.parts[:at]:
                products = other.cross(part) if isinstance(other, Rows) else part.cross(other)
                if isinstance(other, Rows):
                    products = products.T
                total += products + products.T
        return total

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


def row_squares(values: Tensor) -> Tensor:
    """Return the squared norm of each row, float64 [n], on the CPU."""
    # Norms of pieces, then their sum in float64: converting the values themselves takes longer.
    if values.shape[1] <= _PIECE:
        return _norm(values).double().square().cpu()
    split = values.shape[1] // _PIECE * _PIECE
    pieces, rest = values[:, :split].unflatten(1, (-1, _PIECE)), values[:, split:]
    norms = torch.cat([_norm(pieces), _norm(rest)[:, None]], 1)
    return norms.double().square().sum(1).cpu()


def self_product(values: Tensor) -> Tensor:
    """Return the inner products of rows, [n, n]."""
    if values.device.type != "cpu" or len(values) <= _FEW:
        return values @ values.T
    # NumPy sees that the result is symmetric, and computes half of it.
    array = values.detach().numpy()
    return torch.from_numpy(array @ array.T)


def _norm(values: Tensor) -> Tensor:
    return cast(Tensor, torch.linalg.vector_norm(values, dim=-1))


def _pairs(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products of all positions, [n · t, m · s]."""
    return left.flatten(0, 1) @ right.flatten(0, 1).T


def _padded(values: Tensor, length: int) -> Tensor:
    """Pad the positions with zeros, which add nothing."""
    missing = length - values.shape[1]
    if not missing:
        return values
    return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], 1)
