"""Maps of layers against layers with their null and their intervals, as one result.

A map is computed with its maps under permutations, `null` [permutation, layer, other_layer], and on
halves of the examples, `halves` [half, layer, other_layer]. All are averaged over runs alike, so
that the null of a mean over seeds is that of the mean; only then they become p-values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from sonde.analysis.arrays import null as nulls
from sonde.analysis.arrays.kernels import Array
from sonde.analysis.arrays.sketches import self_products

from .centring import Side, compare
from .families import SPREAD

PAIR = ("layer", "other_layer")


@dataclass(frozen=True)
class Chance:
    """What is drawn to judge a map.

    Attributes:
        null: How many permutations of the examples; 0 draws none.
        intervals: How many halves of the examples; 0 draws none.
        level: The probability that chance exceeds a quantile, and that an interval misses.
        seed: Seed of the drawing. Runs of a family are drawn alike.
    """

    null: int = 0
    intervals: int = 0
    level: float = 0.05
    seed: int = 0


def compared(
    side: Side, other: Side | None, unbiased: bool, chance: Chance
) -> dict[str, tuple[tuple[str, ...], Array]]:
    """Compare the layers of two sides by CKA.

    Args:
        side: The layers of one side.
        other: Those of the other; None is the same.
        unbiased: Debiased CKA.
        chance: What is drawn.

    Returns:
        `value` [layer, other_layer], `variance` where a layer is a sketch, and `null` and `halves`
        if they were asked for.
    """
    values, errors = compare(side, other, unbiased)
    made: dict[str, tuple[tuple[str, ...], Array]] = {"value": (PAIR, values)}
    if errors is not None:
        made["variance"] = (PAIR, errors**2)
    if chance.null:
        orders = nulls.permutations(side.sizes, chance.null, chance.seed)
        one = _triangles(side, unbiased)
        others = one if other is None else _triangles(other, unbiased)
        maps = nulls.null_maps(one, others, side.sizes, orders)
        made["null"] = (("permutation", *PAIR), maps)
    if chance.intervals:
        smallest = 4 if unbiased else 2
        drawn = nulls.halves(side.sizes, chance.intervals, chance.seed, smallest)
        stack = None if other is None else other.stack
        maps = nulls.half_maps(side.stack, stack, side.sizes, drawn, unbiased=unbiased)
        made["halves"] = (("half", *PAIR), maps)
    return made


def _triangles(side: Side, unbiased: bool) -> Array:
    """Return the triangles of a side, of sketches scaled to their corrected length."""
    values = nulls.triangles(side.stack, side.sizes)
    if any(rows is not None for rows in side.rows):
        lengths = np.einsum("ij,ij->i", side.stack, side.stack)
        corrected = self_products(side.sketched(), unbiased=unbiased)
        with np.errstate(invalid="ignore", divide="ignore"):
            values *= np.sqrt(lengths / np.where(corrected > 0, corrected, np.nan))
    return values


def finished(
    averaged: xr.Dataset, name: str, chance: Chance, *, once: bool, ends: tuple[float, float]
) -> xr.DataArray:
    """Make one result of a map: its values, and what else is known of them as coordinates.

    Args:
        averaged: `value`, perhaps `variance`, `null`, `halves`, `num_runs` and spreads.
        name: What the values are called.
        chance: What was drawn.
        once: Whether the layers are compared with themselves, so that each pair counts once for
            the maximum, and no layer with itself.
        ends: The smallest and largest value that there can be, which ends intervals.
    """
    value = averaged["value"].rename(name)
    dims = value.dims
    coordinates: dict[str, Any] = {}
    count = next((name for name in ("num_runs", "num_pairs") if name in averaged), None)
    num_runs = xr.DataArray(1) if count is None else averaged[count]
    if "variance" in averaged:
        # Runs may have the same projection. The error of their mean is no larger than this, the
        # root of the mean of their squared errors.
        variance = averaged["variance"].transpose(*dims)
        coordinates["standard_error"] = (dims, np.sqrt(variance.values))
    if f"value{SPREAD}" in averaged:
        coordinates["spread"] = averaged[f"value{SPREAD}"]
        coordinates[str(count)] = num_runs
    if "num_values_of_value" in averaged:
        coordinates["num_values"] = averaged["num_values_of_value"]
    if "halves" in averaged:
        halves = averaged["halves"].transpose("half", *dims).values
        with np.errstate(invalid="ignore"):
            tails = [chance.level / 2, 1 - chance.level / 2]
            around = np.quantile(halves - halves.mean(axis=0), tails, axis=0)
        for end, offset in zip(("low", "high"), around, strict=True):
            coordinates[end] = (dims, np.clip(value.values + offset, *ends))
    attributes = dict(averaged.attrs)
    if "null" in averaged:
        coordinates |= _judged(value, averaged["null"], chance, once)
        attributes |= {
            "null": "examples of one side permuted",
            "num_permutations": averaged.sizes["permutation"],
        }
    if chance.null or chance.intervals:
        attributes |= {"level": chance.level, "seed": chance.seed}
    if chance.intervals:
        attributes["interval"] = "from halves of the examples, drawn without replacement"
    return value.assign_coords(coordinates).assign_attrs(attributes)


def _judged(
    value: xr.DataArray, null: xr.DataArray, chance: Chance, once: bool
) -> dict[str, tuple[tuple[Any, ...], Array]]:
    """Judge a map by its null: each pair by its own, and by that of the largest of all pairs."""
    dims = value.dims
    drawn = null.transpose("permutation", *dims).values
    scores = value.values
    counted = np.ones(scores.shape[-2:], dtype=bool)
    if once:
        counted = np.triu(counted, 1)
    quantile = nulls.null_quantile(drawn, chance.level)
    leading = scores.shape[:-2]
    largest = np.empty((len(drawn), *leading))
    for at in np.ndindex(*leading):
        largest[(slice(None), *at)] = nulls.maxima(drawn[(slice(None), *at)], counted)
    of_maximum = nulls.null_quantile(largest, chance.level)
    return {
        "null_mean": (dims, drawn.mean(axis=0)),
        "null_quantile": (dims, quantile),
        "p_value": (dims, nulls.p_values(scores, drawn)),
        "calibrated": (dims, nulls.calibrated(scores, quantile)),
        "null_maximum": (dims[:-2], of_maximum),
        "p_value_of_maximum": (dims, nulls.p_values(scores, largest[..., None, None])),
        "calibrated_by_maximum": (dims, nulls.calibrated(scores, of_maximum[..., None, None])),
    }


def stacked_over(
    name: str, values: Sequence[float], make: Callable[[float], xr.Dataset]
) -> xr.Dataset:
    """Make a map for each value, and lay them out along a dimension in front of the layers."""
    made = [make(value) for value in values]
    along = xr.concat(
        made, dim=xr.Variable(name, list(values)), coords="minimal", compat="override"
    )
    return along.assign_attrs(made[0].attrs)
