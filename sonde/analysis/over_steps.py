"""Compare layers with themselves at another step, by CKA."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from sonde.analysis.sides.centring import (
    Lost,
    Side,
    Treatment,
    center_layer,
    center_layers,
    common_blocks,
    compare,
    lost_messages,
)
from sonde.analysis.sides.examples import match
from sonde.analysis.sides.select import measure_log, select_layers, select_steps
from sonde.analysis.sides.stated import count_examples, estimator_of, features_of

if TYPE_CHECKING:
    from sonde.log import Run

_ONE_RUN = "cka_over_steps takes one run: call it for each of them"


def cka_over_steps(
    run: Run,
    *,
    layers: str | Sequence[str] | None = None,
    reference: int = -1,
    steps: Sequence[int] | None = None,
    source: str | None = None,
    unbiased: bool = True,
) -> xr.DataArray:
    """Compare each layer at each step with itself at a reference step.

    Memory: 8 * layers * examples² bytes, whatever the number of steps.

    Args:
        run: Run with the measure `activations`, from a fixed set of examples.
        layers: Names or globs of the layers; all if None.
        reference: Recorded step to compare with; negative counts from the last recorded.
        steps: Recorded steps to compare; all if None.
        source: Source of the examples; the default source of the measure if None.
        unbiased: Debiased CKA, the ratio of HSIC₁, instead of the biased one.

    Returns:
        CKA [step, layer]; 1 at the reference step. NaN, with a warning that names the layers,
        where a layer was not recorded, has no variance or is not finite. Where one was kept by
        `Sketch`, there is a coordinate `standard_error` [step, layer]; see `cka`.

    Raises:
        MismatchError: If the run has no ids for these examples, so that they may change from step
            to step, or its examples changed under the same ids when it was resumed.

    Example::

        sonde.analysis.cka_over_steps(run, reference=0).sel(layer="fc")
    """
    log = measure_log(run, "activations", source, _ONE_RUN)
    selected = select_steps(log, steps)
    at = log.resolve_step(reference)
    names = select_layers(log, layers)
    messages: dict[str, None] = {}
    for step in selected:
        if step != at:
            messages.update(dict.fromkeys(match(log, step, log, at, "CKA").messages))
    sizes = common_blocks([(log, step, names) for step in dict.fromkeys([at, *selected])])
    lost: Lost = {}
    treatment = Treatment(unbiased)
    references = center_layers(log, at, names, None, sizes, treatment, lost)
    values = np.full((len(selected), len(names)), np.nan)
    errors = np.zeros_like(values)
    is_sketched = False
    for row, step in enumerate(selected):
        for column, name in enumerate(names):
            found = center_layer(log, step, name, None, sizes, treatment, lost)
            if found is not None:
                vector, sketch = found
                current = Side(vector[None], references.sizes, [sketch])
                before = Side(
                    references.stack[column : column + 1],
                    references.sizes,
                    [references.rows[column]],
                )
                value, error = compare(before, None if step == at else current, unbiased)
                values[row, column] = value[0, 0]
                errors[row, column] = 0 if error is None else error[0, 0]
                is_sketched = is_sketched or error is not None
    num_examples, left_out = count_examples(log, references.sizes, unbiased)
    for message in [*messages, *lost_messages(lost), *left_out]:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return xr.DataArray(
        values,
        dims=("step", "layer"),
        coords={"step": selected, "layer": names}
        | ({"standard_error": (("step", "layer"), errors)} if is_sketched else {}),
        name="cka",
        attrs={
            "estimator": estimator_of(unbiased, errors if is_sketched else None),
            "run": run.name,
            "reference_step": at,
            "source": log.source,
            "features": features_of(log),
            "num_examples": num_examples,
        },
    )
