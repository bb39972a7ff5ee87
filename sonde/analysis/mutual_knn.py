"""Compare layers by their nearest neighbours: within a run, between runs, over families."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from sonde.analysis.arrays import neighbours
from sonde.analysis.arrays.null import Orders, permutations
from sonde.analysis.sides.centring import Side, Treatment
from sonde.analysis.sides.compared import Ids, Request, map_of
from sonde.analysis.sides.families import By, Runs, are_several, over_pairs, over_runs
from sonde.analysis.sides.maps import PAIR, Chance, finished
from sonde.exceptions import InvalidInputError, MismatchError

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run

_WHAT = "mutual kNN"


def mutual_knn(
    run: Runs,
    other: Run | None = None,
    *,
    k: int = 10,
    by: By = None,
    between: bool = False,
    step: int = -1,
    other_step: int | None = None,
    layers: str | Sequence[str] | None = None,
    other_layers: str | Sequence[str] | None = None,
    source: str | None = None,
    without: Ids | None = None,
    null: int = 0,
    level: float = 0.05,
    seed: int = 0,
) -> xr.DataArray:
    """Compare layers by the share of nearest neighbours that they have in common.

    Examples are matched by id, layers are chosen and families averaged as by `cka`. Neighbours are
    those of Euclidean distance, from whole Gram matrices; of a `Sketch` they are those of the
    sketch, whose distances are right on average only.

    Args:
        run: Run with the measure `activations`, or several, over which means are taken.
        other: Run to compare with; `run` itself if None.
        k: How many neighbours of each example.
        by: Configuration keys that group several runs; each becomes a dimension.
        between: Compare the pairs of different runs of each group.
        step: Recorded step of `run`; negative counts from the last recorded.
        other_step: Recorded step of the other side; `step` if None.
        layers: Names or globs of the layers of `run`; all if None.
        other_layers: Names or globs of the layers of the other side; `layers` if None.
        source: Source of the examples; the default source of the measure if None.
        without: Ids of examples that are left out on both sides.
        null: How many permutations of the examples of one side the null is made of.
        level: The probability that chance exceeds the null's quantile.
        seed: Seed of the permutations.

    Returns:
        Mean share over the examples [*by, layer, other_layer], in [0, 1]; by chance `chance` in the
        attributes, k/(n - 1). Coordinates are those of `cka`. NaN, with a warning that names them,
        for layers without variance or with values that are not finite.

    Raises:
        InvalidInputError: If `k` or another number is out of its range.
        MismatchError: If sides do not share examples, or keep blocks of Gram matrices only.

    Example::

        sonde.analysis.mutual_knn(first, second, k=10, null=200)
    """
    if null < 0:
        raise InvalidInputError(f"`null` (={null}) must be at least 0")
    chance = Chance(null, 0, level, seed)
    treatment = Treatment(unbiased=False)  # HKH keeps distances.
    request = Request(step, other_step, layers, other_layers, source, treatment, without, chance)
    messages: dict[str, None] = {}

    def compare(side: Side, other_side: Side | None, asked: Request) -> dict[str, Any]:
        return _compared(side, other_side, k, asked.chance)

    def state(made: dict[str, Any], _: Request, __: Sequence[MeasureLog]) -> dict[str, Any]:
        return {"k": k, "chance": k / (made.pop("num_examples") - 1)}

    def one(a: Run, b: Run | None = None) -> xr.Dataset:
        return map_of(a, b, request, messages, _WHAT, compare, state)

    if not are_several(run):
        if between or by is not None:
            raise InvalidInputError("`between` and `by` take several runs; one run was given")
        averaged = one(run, other)
    elif between:
        averaged = over_pairs(run, by, one, _WHAT, no_spread=["null"])
    else:
        averaged = over_runs(run, by, lambda each: one(each, other), _WHAT, no_spread=["null"])
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    is_within = other is None and not between and other_step in (None, step)
    once = is_within and list(averaged["layer"].values) == list(averaged["other_layer"].values)
    return finished(averaged, "mutual_knn", chance, once=once, ends=(0.0, 1.0))


def _compared(side: Side, other: Side | None, k: int, chance: Chance) -> dict[str, Any]:
    """Compare two sides; see `mutual_knn`."""
    found = _neighbours(side, k)
    others = None if other is None else _neighbours(other, k)
    made: dict[str, Any] = {
        "value": (PAIR, neighbours.mutual_share(found, others)),
        "num_examples": side.sizes[0],
    }
    if chance.null:
        orders = permutations(side.sizes, chance.null, chance.seed)
        maps = neighbours.null_shares(found, others, orders)
        made["null"] = (("permutation", *PAIR), maps)
    return made


def _neighbours(side: Side, k: int) -> list[Orders | None]:
    """Find the neighbours in each layer; None for layers that are lost.

    Raises:
        MismatchError: If only blocks of the Gram matrices are known.
    """
    if len(side.sizes) > 1:
        raise MismatchError(
            f"only blocks of {side.sizes} examples were kept: neighbours in other blocks are not "
            "known; record with store=Gram()"
        )
    n = side.sizes[0]
    is_there = [bool(row.any() and row[0] == row[0]) for row in side.stack]
    pairs = zip(side.stack, is_there, strict=True)
    return [neighbours.nearest(row.reshape(n, n), k) if there else None for row, there in pairs]
