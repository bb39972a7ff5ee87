"""Principal components of layers over the examples, and what CKA is without them.

In the blocks of wide and deep networks the first component holds nearly all variance, is shared
within a block and differs between seeds (Nguyen, Raghu and Kornblith, 2021, section 5); a few
examples, far from the others, carry it (Nguyen, Raghu and Kornblith, 2022, "On the Origins of the
Block Structure Phenomenon in Neural Network Representations", arXiv 2202.07184).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from sonde.analysis.arrays.components import participation_ratio, principal
from sonde.analysis.arrays.kernels import Array
from sonde.analysis.sides.centring import Side, Treatment
from sonde.analysis.sides.compared import Request, map_of
from sonde.analysis.sides.examples import shared_ids
from sonde.analysis.sides.families import By, Runs, are_several, over_pairs, over_runs
from sonde.analysis.sides.maps import PAIR, Chance
from sonde.exceptions import InvalidInputError, MismatchError

from .cka import cka

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run

_WHAT = "components"


def components(
    run: Runs,
    other: Run | None = None,
    *,
    num_components: int = 5,
    num_dominant: int = 10,
    by: By = None,
    between: bool = False,
    step: int = -1,
    other_step: int | None = None,
    layers: str | Sequence[str] | None = None,
    other_layers: str | Sequence[str] | None = None,
    source: str | None = None,
    unbiased: bool = True,
) -> xr.Dataset:
    """Find the principal components of layers over the examples, from their Gram matrices.

    Args:
        run: Run with the measure `activations`, or several, over which means are taken.
        other: Run whose components are compared with those of `run`; `run` itself if None.
        num_components: How many leading components are described.
        num_dominant: How many dominant examples are named, and left out once more.
        by: Configuration keys that group several runs; each becomes a dimension.
        between: Compare the pairs of different runs of each group, such as seeds.
        step: Recorded step of `run`; negative counts from the last recorded.
        other_step: Recorded step of the other side; `step` if None.
        layers: Names or globs of the layers of `run`; all if None.
        other_layers: Names or globs of the layers of the other side; `layers` if None.
        source: Source of the examples; the default source of the measure if None.
        unbiased: Debiased CKA.

    Returns:
        Dataset of

        - `variance_share` [layer, component]: of all variance over the examples, in [0, 1],
        - `participation_ratio` [layer]: how many components share it, (Σλ)² / Σλ²,
        - `alignment` [layer, other_layer]: squared cosine of the first components of both, over
          the same examples: 1 the same direction, 1/(n - 1) on average by chance,
        - `cka`, `cka_without_component`, the first of each layer removed, and
          `cka_without_dominant`, the dominant examples left out, [layer, other_layer],

        and of one run or two also

        - `score` [layer, example]: the first component, of length 1, its largest entry positive,
        - `dominant` [layer, rank]: the ids of the examples with the largest scores, and
          `dominant_share` [layer, rank], the share of the first component's variance that they and
          those before hold,
        - `left_out` [rank]: the ids whose mean share over the layers of `run` is largest, which
          `cka_without_dominant` is without.

        Of several runs [*by, …] means, `_spread` and `num_runs`, or with `between` `num_pairs`.
        Layers without variance, or with values that are not finite, are NaN, with a warning.

    Raises:
        InvalidInputError: If a number is out of its range.
        MeasureNotFoundError: If no run has the measure.
        MismatchError: If sides do not share examples, or keep blocks of Gram matrices only.

    Example::

        found = sonde.analysis.components(run)
        found.variance_share.sel(component=0).to_pandas()
    """
    if num_components < 1 or num_dominant < 1:
        raise InvalidInputError(
            f"`num_components` (={num_components}) and `num_dominant` (={num_dominant}) must be at "
            "least 1"
        )
    request = Request(
        step, other_step, layers, other_layers, source, Treatment(unbiased=False), None, Chance()
    )
    messages: dict[str, None] = {}

    def one(a: Run, b: Run | None = None) -> xr.Dataset:
        return _of(a, b, request, num_components, num_dominant, unbiased, messages)

    def averaged(a: Run, b: Run | None = None) -> xr.Dataset:
        found = one(a, b)
        kept = found.drop_vars(["score", "dominant", "dominant_share", "left_out"])
        return kept.drop_vars([name for name in ("example", "rank") if name in kept.coords])

    if not are_several(run):
        if between or by is not None:
            raise InvalidInputError("`between` and `by` take several runs; one run was given")
        result = one(run, other)
    elif between:
        result = over_pairs(run, by, averaged, _WHAT)
    else:
        result = over_runs(run, by, lambda each: averaged(each, other), _WHAT)
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return result


def _of(
    run: Run,
    other: Run | None,
    request: Request,
    num_components: int,
    num_dominant: int,
    unbiased: bool,
    messages: dict[str, None],
) -> xr.Dataset:
    """Describe the components of one run, or of one run beside another.

    Raises:
        InvalidInputError: If too few examples are left without the dominant ones.
    """
    ids: list[int] = []

    def compare(side: Side, other_side: Side | None, _: Request) -> dict[str, Any]:
        return _compared(side, other_side, num_components)

    def state(made: dict[str, Any], _: Request, logs: Sequence[MeasureLog]) -> dict[str, Any]:
        ids.extend(shared_ids(logs, made["score"][1].shape[-1]))
        return {}

    found = map_of(run, other, request, messages, _WHAT, compare, state)
    score = found["score"].values
    number = min(num_dominant, score.shape[1] - 4)
    if number < 1:
        raise InvalidInputError(
            f"`num_dominant` (={num_dominant}) leaves fewer than 4 of {score.shape[1]} examples"
        )
    names = np.array(ids)
    squares = score**2
    order = np.argsort(-squares, axis=1, kind="stable")[:, :number]
    has_score = np.isfinite(score).all(axis=1)
    dominant = np.where(has_score[:, None], names[order], -1)
    share = np.cumsum(np.take_along_axis(squares, order, axis=1), axis=1)
    left_out = np.zeros(0, dtype=np.int64)
    if has_score.any():
        mean = squares[has_score].mean(axis=0)
        left_out = names[np.argsort(-mean, kind="stable")[:number]]
    maps: dict[str, dict[str, Any]] = {
        "cka": {},
        "cka_without_component": {"remove_components": 1},
        "cka_without_dominant": {"without": left_out},
    }
    found = found.assign_coords(example=ids, component=np.arange(found.sizes["component"]))
    with warnings.catch_warnings():
        # The examples matched and the layers lost were said above. What a layer of one component
        # has left is seen in the values.
        warnings.simplefilter("ignore", RuntimeWarning)
        for name, options in maps.items():
            found[name] = cka(
                run,
                other,
                step=request.step,
                other_step=request.other_step,
                layers=request.layers,
                other_layers=request.other_layers,
                source=request.source,
                unbiased=unbiased,
                **options,
            ).drop_vars("standard_error", errors="ignore")
    found["dominant"] = (("layer", "rank"), dominant)
    found["dominant_share"] = (("layer", "rank"), share)
    found["left_out"] = ("rank", left_out)
    found.attrs["estimator"] = found["cka"].attrs["estimator"]
    for name in maps:
        found[name].attrs = {}  # They are those of the whole.
    return found


def _compared(side: Side, other: Side | None, num_components: int) -> dict[str, Any]:
    """Find the components of two sides.

    Raises:
        MismatchError: If only blocks of the Gram matrices are known.
    """
    shares, ratios, score = _components(side, num_components)
    other_score = score if other is None else _components(other, 1)[2]
    return {
        "variance_share": (("layer", "component"), shares),
        "participation_ratio": ("layer", ratios),
        "score": (("layer", "example"), score),
        "alignment": (PAIR, (score @ other_score.T) ** 2),
    }


def _components(side: Side, num_components: int) -> tuple[Array, Array, Array]:
    """Return variance shares, participation ratios and first components of each layer.

    Raises:
        MismatchError: If only blocks of the Gram matrices are known.
    """
    if len(side.sizes) > 1:
        raise MismatchError(
            f"only blocks of {side.sizes} examples were kept; components take whole Gram matrices: "
            "record with store=Gram()"
        )
    n = side.sizes[0]
    number = min(num_components, n - 1)
    shares, score = (
        np.full((len(side.stack), number), np.nan),
        np.full((len(side.stack), n), np.nan),
    )
    ratios = np.full(len(side.stack), np.nan)
    for index, row in enumerate(side.stack):
        if row.any() and np.isfinite(row).all():
            values, vectors = principal(row.reshape(n, n), 1)
            shares[index] = values[:number] / values.sum()
            ratios[index] = participation_ratio(values)
            score[index] = vectors[:, 0]
    return shares, ratios, score
