"""The rule for any operation: it is evaluated again, on each example by itself, within vmap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from sonde.hooks.gradients.factors.dense import Dense, Factor
from sonde.hooks.model.own_warnings import without_warnings

from .places import Deltas, Layout, Place, UnsupportedError, Weight, row_axis_of, widened


def replayed(
    layout: Layout,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tensor: Tensor,
) -> Weight:
    """Return a parameter whose gradients take evaluating an operation again, on each example.

    The operation sees the rows of one example, one or several; `torch.vmap` puts them together.
    """
    n = layout.num_examples
    held = _map((args, dict(kwargs)), lambda x: x if x is tensor else x.detach())
    is_by_row = tensor.ndim == len(layout.shape) and layout.place is Place.FIRST
    row_axis = row_axis_of(layout, tensor) if is_by_row else None

    def is_batched(x: Tensor) -> bool:
        has_rows = x.ndim > 0 and len(x) in (n, layout.shape[0])
        return has_rows and (x is not tensor or row_axis == 0)

    def by_example(x: Tensor) -> Tensor:
        return layout.by_example(x) if len(x) > n else x[:, None]

    def factor(deltas: Deltas) -> Factor:
        if layout.axis != 0:
            raise UnsupportedError("the examples are not on axis 0 of its output")
        leaves: list[Tensor] = []
        _map(held, leaves.append)
        reached = [index for index, delta in enumerate(deltas) if delta is not None]

        def gradient(delta: list[Tensor], rows: list[Tensor]) -> Tensor:
            at = next(index for index, x in enumerate(leaves) if x is tensor)

            def run(value: Tensor) -> list[Tensor]:
                values = iter(
                    [value if x is tensor else row for x, row in zip(leaves, rows, strict=True)]
                )
                replayed_args, replayed_kwargs = _map(held, lambda _: next(values))
                outputs = func(*replayed_args, **replayed_kwargs)
                found: list[Tensor] = []
                _map(outputs, found.append)
                return [found[index] for index in reached]

            return cast(Tensor, torch.func.vjp(run, rows[at])[1](delta)[0])

        given = [by_example(deltas[at]) for at in reached]
        rows = [by_example(x.detach()) if is_batched(x) else x.detach() for x in leaves]
        dims = [0 if is_batched(x) else None for x in leaves]
        # A slow path within vmap is still a path.
        with without_warnings(of_torch=True), torch.enable_grad():
            values = torch.vmap(gradient, (0, dims))(given, rows)
        return Dense(widened(values.detach()))

    return Weight(tensor, factor, row_axis)


def _map(value: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)([_map(item, function) for item in value])
    if isinstance(value, dict):
        return {name: _map(item, function) for name, item in value.items()}
    return value
