"""Compare layers by CKA: within a run, between runs, between steps, over families of runs.

The estimators are those of `sonde.analysis.kernels`. Layer by layer maps of this kind are figure 1
of Nguyen, Raghu and Kornblith (2021), "Do Wide and Deep Networks Learn the Same Things?".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from sonde.analysis.sides.centring import Side, Treatment
from sonde.analysis.sides.compared import Ids, Request, map_of
from sonde.analysis.sides.families import By, Runs, are_several, over_pairs, over_runs
from sonde.analysis.sides.maps import Chance, compared, finished, stacked_over
from sonde.analysis.sides.stated import treated_estimator_of
from sonde.exceptions import InvalidInputError

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run


def cka(
    run: Runs,
    other: Run | None = None,
    *,
    by: By = None,
    between: bool = False,
    step: int = -1,
    other_step: int | None = None,
    layers: str | Sequence[str] | None = None,
    other_layers: str | Sequence[str] | None = None,
    source: str | None = None,
    unbiased: bool = True,
    bandwidth: float | Sequence[float] | None = None,
    without: Ids | None = None,
    remove_components: int = 0,
    null: int = 0,
    intervals: int = 0,
    level: float = 0.05,
    seed: int = 0,
) -> xr.DataArray:
    """Compare every layer of a run with every layer of another run, or of itself, by CKA.

    Examples are matched by their id: sides with the same ids in another order are aligned, sides
    that only overlap are compared on the common ids, with a warning. Equal ids whose targets differ
    are refused, and a warning says where the inputs differ. Layers without variance over the
    examples, or with non-finite activations, are NaN, and a warning names them.

    A layer kept by `Sketch` has a projection error. Its HSIC is corrected so that it is right on
    average; CKA, the ratio, is biased upwards by 3 to 5 % at 64 numbers and 1 % at 256 in
    simulations. The coordinate `standard_error` is a cautious estimate, 1.3 to 3 times too large
    there. A layer with itself is 1, without error. With a `bandwidth` or `remove_components`
    nothing is corrected, which the estimator in the attributes says.

    A side kept in blocks of examples is compared with the same blocks of the other.

    Memory: 8 * (layers + other_layers) * examples² bytes, and the sketches; with `null` half as
    much again, and 8 * null * layers * other_layers.

    Args:
        run: Run with the measure `activations`, or several, over which means are taken.
        other: Run to compare with; `run` itself if None. Each of several runs is compared with it.
        by: Configuration keys that group several runs; each becomes a dimension.
        between: Compare the pairs of different runs of each group (the earlier with the later)
            instead of each run with itself.
        step: Recorded step of `run`; negative counts from the last recorded.
        other_step: Recorded step of the other side; `step` if None.
        layers: Names or globs of the layers of `run`; all if None.
        other_layers: Names or globs of the layers of the other side; `layers` if None.
        source: Source of the examples; the default source of the measure if None.
        unbiased: Debiased CKA, the ratio of HSIC₁, instead of the biased one.
        bandwidth: Of an RBF kernel, as a fraction of the root of the median squared distance
            between examples; the linear kernel if None. Several make a dimension `bandwidth`.
        without: Ids of examples that are left out on both sides.
        remove_components: How many leading principal components are removed from each layer.
        null: How many permutations of the examples of one side the null is made of; 200 allow
            p-values down to 1/201.
        intervals: How many halves of the examples the intervals are made of.
        level: The probability that chance exceeds the null's quantile, and that an interval misses.
        seed: Seed of the permutations and halves, which all runs of a family share.

    Returns:
        CKA [*by, bandwidth, layer, other_layer], without the dimensions not asked for: 0 unrelated,
        1 equal up to rotation and scale; debiased values of unrelated layers scatter around 0 and
        may be negative. Attributes hold the estimator, both runs and steps, the source and the
        number of examples compared. What else is known stands in coordinates of the same shape:

        - `standard_error`, where a layer is a sketch; of several runs the root of the mean of their
          squared errors, as they may have the same projection,
        - `spread` (standard deviation over runs or pairs, n - 1) and `num_runs` or `num_pairs`
          [*by], of several runs; `num_values`, where layers are not in all of them,
        - with `null`: `null_mean`, `null_quantile`, `p_value` (1 + #{null ≥ value}) / (null + 1),
          `calibrated` (0 is the quantile, 1 stays), and against the largest value of a permuted
          map `null_maximum` [*by], `p_value_of_maximum`, which holds for all pairs together, and
          `calibrated_by_maximum`,
        - with `intervals`: `low` and `high`.

    Raises:
        InvalidInputError: If `other` is no single run, ids to leave out are not there, or a number
            is out of its range.
        LayerNotFoundError: If a name or glob fits no layer of a side.
        MeasureNotFoundError: If no run has the measure.
        MismatchError: If the sides do not share at least 4 examples, have no ids, have other
            targets under the same ids, or were kept in different blocks.

    Example::

        similarity = sonde.analysis.cka(run, layers=["layer*.*"], null=200)
        similarity.sel(layer="layer1.0", other_layer="layer4.1")
        similarity.where(similarity.p_value_of_maximum <= 0.05)
    """
    _check(remove_components=remove_components, null=null, intervals=intervals)
    chance = Chance(null, intervals, level, seed)
    treatment = Treatment(unbiased, None, remove_components)
    request = Request(step, other_step, layers, other_layers, source, treatment, without, chance)
    messages: dict[str, None] = {}

    def one(a: Run, b: Run | None = None) -> xr.Dataset:
        return _maps(a, b, request, bandwidth, messages)

    if not are_several(run):
        if between or by is not None:
            raise InvalidInputError("`between` and `by` take several runs; one run was given")
        averaged = one(run, other)
    elif between:
        if other is not None:
            raise InvalidInputError(
                "`between` compares the runs with each other; leave out `other`"
            )
        averaged = over_pairs(run, by, one, "CKA", no_spread=_DRAWN)
    else:
        averaged = over_runs(run, by, lambda each: one(each, other), "CKA", no_spread=_DRAWN)
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    is_within = other is None and not between and other_step in (None, step)
    once = is_within and list(averaged["layer"].values) == list(averaged["other_layer"].values)
    ends = (-np.inf, 1.0) if unbiased else (0.0, 1.0)
    return finished(averaged, "cka", chance, once=once, ends=ends)


def within(
    run: Run,
    step: int,
    layers: str | Sequence[str] | None,
    source: str | None,
    unbiased: bool,
    chance: Chance,
    messages: dict[str, None],
) -> xr.Dataset:
    """Compare the layers of a run with each other, and keep all that was drawn.

    Args:
        run: The run.
        step: Recorded step.
        layers: Names or globs of the layers.
        source: Source of the examples.
        unbiased: Debiased CKA.
        chance: What is drawn.
        messages: What to warn of is added here.

    Returns:
        `value`, `null` and `halves`; see `sides.maps.compared`.
    """
    treatment = Treatment(unbiased)
    request = Request(step, None, layers, None, source, treatment, None, chance)
    return map_of(run, None, request, messages, "CKA", _compared, _stated)


_DRAWN = ("null", "halves", "variance")


def _maps(
    run: Run,
    other: Run | None,
    request: Request,
    bandwidth: float | Sequence[float] | None,
    messages: dict[str, None],
) -> xr.Dataset:
    """Compare two sides with one kernel or several.

    Raises:
        InvalidInputError: If a bandwidth is not above 0, or none is in the list.
    """

    def make(width: float | None) -> xr.Dataset:
        treated = replace(request.treatment, bandwidth=width)
        asked = replace(request, treatment=treated)
        return map_of(run, other, asked, messages, "CKA", _compared, _stated)

    for width in np.atleast_1d([] if bandwidth is None else bandwidth):
        if not width > 0:
            raise InvalidInputError(f"`bandwidth` (={width}) must be > 0")
    if bandwidth is None or isinstance(bandwidth, (int, float)):
        made = make(bandwidth)
        return made if bandwidth is None else made.assign_attrs(bandwidth=bandwidth)
    if not len(bandwidth):
        raise InvalidInputError("`bandwidth` is empty; expected at least one, or None for linear")
    return stacked_over("bandwidth", bandwidth, make)


def _compared(side: Side, other: Side | None, request: Request) -> dict[str, Any]:
    return compared(side, other, request.treatment.unbiased, request.chance)


def _stated(made: dict[str, Any], request: Request, logs: Sequence[MeasureLog]) -> dict[str, str]:
    """Name the estimator."""
    errors = made["variance"][1] if "variance" in made else None
    is_sketched = any(field == "sketch" for log in logs for _, field in log.streams)
    return {"estimator": treated_estimator_of(request.treatment, errors, is_sketched=is_sketched)}


def _check(**numbers: int) -> None:
    """Refuse negative numbers.

    Raises:
        InvalidInputError: If one is.
    """
    for name, number in numbers.items():
        if number < 0:
            raise InvalidInputError(f"`{name}` (={number}) must be at least 0")
