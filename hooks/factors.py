"""Factors: per-example gradients of one parameter, without forming them.

For a linear layer the gradient of example n is a sum of outer products over positions t,
G_n = Σ_t δ_nt a_ntᵀ, so an inner product of two gradients needs only the factors δ and a:
⟨G_n, G_m⟩ = Σ_ts (δ_nt·δ_ms)(a_nt·a_ms). A Gram matrix is computed either that way or by forming
gradients in blocks, whichever takes fewer operations.

Axes: n, m examples; g groups; t, s positions; o outputs; i inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# What a block of formed gradients, or of products between positions, may take.
_BLOCK_BYTES = 256 << 20


class Factor(ABC):
    """The gradients of one parameter, one per example."""

    num_examples: int

    @abstractmethod
    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, m]."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """Return the gradients themselves, flattened as the parameter is, [n, parameter]."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """The size of the gradients if they were formed, in bytes."""


@dataclass
class Dense(Factor):
    """Gradients that are formed already, [n, parameter]."""

    values: Tensor

    def __post_init__(self) -> None:
        self.num_examples = len(self.values)

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, m]."""
        return (self.values @ self.values.T).double()

    def materialize(self) -> Tensor:
        """Return the gradients themselves, [n, parameter]."""
        return self.values

    @property
    def num_bytes(self) -> int:
        """The size of the gradients if they were formed, in bytes."""
        return self.values.numel() * self.values.element_size()


@dataclass
class Outer(Factor):
    """Sums of outer products, as linear and convolutional weights have.

    Attributes:
        delta: Gradients with respect to the outputs, [n, g, t, o].
        inputs: Returns the layer's inputs of some examples, [rows, g, t, i]; a convolution unfolds
            them only when they are needed.
        num_inputs: The size of axis i.
    """

    delta: Tensor
    inputs: Callable[[slice], Tensor]
    num_inputs: int

    def __post_init__(self) -> None:
        self.num_examples = len(self.delta)

    @property
    def num_bytes(self) -> int:
        """The size of the gradients if they were formed, in bytes."""
        n, g, _, o = self.delta.shape
        return n * g * o * self.num_inputs * self.delta.element_size()

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, m]."""
        n, g, t, o = self.delta.shape
        i = self.num_inputs
        # Forming costs n·t·o·i and then n²·o·i; the factored form n²·t²·(o + i + 1).
        formed = n * g * o * i * (t + n)
        factored = n * n * t * t * g * (o + i + 1)
        return self._formed_gram() if formed < factored else self._factored_gram()

    def materialize(self) -> Tensor:
        """Return the gradients themselves, [n, parameter]."""
        return self._form(slice(0, self.delta.shape[3])).flatten(1)

    def _form(self, outputs: slice) -> Tensor:
        """Form the gradients of some outputs, [n, g, outputs, i]."""
        n, g, t, _ = self.delta.shape
        unfolded_bytes = g * t * self.num_inputs * self.delta.element_size()
        rows = max(1, _BLOCK_BYTES // max(1, unfolded_bytes))
        parts = []
        for start in range(0, n, rows):
            block = slice(start, start + rows)
            delta = self.delta[block, :, :, outputs]
            parts.append(delta.transpose(2, 3) @ self.inputs(block))
        return torch.cat(parts)

    def _formed_gram(self) -> Tensor:
        n, g, _, o = self.delta.shape
        total = torch.zeros(n, n, dtype=torch.float64, device=self.delta.device)
        row_bytes = n * g * self.num_inputs * self.delta.element_size()
        width = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, o, width):
            gradients = self._form(slice(start, start + width)).flatten(1)
            total += gradients @ gradients.T
        return total

    def _factored_gram(self) -> Tensor:
        n, g, t, _ = self.delta.shape
        total = torch.zeros(n, n, dtype=torch.float64, device=self.delta.device)
        inputs = self.inputs(slice(0, n))
        pair_bytes = n * t * t * self.delta.element_size()
        rows = max(1, _BLOCK_BYTES // max(1, pair_bytes))
        for group in range(g):
            delta, a = self.delta[:, group].flatten(0, 1), inputs[:, group].flatten(0, 1)
            for start in range(0, n, rows):
                block = slice(start * t, (start + rows) * t)
                # Gradients are symmetric in their examples: only what stands behind is computed.
                products = (delta[block] @ delta[block.start :].T) * (a[block] @ a[block.start :].T)
                sums = products.unflatten(1, (-1, t)).unflatten(0, (-1, t)).sum((1, 3))
                end = start + len(sums)
                total[start:end, start:] += sums
                total[end:, start:end] += sums[:, end - start :].T
        return total


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

    @property
    def num_bytes(self) -> int:
        """The size of the gradients if they were formed, in bytes."""
        n, _, o = self.values.shape
        return n * self.num_rows * o * self.values.element_size()

    def gram(self) -> Tensor:
        """Return the inner products of the gradients, float64 [n, m]."""
        used, position = torch.unique(self.rows, return_inverse=True)
        n, _, o = self.values.shape
        width = max(1, _BLOCK_BYTES // max(1, n * len(used) * self.values.element_size()))
        total = torch.zeros(n, n, dtype=torch.float64, device=self.values.device)
        for start in range(0, o, width):
            sums = self._sum(position, len(used), slice(start, start + width))
            sums[:, used < 0] = 0
            total += sums.flatten(1) @ sums.flatten(1).T
        return total

    def materialize(self) -> Tensor:
        """Return the gradients themselves, [n, parameter]."""
        # One row more, for the positions that go nowhere.
        rows = torch.where(self.rows < 0, self.num_rows, self.rows)
        outputs = slice(0, self.values.shape[2])
        return self._sum(rows, self.num_rows + 1, outputs)[:, : self.num_rows].flatten(1)

    def _sum(self, rows: Tensor, num_rows: int, outputs: slice) -> Tensor:
        values = self.values[:, :, outputs]
        n, t, o = values.shape
        example = torch.arange(n, device=values.device)[:, None] * num_rows
        sums = torch.zeros(n * num_rows, o, dtype=values.dtype, device=values.device)
        sums.index_add_(0, (example + rows).reshape(-1), values.reshape(n * t, o))
        return sums.reshape(n, num_rows, o)
