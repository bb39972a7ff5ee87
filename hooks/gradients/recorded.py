"""What a record holds of per-example gradients, whether of a probe or of the training itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sonde.hooks.model.walks import parameters_of
from sonde.hooks.stores.log_arrays import to_log_array
from sonde.hooks.stores.row_products import are_inside, are_outside
from sonde.hooks.stores.stores import Full, Gram, Sketch
from sonde.log import LogArray

from .result import ExampleGradientResult


def gradient_arrays(
    result: ExampleGradientResult,
    store: Gram | Sketch | Full,
    dtype: torch.dtype,
    *,
    per_layer: bool,
) -> list[LogArray]:
    """Return the arrays of a record; none where no parameter is covered.

    Each layer's matrix is taken out of the result as it is brought to the type of the log: both
    kinds of all layers at once would be the most that a due step holds.

    Args:
        result: The gradients; its layers are gone afterwards.
        store: The form kept.
        dtype: The type of what is kept of gradients of usual size.
        per_layer: Record each layer's matrix and norms too, not only those of the sum.
    """
    if not result.layer_norms:
        return []
    kind, dims = ("gram", ("example", "other_example"))
    if isinstance(store, Sketch):
        kind, dims = ("sketch", ("example", "sketch"))

    def kept(values: Tensor) -> Tensor:
        return values.to(_dtype_of_products(values, dtype) if kind == "gram" else dtype)

    arrays = []
    if result.total is not None:
        arrays.append(to_log_array(kept(result.total), f"{kind}_total", dims))
        result.total = None
    for layer in list(result.layers):
        values = result.layers.pop(layer)
        if per_layer:
            arrays.append(to_log_array(kept(values), kind, dims, layer))
    for name, values in result.parameters.items():
        rows = values.flatten(1)
        arrays.append(to_log_array(rows, "full", ("example", f"feature_{rows.shape[1]}"), name))
    arrays.append(to_log_array(result.norms, "norm_total", ("example",)))
    if per_layer:
        norms = result.layer_norms.items()
        arrays += [to_log_array(values, "norm", ("example",), layer) for layer, values in norms]
    if result.saturated is not None:
        arrays.append(to_log_array(result.saturated, "is_saturated", ("example",)))
    return arrays


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of what is recorded of a model: float64 if it has some, else float32."""
    is_double = any(parameter.dtype == torch.float64 for parameter in parameters_of(model))
    return torch.float64 if is_double else torch.float32


def _dtype_of_products(gram: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Keep float64 for inner products that float32 would not hold, as of very small gradients."""
    squares = gram.diagonal()
    if are_inside(squares):
        return dtype
    return torch.float64 if bool((are_outside(squares) & (squares != 0)).any()) else dtype
