"""How much single examples count for CKA: its value less the value without them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from sonde.analysis.arrays import kernels
from sonde.analysis.arrays.influence import leave_one_out
from sonde.analysis.sides.centring import Side, Treatment
from sonde.analysis.sides.compared import Ids, Request, map_of
from sonde.analysis.sides.examples import shared_ids
from sonde.analysis.sides.maps import PAIR, Chance
from sonde.exceptions import MismatchError

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run


def influence(
    run: Run,
    other: Run | None = None,
    *,
    step: int = -1,
    other_step: int | None = None,
    layers: str | Sequence[str] | None = None,
    other_layers: str | Sequence[str] | None = None,
    source: str | None = None,
    unbiased: bool = True,
    without: Ids | None = None,
) -> xr.DataArray:
    """Compute how much CKA of each pair of layers changes by each example.

    A few far examples can make CKA what it is (Davari et al., 2023, arXiv 2210.16156). Here each is
    left out, and what is left centred anew, in closed form. Sketches are not corrected.

    Memory: 8 * layers * other_layers * examples bytes, beside that of `cka`.

    Args:
        run: Run with the measure `activations`.
        other: Run to compare with; `run` itself if None.
        step: Recorded step of `run`; negative counts from the last recorded.
        other_step: Recorded step of the other side; `step` if None.
        layers: Names or globs of the layers of `run`; all if None.
        other_layers: Names or globs of the layers of the other side; `layers` if None.
        source: Source of the examples; the default source of the measure if None.
        unbiased: Debiased CKA.
        without: Ids of examples that are left out on both sides beforehand.

    Returns:
        CKA less CKA without the example, [layer, other_layer, example]: above 0 where the example
        makes the layers more alike. Coordinate `example` holds ids (positions, if there are none),
        `cka` [layer, other_layer] the values with all examples.

    Raises:
        InvalidInputError: If there are fewer than 5 examples.
        MismatchError: If sides do not share examples, or keep blocks of Gram matrices only.

    Example::

        found = sonde.analysis.influence(run, layers="layer4.*")
        abs(found).max(["layer", "other_layer"]).to_series().nlargest(10)
    """
    request = Request(
        step, other_step, layers, other_layers, source, Treatment(unbiased), without, Chance()
    )
    messages: dict[str, None] = {}
    ids: list[int] = []

    def state(made: dict[str, Any], _: Request, logs: Sequence[MeasureLog]) -> dict[str, Any]:
        ids.extend(shared_ids(logs, made["value"][1].shape[-1], without))
        return {"estimator": "unbiased" if unbiased else "biased"}

    found = map_of(run, other, request, messages, "CKA", _compared, state)
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    values = found["value"].rename("influence").assign_attrs(found.attrs)
    return values.assign_coords(example=ids, cka=found["cka"])


def _compared(side: Side, other: Side | None, request: Request) -> dict[str, Any]:
    """Compare two sides with all examples and without each.

    Raises:
        MismatchError: If only blocks of the Gram matrices are known.
    """
    if len(side.sizes) > 1:
        raise MismatchError(
            f"only blocks of {side.sizes} examples were kept; the influence of single examples "
            "takes whole Gram matrices: record with store=Gram()"
        )
    stack = None if other is None else other.stack
    values = kernels.centered_cka(side.stack, stack)
    left = leave_one_out(side.stack, stack, unbiased=request.treatment.unbiased)
    return {"value": ((*PAIR, "example"), values[..., None] - left), "cka": (PAIR, values)}
