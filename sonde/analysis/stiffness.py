"""Stiffness: does a step on one example's gradient help another example?

From Fort et al. (2019), "Stiffness: A New Perspective on Generalization in Neural Networks". With
gᵢ the gradient of the loss of example i alone, the stiffness of a pair is sign(gᵢ·gⱼ) or
cos(gᵢ, gⱼ): 1 when a small step that lowers the loss of one lowers that of the other, -1 when it
raises it, 0 for unrelated examples. Pairs of an example with itself never count.

Means over classes are unweighted: `between` is the mean over pairs of classes, not over pairs of
examples, so that a frequent class does not dominate.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from sonde.analysis.arrays.kernels import Array, Real
from sonde.analysis.sides.families import By, Runs, are_several, over_runs
from sonde.analysis.sides.select import measure_log, select_steps
from sonde.exceptions import InvalidInputError, MismatchError
from sonde.log.products import owner_of

if TYPE_CHECKING:
    from sonde.log import MeasureLog, Run

_Labels = npt.NDArray[Any]  # Any: class labels are integers or strings.
_KINDS = ("sign", "cosine")
_FLOAT64, _UNSTATED = "float64", "not stated in the log"


@dataclass(frozen=True)
class Summary:
    """Means of a pair matrix over pairs of different examples.

    Attributes:
        classes: The classes, sorted, [classes].
        class_matrix: Mean over pairs of one example of each class, [classes, other_classes]; NaN
            where there is no pair, as on the diagonal of a class with one example.
        within: Mean of the diagonal of `class_matrix` over the classes that have pairs.
        between: Unweighted mean of `class_matrix` over pairs of different classes.
        overall: Mean over all pairs of examples.
    """

    classes: _Labels
    class_matrix: Array
    within: float
    between: float
    overall: float


def stiffness_matrices(gram: Real) -> tuple[Array, Array]:
    """Compute sign and cosine of every pair of gradients from their inner products.

    An example whose gradient is zero (as late in training) or not finite has no direction: its row
    and column are NaN.

    Args:
        gram: Inner products of per-example gradients, [examples, examples]. Any scale common to
            all gradients, such as the 1/N of a mean loss, cancels.

    Returns:
        The sign matrix, with entries -1, 0, 1, and the cosine matrix, with entries in [-1, 1],
        both [examples, examples].

    Raises:
        InvalidInputError: If `gram` is not square.

    Example:
        >>> sign, cosine = stiffness_matrices(np.array([[4.0, -2.0], [-2.0, 4.0]]))
        >>> cosine
        array([[ 1. , -0.5],
               [-0.5,  1. ]])
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise InvalidInputError(
            f"`gram` has shape {list(gram.shape)}; expected [examples, examples]"
        )
    products = gram.astype(np.float64)
    squares = np.diagonal(products)
    masked = ~(np.isfinite(squares) & (squares > 0))
    norms = np.sqrt(np.where(masked, np.nan, squares))
    # One norm after the other: their product would underflow for gradients below 1e-154.
    cosine: Array = products / norms[:, None] / norms[None, :]
    sign: Array = np.sign(cosine)
    return sign, cosine


def summarize(pairs: Array, labels: _Labels, classes: _Labels | None = None) -> Summary:
    """Average a pair matrix over classes.

    Args:
        pairs: One value per pair of examples, [examples, examples]. NaN pairs are left out; the
            diagonal is never used.
        labels: Class of each example, [examples].
        classes: All classes, sorted; those of the examples if None.

    Returns:
        The class matrix and its means; NaN where there is no pair to average.

    Raises:
        MismatchError: If there is not one label per example.

    Example:
        >>> pairs = np.array([[1, 0.5, -0.2], [0.5, 1, -0.4], [-0.2, -0.4, 1]])
        >>> summarize(pairs, np.array([0, 0, 1])).class_matrix.round(3)
        array([[ 0.5, -0.3],
               [-0.3,  nan]])
    """
    if labels.shape != pairs.shape[:1]:
        raise MismatchError(
            f"`labels` has shape {list(labels.shape)}; expected one for each of the "
            f"{len(pairs)} examples of `pairs`"
        )
    classes = np.unique(labels) if classes is None else classes
    codes = np.searchsorted(classes, labels)
    membership: Array = np.eye(len(classes))[codes]
    counted = ~np.isnan(pairs)
    np.fill_diagonal(counted, False)
    sums = membership.T @ np.where(counted, pairs, 0) @ membership
    counts = membership.T @ counted.astype(np.float64) @ membership
    class_matrix = _ratio(sums, counts)
    return Summary(
        classes=classes,
        class_matrix=class_matrix,
        within=_mean(np.diagonal(class_matrix)),
        between=_mean(class_matrix[~np.eye(len(classes), dtype=bool)]),
        overall=float(_ratio(sums.sum(), counts.sum())),
    )


def stiffness(
    run: Runs,
    *,
    by: Mapping[Any, Hashable] | Literal["class"] | None = "class",  # Any: any class label.
    steps: Sequence[int] | None = None,
    layer: str | None = None,
    source: str | None = None,
    runs_by: By = None,
) -> xr.Dataset:
    """Compute stiffness within and between classes over the steps of a run.

    Args:
        run: Run with the measure `example_gradients`, or several, over which means are taken.
        by: "class" groups the examples by their targets, a mapping by its value for their target
            (fine class to superclass), None not at all.
        steps: Recorded steps, negative ones counted from the last; all if None.
        layer: Only the parameters of this layer; those of all recorded layers together if None.
            With `store=Full()` it may also be the name of one parameter.
        source: Source of the examples; the default source of the measure if None.
        runs_by: Configuration keys that group several runs; each becomes a dimension.

    Returns:
        Dataset over step, of several runs [*runs_by, step] with `_spread` over runs behind each
        name and `num_runs`; each variable for `sign` and for `cosine`:

        - `sign` [step]: mean over all pairs of different examples,
        - `sign_within` [step]: mean over classes of the stiffness inside a class; a class with a
          single example has none and is left out,
        - `sign_between` [step]: unweighted mean over pairs of different classes,
        - `sign_matrix` [step, class, other_class]: the class matrix,

        and `num_zero_gradients` and `num_nonfinite_gradients` [step], the examples that could not
        count, and `num_saturated` [step], those of which float32 rounds the gradient at the head;
        NaN where the record does not say. Attribute `parameters` says which parameters are
        included, `head` in which precision the losses were computed.

    Raises:
        InvalidInputError: If `by` is none of these or lacks a class, or the source has no class
            labels.

    Where a model is sure of an example, softmax − one-hot in float32 rounds the true class's entry
    to 0, and the gradient keeps a third of its direction: cosine and sign fall towards 0 although
    the gradients agree. On probes the losses are computed in float64. The training's own passes,
    and records of versions before, are not, and a warning gives the share of saturated examples
    where that is known. The study very probably computed in float32, so that the fall of stiffness
    late in its trainings has this rounding in it.

    Of the training itself each step has other examples, and classes without one are NaN.

    Example::

        result = sonde.analysis.stiffness(run)
        result.cosine_within.sel(step=100)
    """
    if are_several(run):
        each = partial(stiffness, by=by, steps=steps, layer=layer, source=source)
        return over_runs(run, runs_by, each, "stiffness")
    log = measure_log(run, "example_gradients", source)
    selected = select_steps(log, steps)
    labels = {} if by is None else {step: _labels(log, by, step) for step in selected}
    classes = np.unique(np.concatenate(list(labels.values()))) if labels else None
    num_examples, num_zero, num_nonfinite = 0, [], []
    num_compared: list[int] = []
    num_saturated = [_num_saturated(log, step) for step in selected]
    summaries: dict[str, list[Summary]] = {kind: [] for kind in _KINDS}
    for step in selected:
        gram = log.gram(step, layer)
        num_examples = len(gram)
        num_compared.append(num_examples)
        squares = np.diagonal(gram)
        num_zero.append(int(np.count_nonzero(squares <= 0)))
        num_nonfinite.append(int(np.count_nonzero(~np.isfinite(squares))))
        groups = labels.get(step, np.zeros(num_examples, dtype=np.int64))
        for kind, pairs in zip(_KINDS, stiffness_matrices(gram), strict=True):
            summaries[kind].append(summarize(pairs, groups, classes))
    diverged = [step for step, count in zip(selected, num_nonfinite, strict=True) if count]
    if diverged:
        warnings.warn(
            f"run '{run.name}' has non-finite gradients at steps {diverged}; "
            "these examples are left out",
            RuntimeWarning,
            stacklevel=2,
        )
    heads = [log.attributes(step).get("head", _UNSTATED) for step in selected]
    _warn_of_saturation(run, selected, heads, num_saturated, num_compared)
    result = _dataset(selected, summaries, grouped=by is not None)
    result["num_zero_gradients"] = ("step", num_zero)
    result["num_nonfinite_gradients"] = ("step", num_nonfinite)
    result["num_saturated"] = ("step", num_saturated)
    result.attrs = {
        "run": run.name,
        "source": log.source,
        "by": by if isinstance(by, str) else "none" if by is None else "superclass",
        **_coverage(run, log, layer),
        "layers": ", ".join(_layers(log)) if layer is None else layer,
        "num_examples": num_examples,
        "head": ", ".join(dict.fromkeys(heads)),
    }
    return result


def _num_saturated(log: MeasureLog, step: int) -> float:
    """Count the examples of which float32 rounds the gradient; NaN if the record does not say."""
    if step not in log.steps_of("is_saturated"):
        return float("nan")
    return float(np.count_nonzero(log.array("is_saturated", step)))


def _warn_of_saturation(
    run: Run,
    steps: Sequence[int],
    heads: Sequence[str],
    num_saturated: Sequence[float],
    num_examples: Sequence[int],
) -> None:
    """Warn of the largest share of saturated examples that were not computed in float64."""
    shares = {
        step: number / total
        for step, head, number, total in zip(steps, heads, num_saturated, num_examples, strict=True)
        if head != _FLOAT64 and number > 0
    }
    if shares:
        worst = max(shares, key=lambda step: shares[step])
        warnings.warn(
            f"run '{run.name}' has saturated examples, up to {shares[worst]:.0%} at step {worst}: "
            "their gradients were rounded in float32, so that their cosines and signs are too "
            "small; record ExampleGradients of a Probe, whose losses are computed in float64",
            RuntimeWarning,
            stacklevel=3,
        )


def _coverage(run: Run, log: MeasureLog, layer: str | None) -> dict[str, str | int]:
    """Say which parameters the gradients are of, as far as the log says."""
    kinds: dict[str, str] = {}
    for note in run.notes:
        if note["event"] == "coverage" and note.get("source") == log.source:
            kinds = note["parameters"]
    if layer is not None:
        kinds = {name: kind for name, kind in kinds.items() if layer in (name, owner_of(name))}
    given = ("exact", "fallback")
    included = [name for name, kind in kinds.items() if kind.startswith(given)]
    left_out = [f"{name} ({kind})" for name, kind in kinds.items() if not kind.startswith(given)]
    return {
        "parameters": ", ".join(included) if kinds else "not stated in the log",
        "parameters_left_out": ", ".join(left_out),
        "num_parameters": len(included),
        "num_unsupported": sum(kind.startswith("unsupported") for kind in kinds.values()),
    }


def _layers(log: MeasureLog) -> list[str]:
    """Name the layers; of gradients kept parameter by parameter, those that own the parameters."""
    names = [owner_of(n) if f == "full" else n for n, f in log.streams if n is not None]
    return list(dict.fromkeys(names))


def _labels(log: MeasureLog, by: Mapping[Any, Hashable] | str, step: int) -> _Labels:
    """Group the examples of a record.

    Raises:
        InvalidInputError: If `by` is not valid for this source, or it has no class labels.
    """
    if isinstance(by, str) and by != "class":
        raise InvalidInputError(
            f"`by` (='{by}') must be 'class', a mapping from class to superclass, or None"
        )
    targets: _Labels | None = log.targets_at(step)
    where = f"source '{log.source}' of run '{log.run.name}'"
    if targets is None:
        raise InvalidInputError(f"{where} has no targets; pass by=None")
    if targets.ndim != 1 or targets.dtype.kind not in "iubUS":
        raise InvalidInputError(
            f"{where} has targets of shape {list(targets.shape)} and type {targets.dtype}, "
            "not one class label per example; pass by=None"
        )
    if isinstance(by, str):
        return targets
    missing = sorted({label for label in targets.tolist() if label not in by})
    if missing:
        raise InvalidInputError(f"`by` has no superclass for classes {missing} of {where}")
    return np.array([by[label] for label in targets.tolist()])


def _dataset(
    steps: list[int], summaries: Mapping[str, list[Summary]], *, grouped: bool
) -> xr.Dataset:
    """Join the summaries of both kinds along the step."""
    result = xr.Dataset(coords={"step": steps})
    if grouped:
        classes = next(iter(summaries.values()))[0].classes
        result = result.assign_coords({"class": classes, "other_class": classes})
    for kind, values in summaries.items():
        result[kind] = ("step", [value.overall for value in values])
        if grouped:
            matrices = np.stack([value.class_matrix for value in values])
            result[f"{kind}_within"] = ("step", [value.within for value in values])
            result[f"{kind}_between"] = ("step", [value.between for value in values])
            result[f"{kind}_matrix"] = (("step", "class", "other_class"), matrices)
    return result


def _ratio(sums: Array, counts: Array) -> Array:
    """Divide, with NaN instead of a warning where nothing was counted."""
    ratio: Array = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return ratio


def _mean(values: Array) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
