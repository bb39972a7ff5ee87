"""Decision boundaries: would a second training draw the same one, and into how many pieces?

From Somepalli et al. (2022), "Can Neural Nets Learn the Same Model Twice? Investigating
Reproducibility and Double Descent from the Decision Boundary Perspective". A decision plane is the
predicted class on a grid in the plane through three images; the planes of a run at one step are
labels [triplets, rows, columns].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import ndimage

from sonde.analysis.arrays.kernels import Array
from sonde.analysis.sides.families import By, Runs, are_several, over_pairs, over_runs
from sonde.analysis.sides.select import measure_log, run_labels, select_steps
from sonde.exceptions import InvalidInputError, MismatchError

if TYPE_CHECKING:
    from sonde.log import Run

Labels = npt.NDArray[Any]  # Any: an integer type wide enough for the classes.

# Which of the 3 x 3 neighbours of a grid point belong to it.
_NEIGHBOURS = {4: ndimage.generate_binary_structure(2, 1), 8: np.ones((3, 3), dtype=int)}

_COMPARISON = ("agreement", "chance", "kappa", "low", "high")


def agreement(labels_a: Labels, labels_b: Labels) -> Array:
    """Compute the fraction of grid points to which two models give the same class.

    The mean over triplets is the reproducibility score R of Somepalli et al., section 4.1.

    Args:
        labels_a: Classes predicted by one model, [triplets, rows, columns].
        labels_b: Classes predicted by the other model on the same planes.

    Returns:
        Agreement per triplet, [triplets]: 1 where both models agree everywhere.

    Raises:
        MismatchError: If the planes differ in shape.

    Example:
        >>> agreement(np.array([[[0, 0], [1, 1]]]), np.array([[[0, 0], [0, 1]]]))
        array([0.75])
    """
    _check_pair(labels_a, labels_b)
    fraction: Array = (labels_a == labels_b).mean(axis=(1, 2))
    return fraction


def chance_agreement(labels_a: Labels, labels_b: Labels) -> float:
    """Compute the agreement expected if both models placed their classes independently.

    Args:
        labels_a: Classes predicted by one model, [triplets, rows, columns].
        labels_b: Classes predicted by the other model on the same planes.

    Returns:
        Σₖ pₖqₖ, with pₖ and qₖ the fractions of all grid points that each model gives to class k.

    Raises:
        MismatchError: If the planes differ in shape.

    Example:
        >>> chance_agreement(np.array([[[0, 1]]]), np.array([[[0, 0]]]))
        0.5
    """
    _check_pair(labels_a, labels_b)
    num_classes = 1 + int(max(labels_a.max(), labels_b.max()))
    p, q = (np.bincount(labels.ravel(), minlength=num_classes) for labels in (labels_a, labels_b))
    return float(p @ q) / labels_a.size**2


def cohen_kappa(observed: float, chance: float) -> float:
    """Correct an agreement for chance: (observed - chance) / (1 - chance), Cohen (1960).

    Args:
        observed: Fraction of equal predictions.
        chance: Fraction expected by chance.

    Returns:
        1 for full agreement, 0 for chance, negative below; NaN if chance agreement is already
        full, as when both models always predict the same single class.

    Example:
        >>> round(cohen_kappa(0.7, 0.5), 3)
        0.4
    """
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def bootstrap_interval(
    values: Array, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of a mean (Efron 1979).

    Args:
        values: One value per unit that is resampled, such as a triplet, [triplets].
        confidence: Probability that the interval aims to cover, between 0 and 1.
        num_resamples: Number of bootstrap means.
        seed: Seed of the resampling; the same seed draws the same triplets.

    Returns:
        Lower and upper end of the interval.

    Raises:
        InvalidInputError: If `confidence` is not between 0 and 1, or there is nothing to resample.

    Example:
        >>> bootstrap_interval(np.array([0.5, 0.5]))
        (0.5, 0.5)
    """
    if not 0 < confidence < 1:
        raise InvalidInputError(f"`confidence` (={confidence}) must be between 0 and 1")
    if num_resamples < 1 or len(values) == 0:
        raise InvalidInputError(
            f"`num_resamples` (={num_resamples}) and the number of values (={len(values)}) "
            "must be >= 1"
        )
    generator = np.random.default_rng(seed)
    means = values[generator.integers(len(values), size=(num_resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def num_regions(labels: Labels, connectivity: int = 8) -> npt.NDArray[np.int64]:
    """Count the connected regions of equal class in each plane.

    The mean over triplets is the fragmentation score F of Somepalli et al., section 5. There is no
    minimum size: a single point is a region.

    Args:
        labels: Predicted classes, [triplets, rows, columns].
        connectivity: 8 joins points that touch at a corner, as in the study; 4 does not.

    Returns:
        Number of regions per triplet, [triplets]; at least 1.

    Raises:
        InvalidInputError: If `labels` has not three axes, or `connectivity` is neither 4 nor 8.

    Example:
        >>> board = np.array([[[0, 1], [1, 0]]])
        >>> num_regions(board), num_regions(board, connectivity=4)
        (array([2]), array([4]))
    """
    if connectivity not in _NEIGHBOURS:
        raise InvalidInputError(f"`connectivity` (={connectivity}) must be 4 or 8")
    _check_planes("labels", labels)
    structure = _NEIGHBOURS[connectivity]
    return np.array(
        [
            sum(_num_components(plane == label, structure) for label in np.unique(plane))
            for plane in labels
        ],
        dtype=np.int64,
    )


def reproducibility(
    runs: Sequence[Run],
    *,
    by: By = None,
    step: int = -1,
    source: str | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Compare the decision planes of every pair of runs.

    Args:
        runs: At least two runs with the measure `decision_planes` on the same planes.
        by: Configuration keys that group the runs; pairs are of runs of one group.
        step: Recorded step; negative counts from the last recorded of each run.
        source: Source of the triplets; the default source of the measure if None.
        confidence: Coverage of the bootstrap interval over triplets.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        Dataset over run and other_run: `agreement` (R, in [0, 1]), `chance` (what independent
        models would reach), `kappa` (R corrected for chance), `low` and `high` (the interval of
        R). Coordinate `step` [run] says which step of each run was compared. With `by`, a Dataset
        over its keys: means of `agreement`, `chance` and `kappa` over the pairs of runs of a group,
        their `_spread` over pairs, and `num_pairs`.

    Raises:
        InvalidInputError: If there are fewer than two runs.
        MismatchError: If runs recorded different planes (inputs, triplets or grid).

    Example::

        result = sonde.analysis.reproducibility([run, other])
        result.agreement.sel(run="seed0", other_run="seed1")
    """
    if by is not None:
        # The interval of a pair is not kept.
        return over_pairs(
            runs, by, partial(_agreement_of_pair, step=step, source=source), "reproducibility"
        )
    if len(runs) < 2:
        raise InvalidInputError(f"`runs` has {len(runs)} runs; expected at least 2 to compare")
    logs = [measure_log(run, "decision_planes", source) for run in runs]
    names = run_labels(runs)
    steps = [log.resolve_step(step) for log in logs]
    digests = [log.attributes(at)["digest"] for log, at in zip(logs, steps, strict=True)]
    different = [name for name, digest in zip(names, digests, strict=True) if digest != digests[0]]
    if different:
        raise MismatchError(
            f"decision planes differ from those of run '{names[0]}' in runs {different}: "
            "record all with the same inputs, triplets and resolution"
        )
    planes = [log.array("labels", at) for log, at in zip(logs, steps, strict=True)]
    tables = {name: np.empty((len(runs), len(runs))) for name in _COMPARISON}
    for row in range(len(runs)):
        for column in range(row, len(runs)):
            per_triplet = agreement(planes[row], planes[column])
            chance = chance_agreement(planes[row], planes[column])
            mean = float(per_triplet.mean())
            low, high = bootstrap_interval(
                per_triplet, confidence=confidence, num_resamples=num_resamples, seed=seed
            )
            values = (mean, chance, cohen_kappa(mean, chance), low, high)
            for name, value in zip(_COMPARISON, values, strict=True):
                tables[name][row, column] = tables[name][column, row] = value
    return xr.Dataset(
        {name: (("run", "other_run"), table) for name, table in tables.items()},
        coords={"run": names, "other_run": names, "step": ("run", steps)},
        attrs={
            "source": logs[0].source,
            "num_triplets": len(planes[0]),
            "confidence": confidence,
            "num_resamples": num_resamples,
            "seed": seed,
        },
    )


def _agreement_of_pair(run: Run, other: Run, *, step: int, source: str | None) -> xr.Dataset:
    """Compare two runs; the interval of a pair is not kept."""
    result = reproducibility([run, other], step=step, source=source, num_resamples=1)
    pair = result[["agreement", "chance", "kappa"]].drop_vars("step")
    return pair.isel(run=0, other_run=1, drop=True)


def fragmentation(
    run: Runs,
    *,
    by: By = None,
    steps: Sequence[int] | None = None,
    source: str | None = None,
    connectivity: int = 8,
) -> xr.Dataset:
    """Count the decision regions of a run over its steps.

    Args:
        run: Run with the measure `decision_planes`, or several, over which means are taken.
        by: Configuration keys that group several runs; each becomes a dimension.
        steps: Recorded steps, negative ones counted from the last; all if None.
        source: Source of the triplets; the default source of the measure if None.
        connectivity: 8, as in the study, or 4.

    Returns:
        Dataset over step: `fragmentation` (mean number of regions per plane), `standard_error` (of
        that mean over triplets; NaN for one triplet) and `regions` [step, triplet]. Of several
        runs [*by, step] their mean, with `fragmentation_spread` over runs and `num_runs`;
        `standard_error` is the mean of those of the runs.

    Example::

        sonde.analysis.fragmentation(run).fragmentation.sel(step=100)
    """
    if are_several(run):
        each = partial(fragmentation, steps=steps, source=source, connectivity=connectivity)
        return over_runs(run, by, each, "fragmentation", no_spread=["standard_error"])
    log = measure_log(run, "decision_planes", source)
    selected = select_steps(log, steps)
    regions = np.stack([num_regions(log.array("labels", step), connectivity) for step in selected])
    num_triplets = regions.shape[1]
    error = (
        regions.std(axis=1, ddof=1) / np.sqrt(num_triplets)
        if num_triplets > 1
        else np.full(len(selected), np.nan)
    )
    return xr.Dataset(
        {
            "fragmentation": ("step", regions.mean(axis=1)),
            "standard_error": ("step", error),
            "regions": (("step", "triplet"), regions),
        },
        coords={"step": selected, "triplet": np.arange(num_triplets)},
        attrs={"run": run.name, "source": log.source, "connectivity": connectivity},
    )


def _num_components(mask: npt.NDArray[np.bool_], structure: npt.NDArray[Any]) -> int:
    # Any: the stubs of some versions do not tell that with `output` only the count is returned.
    count: Any = ndimage.label(mask, structure, output=np.empty(mask.shape, dtype=np.int32))
    return int(count)


def _check_pair(labels_a: Labels, labels_b: Labels) -> None:
    if labels_a.shape != labels_b.shape:
        raise MismatchError(
            f"`labels_a` has shape {list(labels_a.shape)}, `labels_b` {list(labels_b.shape)}; "
            "both must be of the same planes"
        )
    _check_planes("labels_a", labels_a)


def _check_planes(name: str, labels: Labels) -> None:
    if labels.ndim != 3 or labels.size == 0:
        raise InvalidInputError(
            f"`{name}` has shape {list(labels.shape)}; expected [triplets, rows, columns]"
        )
