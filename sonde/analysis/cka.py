"""Compare layers by CKA: within a run, between runs, between steps.

The estimators are those of `sonde.analysis.kernels`. Layer by layer maps of this kind are figure 1
of Nguyen, Raghu and Kornblith (2021), "Do Wide and Deep Networks Learn the Same Things?".
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from sonde.analysis.arrays import kernels
from sonde.analysis.sides.centring import (
    Lost,
    Side,
    center_layer,
    center_layers,
    common_blocks,
    compare,
    lost_messages,
)
from sonde.analysis.sides.examples import Matched, match
from sonde.analysis.sides.select import (
    measure_log,
    select_layers,
    select_other_layers,
    select_steps,
)
from sonde.log.relative import BESIDE

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run

_OF_SKETCHES = (
    "HSIC corrected for the sketch; the ratio is biased upwards by a few percent where the sketch "
    "is small, and standard_error is up to 3 times too large"
)
_TWO_RUNS = "cka compares two runs: cka(a, b)"
_ONE_RUN = "cka_over_steps takes one run: call it for each of them"


def cka(
    run: Run,
    other: Run | None = None,
    *,
    step: int = -1,
    other_step: int | None = None,
    layers: str | Sequence[str] | None = None,
    other_layers: str | Sequence[str] | None = None,
    source: str | None = None,
    unbiased: bool = True,
) -> xr.DataArray:
    """Compare every layer of a run with every layer of another run, or of itself, by CKA.

    Examples are matched by their id: sides with the same ids in another order are aligned, sides
    that only overlap are compared on the common ids, with a warning. Equal ids whose targets differ
    are refused, and a warning says where the inputs differ. Layers without variance over the
    examples, or with non-finite activations, are NaN, and a warning names them.

    A layer kept by `Sketch` has a projection error. Its HSIC is corrected so that it is right on
    average; CKA, the ratio, is biased upwards by 3 to 5 % at 64 numbers and 1 % at 256 in
    simulations. The coordinate `standard_error` is a cautious estimate, 1.3 to 3 times too large
    there. A layer with itself is 1, without error.

    A side kept in blocks of examples is compared with the same blocks of the other.

    Memory: 8 * (layers + other_layers) * examples² bytes, and the sketches.

    Args:
        run: Run with the measure `activations`.
        other: Run to compare with; `run` itself if None.
        step: Recorded step of `run`; negative counts from the last recorded.
        other_step: Recorded step of the other side; `step` if None.
        layers: Names or globs of the layers of `run`; all if None.
        other_layers: Names or globs of the layers of the other side; `layers` if None.
        source: Source of the examples; the default source of the measure if None.
        unbiased: Debiased CKA, the ratio of HSIC₁, instead of the biased one.

    Returns:
        CKA [layer, other_layer]: 0 unrelated, 1 equal up to rotation and scale; debiased values of
        unrelated layers scatter around 0 and may be negative. Attributes hold the estimator, both
        runs and steps, the source and the number of examples compared. Where a layer is a sketch
        there is a coordinate `standard_error` [layer, other_layer].

    Raises:
        LayerNotFoundError: If a name or glob fits no layer of a side.
        MismatchError: If the sides do not share at least 4 examples, have no ids, have other
            targets under the same ids, or were kept in different blocks.

    Example::

        similarity = sonde.analysis.cka(run, layers=["layer*.*"])
        similarity.sel(layer="layer1.0", other_layer="layer4.1")
    """
    log = measure_log(run, "activations", source, _TWO_RUNS)
    other_log = log if other is None else measure_log(other, "activations", source, _TWO_RUNS)
    at = log.resolve_step(step)
    other_at = other_log.resolve_step(step if other_step is None else other_step)
    names = select_layers(log, layers)
    other_names = select_other_layers(other_log, layers, other_layers)
    same = other_log is log and other_at == at
    matched = Matched() if same else match(log, at, other_log, other_at, "CKA")
    sizes = common_blocks([(log, at, names), (other_log, other_at, other_names)])

    lost: Lost = {}
    side = center_layers(log, at, names, matched.rows, sizes, unbiased, lost)
    other_side = None
    if not same or other_names != names:
        rows = matched.other_rows
        other_side = center_layers(other_log, other_at, other_names, rows, sizes, unbiased, lost)
    values, errors = compare(side, other_side, unbiased)
    for message in matched.messages + lost_messages(lost):
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return xr.DataArray(
        values,
        dims=("layer", "other_layer"),
        coords={"layer": names, "other_layer": other_names}
        | ({} if errors is None else {"standard_error": (("layer", "other_layer"), errors)}),
        name="cka",
        attrs={
            "estimator": _estimator(unbiased, errors),
            "run": run.name,
            "other_run": other_log.run.name,
            "step": at,
            "other_step": other_at,
            "source": log.source,
            "features": _features_of(log),
            "other_features": _features_of(other_log),
            "num_examples": _num_examples(log, side.sizes, unbiased),
        },
    )


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
    references = center_layers(log, at, names, None, sizes, unbiased, lost)
    values = np.full((len(selected), len(names)), np.nan)
    errors = np.zeros_like(values)
    is_sketched = False
    for row, step in enumerate(selected):
        for column, name in enumerate(names):
            found = center_layer(log, step, name, None, sizes, unbiased, lost)
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
    for message in [*messages, *lost_messages(lost)]:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return xr.DataArray(
        values,
        dims=("step", "layer"),
        coords={"step": selected, "layer": names}
        | ({"standard_error": (("step", "layer"), errors)} if is_sketched else {}),
        name="cka",
        attrs={
            "estimator": _estimator(unbiased, errors if is_sketched else None),
            "run": run.name,
            "reference_step": at,
            "source": log.source,
            "features": _features_of(log),
            "num_examples": _num_examples(log, references.sizes, unbiased),
        },
    )


def _num_examples(log: MeasureLog, sizes: list[int], unbiased: bool) -> int:
    """Count the examples compared, and warn of blocks too small to be centred."""
    if len(sizes) < 2:
        return sizes[0]
    used = [size for size in sizes if size >= (4 if unbiased else 2)]
    if sum(used) < sum(sizes):
        warnings.warn(
            f"CKA leaves out {sum(sizes) - sum(used)} examples of '{log.source}' in run "
            f"'{log.run.name}': they are a block of fewer than 4",
            RuntimeWarning,
            stacklevel=3,
        )
    return sum(used)


def _features_of(log: MeasureLog) -> str:
    """Say what was compared: flattened or pooled feature maps, and from which store."""
    stores = sorted({field for _, field in log.streams} - set(BESIDE.values()))
    for measure in log.run.info.get("measures") or []:
        if (measure.get("measure"), measure.get("source")) == (log.measure, log.source):
            return f"{measure.get('features', 'as recorded')} ({', '.join(stores)})"
    return f"as recorded ({', '.join(stores)})"


def _estimator(unbiased: bool, errors: kernels.Array | None) -> str:
    estimator = "unbiased" if unbiased else "biased"
    return estimator if errors is None else _OF_SKETCHES if unbiased else f"biased {_OF_SKETCHES}"
