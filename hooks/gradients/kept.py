"""What a store keeps of per-example gradients, added up over the parameters of layers."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sonde.hooks.gradients.factors.dense import Dense, Factor
from sonde.hooks.gradients.uses.parameters import OwnedParameter
from sonde.hooks.stores.host_copies import empty_on_host, start_copy, wait_for_copies
from sonde.hooks.stores.row_products import row_squares
from sonde.hooks.stores.stores import Full, Sketch

from .result import ExampleGradientResult


def reduced_rows(store: Sketch | Full, name: str, factor: Factor) -> tuple[Tensor, Tensor]:
    """Reduce gradients to what a store keeps of them.

    Args:
        store: The store.
        name: The name of the parameter; each has a projection of its own, or the sum of sketches
            would not be unbiased.
        factor: The gradients.

    Returns:
        What is kept, [examples, …], and the squared norms, float64 [examples]; on the CPU.
    """
    if isinstance(store, Full):
        return _formed(store, factor)
    store = Sketch(store.dim, zlib.crc32(f"{store.seed} {name}".encode()))
    values, squares = [], []
    for _, formed in factor.blocks():
        squares.append(row_squares(formed))
        values.append(store.project(formed).cpu())
    return torch.cat(values), torch.cat(squares)


def _formed(store: Full, factor: Factor) -> tuple[Tensor, Tensor]:
    """Return the gradients themselves, which nothing else holds, and their squared norms."""
    dtype = store.dtype or factor.dtype
    if factor.device.type == "cpu" and dtype == factor.dtype:
        formed = factor.form(slice(0, factor.num_examples)).detach()
        # What is formed already may lie in what autograd goes on with.
        return formed.clone() if isinstance(factor, Dense) else formed, row_squares(formed)
    shape = (factor.num_examples, factor.num_parameters)
    values = empty_on_host(shape, dtype, factor.device)
    squares = []
    for rows, formed in factor.blocks():
        squares.append(row_squares(formed))
        start_copy(values[rows], formed.detach())
    wait_for_copies()
    return values, torch.cat(squares)


class KeptGradients:
    """Adds up what is kept of the gradients of parameters.

    Args:
        num_examples: The number of examples.

    Attributes:
        added: The names of the parameters that were added.
        layers: Inner products or sketches of each layer.
        parameters: The gradients themselves of each parameter, [examples, *parameter].
    """

    def __init__(self, num_examples: int) -> None:
        self._num_examples = num_examples
        self._squares: dict[str, Tensor] = {}
        self.added: set[str] = set()
        self.layers: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}

    def add_products(
        self, parameter: OwnedParameter, products: Tensor, squares: Tensor | None = None
    ) -> None:
        """Add the inner products of the gradients of a parameter.

        Args:
            parameter: The parameter.
            products: Those of one set of examples, or between two.
            squares: Of two, the squared norms of the first.
        """
        self.added.add(parameter.name)
        _add(self.layers, parameter.layer, products)
        if squares is not None:
            _add(self._squares, parameter.layer, squares)

    def add_rows(
        self,
        store: Sketch | Full,
        parameter: OwnedParameter,
        values: Tensor,
        squares: Tensor,
        start: int,
    ) -> None:
        """Add what `reduced_rows` returned of some examples, the first of which is `start`."""
        self.added.add(parameter.name)
        rows = slice(start, start + len(values))
        every = squares.new_zeros(self._num_examples)
        every[rows] = squares
        _add(self._squares, parameter.layer, every)
        is_full = isinstance(store, Full)
        kept, name = (
            (self.parameters, parameter.name) if is_full else (self.layers, parameter.layer)
        )
        shape = parameter.tensor.shape if is_full else values.shape[1:]
        if name not in kept and len(values) == self._num_examples:
            kept[name] = values.reshape(len(values), *shape)
            return
        if name not in kept:
            kept[name] = values.new_zeros(self._num_examples, *shape)
        kept[name][rows] += values.reshape(len(values), *shape)

    def sort(self, parameters: Sequence[OwnedParameter]) -> None:
        """Bring layers and parameters into the order of some, whenever they were added."""
        layers = dict.fromkeys(parameter.layer for parameter in parameters)
        self._squares = {name: self._squares[name] for name in layers if name in self._squares}
        self.layers = {name: self.layers[name] for name in layers if name in self.layers}
        names = [parameter.name for parameter in parameters if parameter.name in self.parameters]
        self.parameters = {name: self.parameters[name] for name in names}

    def result(
        self, coverage: dict[str, str], head: str, saturated: Tensor | None
    ) -> ExampleGradientResult:
        """Return what is kept as a result.

        Args:
            coverage: How each parameter is covered.
            head: The precision of the losses.
            saturated: The examples that float32 rounds at the head, if that is known.
        """
        norms, layer_norms = self._norms()
        return ExampleGradientResult(
            self._total(),
            self.layers,
            self.parameters,
            norms,
            layer_norms,
            coverage,
            head,
            saturated,
        )

    def _total(self) -> Tensor | None:
        """Return the sum over all layers."""
        if not self.layers:
            return None
        first, *others = self.layers.values()
        total = first.clone()
        for values in others:
            total += values
        return total

    def _norms(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the norm of each example's gradient, in all and of each layer, float64."""
        squares = self._squares or {name: of.diagonal() for name, of in self.layers.items()}
        if not squares:
            return torch.zeros(self._num_examples, dtype=torch.float64, device="cpu"), {}
        each = torch.stack(list(squares.values())).double()
        return _root(each.sum(0)), dict(zip(squares, _root(each), strict=True))


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    sums[name] = sums[name] + values if name in sums else values


def _root(squares: Tensor) -> Tensor:
    # Products of float32 may leave a square of nearly nothing below zero.
    return squares.clamp(min=0).sqrt()
