"""Draw decision planes, and how they agree and fall apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sonde.analysis.sides.select import measure_log, run_labels
from sonde.exceptions import InvalidInputError, MismatchError

from ._drawing import (
    annotate,
    class_colors,
    close,
    color_bar,
    heat_map,
    heat_map_figure,
    label,
    legend,
    line,
    line_colors,
    name_handles,
    named_results,
    names_of,
    numbers,
    step_axis,
)

if TYPE_CHECKING:
    from sonde.log import Run


@dataclass(frozen=True)
class Planes:
    """Decision planes as arrays, for those that come from no run.

    Attributes:
        labels: Predicted classes, [triplets, rows, columns].
        extent: Range of both plane coordinates, [triplets, 2, 2], last axes (axis, (low, high)).
        coordinates: The three images in plane coordinates, [triplets, 3, 2].
        name: What the row of pictures is called.
        targets: True classes of the three images, [triplets, 3], if known.
    """

    labels: npt.NDArray[Any]  # Any: an integer type wide enough for the classes.
    extent: npt.NDArray[np.float64]
    coordinates: npt.NDArray[np.float64]
    name: str = ""
    targets: npt.NDArray[np.int64] | None = None


def decision_planes(
    runs: Run | Planes | Sequence[Run | Planes],
    *,
    triplets: Sequence[int] | None = None,
    step: int = -1,
    source: str | None = None,
) -> Figure:
    """Draw decision planes as small multiples: a row per run, a column per triplet.

    Args:
        runs: One or several runs with the measure `decision_planes` on the same planes, or arrays.
        triplets: Which planes, counted from 0; the first 4 if None.
        step: Recorded step; negative counts from the last recorded of each run.
        source: Source of the triplets; the default source of the measure if None.

    Returns:
        Figure with one picture per plane; the colour is the predicted class, circles are the three
        images, filled with the colour of their true class if it is known.

    Raises:
        InvalidInputError: If there is no run, or no such triplet.
        MismatchError: If the runs do not show the same planes.
    """
    several = list(runs) if isinstance(runs, Sequence) else [runs]
    if not several:
        raise InvalidInputError("`runs` is empty; expected at least one run")
    rows = _all_planes(several, step, source)
    for planes in rows[1:]:
        if not _same_planes(planes, rows[0]):
            raise MismatchError(f"planes of '{planes.name}' are not those of '{rows[0].name}'")
    chosen = _chosen(rows[0], triplets)
    colors = class_colors(1 + max(_highest_class(planes) for planes in rows))
    shown = sorted(set().union(*(_classes(planes, chosen) for planes in rows)))
    legend_columns = math.ceil(len(shown) / (7 * len(rows)))
    figure, panels = plt.subplots(
        len(rows),
        len(chosen),
        layout="constrained",
        figsize=(1.9 * len(chosen) + 0.3 + 0.7 * legend_columns, 1.9 * len(rows) + 0.4),
        squeeze=False,
    )
    for panel_row, planes in zip(panels, rows, strict=True):
        for panel, triplet in zip(panel_row, chosen, strict=True):
            _plane(panel, planes, triplet, colors)
        panel_row[0].set_ylabel(label(planes.name))
    for panel, triplet in zip(panels[0], chosen, strict=True):
        panel.set_title(f"triplet {triplet}", fontsize="medium")
    patches = [Patch(color=colors(number), label=str(number)) for number in shown]
    figure.legend(
        handles=patches,
        loc="outside right upper",
        title="class",
        frameon=False,
        ncols=legend_columns,
        handlelength=1.2,
        columnspacing=1,
    )
    return close(figure)


def reproducibility(result: xr.Dataset) -> Figure:
    """Draw the agreement of every pair of runs as an annotated heat map.

    Args:
        result: Result of `analysis.reproducibility`.

    Returns:
        Figure with one heat map whose colours start at the lowest chance level; up to 8 runs with
        the interval below each value, up to 20 with the value.
    """
    values = result["agreement"].values
    names = names_of(result["run"])
    lowest = min(float(result["chance"].min()), float(values.min()))
    figure, (axes,) = heat_map_figure(names, names, cell=0.75 if len(names) <= 8 else 0.4)
    image = heat_map(axes, values, names, names, limits=(lowest, 1))
    texts = numbers(values)
    if len(names) <= 8:
        low, high = numbers(result["low"].values), numbers(result["high"].values)
        for row, column in np.argwhere(~np.eye(len(names), dtype=bool)):
            texts[row, column] += f"\n{low[row, column]}\u2013{high[row, column]}"
        percent = round(100 * result.attrs["confidence"])
        axes.set_title(f"agreement, {percent} % interval", fontsize="medium")
    if len(names) <= 20:
        annotate(image, texts)
    color_bar(figure, image, [axes], "agreement R, from chance level")
    return close(figure)


def fragmentation(results: xr.Dataset | Mapping[str, xr.Dataset]) -> Figure:
    """Draw the number of decision regions over the steps.

    Args:
        results: Result of `analysis.fragmentation`, or several by name.

    Returns:
        Figure with one line per result and its standard error over triplets as a band.
    """
    named = named_results(results)
    figure, axes = plt.subplots(layout="constrained", figsize=(4.6, 3.2))
    for color, result in zip(line_colors(len(named)), named.values(), strict=True):
        steps, mean = result["step"].values, result["fragmentation"].values
        error = result["standard_error"].values
        line(axes, steps, mean, color, "-")
        axes.fill_between(steps, mean - error, mean + error, color=color, alpha=0.25, linewidth=0)
    step_axis(axes, [result["step"].values for result in named.values()])
    axes.set(ylabel="regions per plane", ylim=(0, None))
    legend(figure, name_handles(named))
    return close(figure)


def _all_planes(runs: Sequence[Run | Planes], step: int, source: str | None) -> list[Planes]:
    """Read the planes of runs at one step; leave arrays as they are."""
    recorded = [run for run in runs if not isinstance(run, Planes)]
    names = iter(run_labels(recorded))
    return [
        run if isinstance(run, Planes) else _read_planes(run, step, source, next(names))
        for run in runs
    ]


def _read_planes(run: Run, step: int, source: str | None, name: str) -> Planes:
    log = measure_log(run, "decision_planes", source)
    return Planes(
        labels=log.array("labels", step),
        extent=log.table("extent"),
        coordinates=log.table("coordinates"),
        name=name,
        targets=log.table("triplet_target"),
    )


def _chosen(planes: Planes, triplets: Sequence[int] | None) -> list[int]:
    """Check the triplets asked for; take the first four if none are named.

    Raises:
        InvalidInputError: If there is no such triplet.
    """
    num_triplets = len(planes.labels)
    chosen = list(range(min(4, num_triplets))) if triplets is None else list(triplets)
    if not chosen or not all(0 <= triplet < num_triplets for triplet in chosen):
        raise InvalidInputError(
            f"`triplets` (={chosen}) must be from 0 to {num_triplets - 1}, at least one"
        )
    return chosen


def _same_planes(planes: Planes, others: Planes) -> bool:
    return np.array_equal(planes.extent, others.extent) and np.array_equal(
        planes.coordinates, others.coordinates
    )


def _highest_class(planes: Planes) -> int:
    targets = 0 if planes.targets is None else int(planes.targets.max())
    return max(int(planes.labels.max()), targets)


def _plane(axes: Axes, planes: Planes, triplet: int, colors: ListedColormap) -> None:
    """Draw one decision plane with its three images."""
    labels = planes.labels[triplet]
    (left, right), (bottom, top) = planes.extent[triplet]
    # Grid points are pixel centres: the picture reaches half a pixel further on every side.
    half_x = (right - left) / (2 * max(1, labels.shape[1] - 1))
    half_y = (top - bottom) / (2 * max(1, labels.shape[0] - 1))
    axes.imshow(
        labels,
        origin="lower",
        extent=(left - half_x, right + half_x, bottom - half_y, top + half_y),
        cmap=colors,
        vmin=-0.5,
        vmax=colors.N - 0.5,
        interpolation="nearest",
        aspect="auto",
    )
    targets = None if planes.targets is None else planes.targets[triplet]
    x, y = planes.coordinates[triplet].T
    fill = ["white"] * 3 if targets is None else [colors(int(target)) for target in targets]
    axes.scatter(x, y, c="white", s=70, linewidths=0, zorder=3)  # A halo, on any colour.
    axes.scatter(x, y, c=fill, s=34, edgecolors="black", linewidths=1.2, zorder=4)
    axes.set(xticks=[], yticks=[])
    axes.set_box_aspect(1)


def _classes(planes: Planes, triplets: Sequence[int]) -> set[int]:
    """Return the classes that pictures of these triplets show, predicted or true."""
    chosen = list(triplets)
    shown = set(np.unique(planes.labels[chosen]).tolist())
    return shown if planes.targets is None else shown | set(planes.targets[chosen].ravel().tolist())
