"""Compare layers by CKA: within a run, between runs, between steps.

The estimators are those of `sonde.analysis.kernels`. Layer by layer maps of this kind are figure 1
of Nguyen, Raghu and Kornblith (2021), "Do Wide and Deep Networks Learn the Same Things?".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from sonde.exceptions import (
    InvalidInputError,
    LayerNotFoundError,
    MismatchError,
    StepNotFoundError,
)
from sonde.log.relative import BESIDE, is_rounding

from . import kernels
from ._examples import Indices, Matched, match
from ._select import measure_log, select_layers, select_steps

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run

# (run, layer, problem) -> the steps at which it was found, in order.
_Lost = dict[tuple[str, str, str], dict[int, None]]


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

    Memory: 8 * (layers + other_layers) * examples² bytes.

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
        runs and steps, the source and the number of examples compared.

    Raises:
        MismatchError: If the sides do not share at least 4 examples, have no ids, or have other
            targets under the same ids.

    Example::

        similarity = sonde.analysis.cka(run, layers=["layer*.*"])
        similarity.sel(layer="layer1.0", other_layer="layer4.1")
    """
    log = measure_log(run, "activations", source)
    other_log = log if other is None else measure_log(other, "activations", source)
    at = log.resolve_step(step)
    other_at = other_log.resolve_step(step if other_step is None else other_step)
    names = select_layers(log, layers)
    other_names = select_layers(other_log, layers if other_layers is None else other_layers)
    same = other_log is log and other_at == at
    matched = Matched() if same else match(log, at, other_log, other_at, "CKA")

    lost: _Lost = {}
    stack = _stack(log, at, names, matched.rows, unbiased, lost)
    if same and other_names == names:
        values = kernels.centered_cka(stack)
    else:
        other_stack = _stack(other_log, other_at, other_names, matched.other_rows, unbiased, lost)
        values = kernels.centered_cka(stack, other_stack)
    for message in matched.messages + _messages(lost):
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return xr.DataArray(
        values,
        dims=("layer", "other_layer"),
        coords={"layer": names, "other_layer": other_names},
        name="cka",
        attrs={
            "estimator": _estimator(unbiased),
            "run": run.name,
            "other_run": other_log.run.name,
            "step": at,
            "other_step": other_at,
            "source": log.source,
            "features": _features_of(log),
            "other_features": _features_of(other_log),
            "num_examples": _num_examples(log, at, stack, unbiased),
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
        where a layer was not recorded, has no variance or is not finite.

    Raises:
        MismatchError: If the run has no ids for these examples, so that they may change from step
            to step, or its examples changed under the same ids when it was resumed.

    Example::

        sonde.analysis.cka_over_steps(run, reference=0).sel(layer="fc")
    """
    log = measure_log(run, "activations", source)
    selected = select_steps(log, steps)
    at = log.resolve_step(reference)
    names = select_layers(log, layers)
    messages: dict[str, None] = {}
    for step in selected:
        if step != at:
            messages.update(dict.fromkeys(match(log, step, log, at, "CKA").messages))
    lost: _Lost = {}
    references = _stack(log, at, names, None, unbiased, lost)
    values = np.full((len(selected), len(names)), np.nan)
    for row, step in enumerate(selected):
        for column, name in enumerate(names):
            centered = _centered(log, step, name, None, unbiased, lost)
            if centered is not None:
                reference_row = references[column : column + 1]
                values[row, column] = kernels.centered_cka(reference_row, centered[None])[0, 0]
    for message in [*messages, *_messages(lost)]:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return xr.DataArray(
        values,
        dims=("step", "layer"),
        coords={"step": selected, "layer": names},
        name="cka",
        attrs={
            "estimator": _estimator(unbiased),
            "run": run.name,
            "reference_step": at,
            "source": log.source,
            "features": _features_of(log),
            "num_examples": _num_examples(log, at, references, unbiased),
        },
    )


def _stack(
    log: MeasureLog,
    step: int,
    names: list[str],
    rows: Indices | None,
    unbiased: bool,
    lost: _Lost,
) -> kernels.Array:
    """Center the Grams of layers into [layers, examples * examples]; NaN rows for lost layers.

    Raises:
        MismatchError: If layers differ in their number of examples.
        StepNotFoundError: If no layer was recorded at this step.
    """
    stack: kernels.Array | None = None
    for index, name in enumerate(names):
        centered = _centered(log, step, name, rows, unbiased, lost)
        if centered is None:
            continue
        if stack is None:  # Filled layer by layer, so that no Gram is in memory twice.
            stack = np.full((len(names), centered.size), np.nan)
        if centered.size != stack.shape[1]:
            raise MismatchError(
                f"layer '{name}' of run '{log.run.name}' has {math.isqrt(centered.size)} examples "
                f"at step {step}, the layers before it {math.isqrt(stack.shape[1])}"
            )
        stack[index] = centered
    if stack is None:
        raise StepNotFoundError(
            f"run '{log.run.name}' recorded none of these layers at step {step}: {', '.join(names)}"
        )
    return stack


def _centered(
    log: MeasureLog,
    step: int,
    name: str,
    rows: Indices | None,
    unbiased: bool,
    lost: _Lost,
) -> kernels.Array | None:
    """Center the Gram of one layer into [examples * examples], None where it was not recorded.

    Raises:
        MismatchError: If it was kept in blocks, and examples have to be picked.
    """
    problem = None
    centered: kernels.Array | None = None
    try:
        grams = log.gram_blocks(name, step, relative=True)
    except LayerNotFoundError:  # The run has this layer, this record has not.
        problem = "no record"
    else:
        where = f"layer '{name}' of run '{log.run.name}'"
        if rows is not None:
            if len(grams) > 1:
                raise MismatchError(f"{where} was kept in blocks, which cannot be aligned by id")
            grams = [grams[0][np.ix_(rows, rows)]]
        if all(np.isfinite(gram).all() for gram in grams):
            centered = _centered_grams(grams, unbiased, where)
            if not centered.any() or is_rounding(log, step, name):
                centered[:] = 0
                problem = "no variance over the examples"
        else:
            centered = np.full(sum(gram.size for gram in grams), np.nan)
            problem = "non-finite activations"
    if problem is not None:
        # A dict, because a step can be read twice: as itself and as the reference.
        lost.setdefault((log.run.name, name, problem), {})[step] = None
    return centered


def _centered_grams(grams: Sequence[kernels.Array], unbiased: bool, where: str) -> kernels.Array:
    """Center one Gram into [examples * examples], or each of its blocks one behind the other.

    Raises:
        InvalidInputError: If one cannot be centred, as with too few examples.
    """
    try:
        return kernels.center_blocks(grams, unbiased)
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error}") from error


def _num_examples(log: MeasureLog, step: int, stack: kernels.Array, unbiased: bool) -> int:
    """Count the examples compared, and warn of blocks too small to be centred."""
    sizes = log.attributes(step).get("block_sizes", [])
    if len(sizes) < 2:
        return math.isqrt(stack.shape[1])
    used = [size for size in sizes if size >= (4 if unbiased else 2)]
    if sum(used) < sum(sizes):
        warnings.warn(
            f"CKA leaves out {sum(sizes) - sum(used)} examples of '{log.source}' in run "
            f"'{log.run.name}': they are a block of fewer than 4",
            RuntimeWarning,
            stacklevel=3,
        )
    return sum(used)


def _messages(lost: _Lost) -> list[str]:
    """Write a line per run and reason, with the layers and their steps."""
    lines: dict[tuple[str, str], list[str]] = {}
    for (run, layer, problem), steps in lost.items():
        at = ", ".join(str(step) for step in steps)
        lines.setdefault((run, problem), []).append(f"'{layer}' (step {at})")
    return [
        f"CKA is NaN for layers of run '{run}' with {problem}: {', '.join(layers)}"
        for (run, problem), layers in lines.items()
    ]


def _features_of(log: MeasureLog) -> str:
    """Say what was compared: flattened or pooled feature maps, and from which store."""
    stores = sorted({field for _, field in log.streams} - set(BESIDE.values()))
    for measure in log.run.info.get("measures", []):
        if (measure.get("measure"), measure.get("source")) == (log.measure, log.source):
            return f"{measure.get('features', 'as recorded')} ({', '.join(stores)})"
    return f"as recorded ({', '.join(stores)})"


def _estimator(unbiased: bool) -> str:
    return "unbiased" if unbiased else "biased"
