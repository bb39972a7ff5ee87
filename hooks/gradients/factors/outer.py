"""Outer products: the gradients of what multiplies matrices, as factors.

Axes: n, m examples; g groups; t, s positions; o outputs; i inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sonde.hooks.stores.row_products import are_nonzero
from sonde.hooks.stores.self_products import self_product

from .dense import Dense, Factor, block_size, pairs

# Of a product of small matrices, one for each example, to one of large matrices: measured.
_BATCHED_COST = 2.0


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
    def sample(self) -> Tensor:
        """A tensor of their type, where they are."""
        return self.delta

    @property
    def row_bytes(self) -> int:
        """What is held of an example, in bytes."""
        return (self.delta.nbytes + self.source.nbytes) // max(1, self.num_examples)

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

    def double(self) -> Outer:
        """Return the same gradients, of the same factors in float64."""
        delta, source = self.delta.double(), self.source.double()
        return replace(self, delta=delta, source=source, of_outputs=None)

    def are_nonzero(self) -> Tensor:
        """Return which gradients may be other than zero, bool [n]."""
        return are_nonzero(self.delta) & are_nonzero(self.source)

    def products_and_terms(self) -> tuple[Tensor, Tensor | None]:
        """Return the inner products of the gradients, and the squares of what adds up to them."""
        if not self.is_cheaper_formed:
            return self.factored()
        o, row_bytes = self.delta.shape[3], self.num_parameters * self.dtype.itemsize
        every = slice(0, self.num_examples)
        width = block_size(-(-self.num_examples * row_bytes // o))
        total = torch.zeros(self.num_examples, self.num_examples, dtype=torch.float64, device="cpu")
        for start in range(0, o, width):
            total += self_product(self._form(every, slice(start, start + width)).flatten(1)).cpu()
        return total, None

    def cross(self, other: Factor) -> Tensor:
        """Return the inner products with other gradients of the parameter, float64 [n, m]."""
        if isinstance(other, Outer) and other.is_transposed == self.is_transposed:
            if not self.is_cheaper_formed and not other.is_cheaper_formed:
                # What cancels is seen in the squares alone, which are not computed here.
                return self.double()._factored_cross(other.double())
        return super().cross(other)

    def squared_norms(self) -> Tensor:
        """Return the squared norm of each gradient, float64 [n], on the CPU."""
        _, g, t, o = self.delta.shape
        if t * (o + self.num_inputs) > 2 * o * self.num_inputs:
            return super().squared_norms()
        parts = []
        size = block_size(g * t * max(t, self.num_inputs) * self.dtype.itemsize)
        for start in range(0, self.num_examples, size):
            rows = slice(start, start + size)
            delta, inputs = self.delta[rows].double(), self._inputs(rows).double()
            products = (delta @ delta.transpose(2, 3)) * (inputs @ inputs.transpose(2, 3))
            parts.append(products.sum((1, 2, 3)).cpu())
        return torch.cat(parts)

    def factored(self) -> tuple[Tensor, Tensor | None]:
        """Return the inner products from the factors alone, and the squares of their terms."""
        n, g, t, _ = self.delta.shape
        inputs = self._inputs(slice(0, n))
        if self.of_outputs is not None:
            products = self_product(inputs.flatten(1))
            return products.mul_(self.of_outputs.products).double().cpu(), None
        total = torch.zeros(n, n, dtype=torch.float64, device=self.delta.device)
        terms = torch.zeros(n, dtype=torch.float64, device=self.delta.device)
        rows = block_size(n * t * t * self.dtype.itemsize)
        for start in range(0, n, rows):
            block = slice(start, min(start + rows, n))
            # Gradients are symmetric in their examples: only what stands behind is computed.
            behind = slice(start, n)
            for group in range(g):
                if rows >= n:  # Then half of each product is enough.
                    products = self_product(inputs[:, group].flatten(0, 1))
                    products *= self_product(self.delta[:, group].flatten(0, 1))
                else:
                    products = pairs(self.delta[block, group], self.delta[behind, group])
                    products *= pairs(inputs[block, group], inputs[behind, group])
                terms[block] += products.diagonal().view(-1, t).sum(1)
                products = _over_positions(products, t, t)
                total[block, behind] += products
                total[block.stop :, block] += products[:, block.stop - start :].T
        return total.cpu(), terms.cpu()

    def _factored_cross(self, other: Outer) -> Tensor:
        """Return the inner products with others from the factors alone, float64 [n, m]."""
        n, g, t, _ = self.delta.shape
        m, _, s, _ = other.delta.shape
        total = torch.zeros(n, m, dtype=torch.float64, device=self.delta.device)
        theirs = other._inputs(slice(0, m))
        rows = block_size(m * t * s * self.dtype.itemsize)
        for start in range(0, n, rows):
            block = slice(start, start + rows)
            ours = self._inputs(block)
            for group in range(g):
                products = pairs(self.delta[block, group], other.delta[:, group])
                products *= pairs(ours[:, group], theirs[:, group])
                total[block] += _over_positions(products, t, s)
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
        size = block_size(g * t * self.num_inputs * self.dtype.itemsize)
        parts = []
        for start in range(0, n, size):
            block = slice(start, start + size)
            left = delta[block, :, :, outputs].transpose(2, 3)
            right = self.view(self.source[rows][block])
            formed = (left.flatten(0, 1) @ right.flatten(0, 1)).unflatten(0, (-1, g))
            parts.append(formed.transpose(2, 3) if self.is_transposed else formed)
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _over_positions(products: Tensor, t: int, s: int) -> Tensor:
    """Add up products [n · t, m · s] to [n, m]."""
    if t * s == 1:
        return products
    summed: Tensor = products.unflatten(1, (-1, s)).unflatten(0, (-1, t)).sum((1, 3))
    return summed
