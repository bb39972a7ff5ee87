"""Inner products between examples, computed from whichever store was kept.

`Gram` keeps them. `Sketch` and `Full` keep rows, [examples, features]. Per-example gradients kept
by `Full` have one matrix for each parameter; the products of a layer, or of all layers, are the
sums of those of its parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sonde.exceptions import LayerNotFoundError

if TYPE_CHECKING:
    from sonde.log.reading.parts import StreamKey

    from .measure_log import MeasureLog

Products = npt.NDArray[np.float64]

GRADIENTS = "example_gradients"
"""The measure whose `full` arrays belong to parameters, not to layers."""

# How many features are multiplied at once, so that no second copy of a large parameter is needed.
_FEATURES = 1 << 16


def gram(log: MeasureLog, step: int, layer: str | None, *, relative: bool = False) -> Products:
    """Return the Gram matrix of a layer, float64 [examples, examples]; see `MeasureLog.gram`.

    Args:
        log: The measure.
        step: A recorded step.
        layer: A layer, or a parameter whose gradients were kept; None is all of them together.
        relative: Of features minus one vector, the same for all examples: what was subtracted when
            they were recorded, or their mean.

    Raises:
        StepNotFoundError: If the step was not recorded.
        LayerNotFoundError: If the record has no such layer, or keeps only blocks of its matrix.
    """
    at = log.resolve_step(step)
    whole = "gram_total" if layer is None else "gram"
    streams = log.describe(at)
    if (layer, whole) in streams:
        return log.array(whole, at, layer, as_stored=relative).astype(np.float64)
    keys = row_keys(log, at, layer)
    if not keys and (layer, "gram_blocks") in streams:
        raise LayerNotFoundError(
            f"'{log.measure}' kept only blocks of the Gram matrix of layer '{layer}'; read "
            "them by gram_blocks(), or record it with store=Gram()"
        )
    if not keys:
        return log.array(whole, at, layer)  # Raises, and says what there is.
    return _sum_of_products(log, [(key, at) for key in keys], relative=relative)


def cross_gram(log: MeasureLog, step: int, other_step: int, layer: str | None) -> Products:
    """Return the inner products between the examples of two steps; see `MeasureLog.cross_gram`.

    Raises:
        StepNotFoundError: If a step was not recorded.
        LayerNotFoundError: If a record has no such layer, or keeps only Gram matrices.
    """
    at, other_at = log.resolve_step(step), log.resolve_step(other_step)
    keys = row_keys(log, at, layer)
    if not keys and layer is not None:
        log.features(layer, at)  # Raises, and says what there is.
    keys = keys or [(layer, "sketch_total")]
    return _sum_of_products(log, [(key, at) for key in keys], other_at)


def row_keys(log: MeasureLog, step: int, layer: str | None) -> list[StreamKey]:
    """Return the arrays [examples, features] of a record whose products add up to a layer's.

    Args:
        log: The measure.
        step: A recorded step.
        layer: A layer, or a parameter whose gradients were kept; None is all of them together.
    """
    streams = log.describe(step)
    fields = ("sketch_total",) if layer is None else ("full", "sketch")
    own = [(layer, field) for field in fields if (layer, field) in streams]
    if own or log.measure != GRADIENTS:
        return own[:1]
    return [
        (name, field)
        for name, field in streams
        if field == "full" and name is not None and layer in (None, owner_of(name))
    ]


def owner_of(parameter: str) -> str:
    """Return the layer that a parameter belongs to: '' is the model itself."""
    return parameter.rpartition(".")[0]


def _sum_of_products(
    log: MeasureLog,
    rows: list[tuple[StreamKey, int]],
    other_step: int | None = None,
    *,
    relative: bool = False,
) -> Products:
    """Add up, array by array, the products of rows with themselves, or with those of a step."""
    total: Products | None = None
    for (layer, field), step in rows:
        values = log.array(field, step, layer)
        others = values if other_step is None else log.array(field, other_step, layer)
        if total is None:
            total = np.zeros((len(values), len(others)))
        for start in range(0, values.shape[1], _FEATURES):
            left = values[:, start : start + _FEATURES].astype(np.float64)
            if relative:
                with np.errstate(invalid="ignore"):
                    left -= _finite_means(left)
            same = others is values
            right = left if same else others[:, start : start + _FEATURES].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):  # Values that are not finite.
                total += left @ right.T
    assert total is not None  # There is at least one array.
    return total


def _finite_means(features: Products) -> Products:
    """Return the means over examples; 0 where one is not finite, which would spread to all."""
    with np.errstate(invalid="ignore", over="ignore"):
        means: Products = features.mean(0)
    means[~np.isfinite(means)] = 0
    return means
