"""Two sides of a comparison: layers of runs, matched by example, and what is said of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from .centring import Lost, Side, Treatment, center_layers, common_blocks, lost_messages
from .examples import Matched, leave_out, match
from .maps import Chance
from .select import measure_log, select_layers, select_other_layers
from .stated import count_examples, features_of

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run

_TWO_RUNS = "{0} compares two runs: {0}(a, b), or the pairs of several: {0}(runs, between=True)"

Ids = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """What a comparison was asked for, beside the runs: see `analysis.cka`."""

    step: int
    other_step: int | None
    layers: str | Sequence[str] | None
    other_layers: str | Sequence[str] | None
    source: str | None
    treatment: Treatment
    without: Ids | None
    chance: Chance


def map_of(
    run: Run,
    other: Run | None,
    request: Request,
    messages: dict[str, None],
    what: str,
    compare: Callable[[Side, Side | None, Request], dict[str, Any]],
    state: Callable[[dict[str, Any], Request, Sequence[MeasureLog]], dict[str, Any]],
) -> xr.Dataset:
    """Compare the layers of two sides, their examples matched by id.

    Args:
        run: The run of the first side.
        other: That of the second; None is the same.
        request: What was asked for.
        messages: What to warn of is added here.
        what: What is computed, for messages.
        compare: Makes variables [layer, other_layer, …] of two sides; the second is None where both
            are the same.
        state: Says in attributes how that was done.
    """
    source, treatment = request.source, request.treatment
    advice = _TWO_RUNS.format(what.lower().replace(" ", "_"))
    log = measure_log(run, "activations", source, advice)
    other_log = log if other is None else measure_log(other, "activations", source, advice)
    at = log.resolve_step(request.step)
    other_at = other_log.resolve_step(
        request.step if request.other_step is None else request.other_step
    )
    names = select_layers(log, request.layers)
    other_names = select_other_layers(other_log, request.layers, request.other_layers)
    same = other_log is log and other_at == at
    matched = Matched() if same else match(log, at, other_log, other_at, what)
    if request.without is not None:
        matched = leave_out(log, other_log, matched, request.without)
    sizes = common_blocks([(log, at, names), (other_log, other_at, other_names)])

    lost: Lost = {}
    side = center_layers(log, at, names, matched.rows, sizes, treatment, lost)
    other_side = None
    if not same or other_names != names:
        rows = matched.other_rows
        other_side = center_layers(other_log, other_at, other_names, rows, sizes, treatment, lost)
    made = compare(side, other_side, request)
    num_examples, left_out = count_examples(log, side.sizes, treatment.unbiased)
    messages.update(dict.fromkeys([*matched.messages, *lost_messages(lost, what), *left_out]))
    return xr.Dataset(
        made,
        coords={"layer": names, "other_layer": other_names},
        attrs={
            **state(made, request, (log, other_log)),
            "run": run.name,
            "other_run": other_log.run.name,
            "step": at,
            "other_step": other_at,
            "source": log.source,
            "features": features_of(log),
            "other_features": features_of(other_log),
            "num_examples": num_examples,
        },
    )
