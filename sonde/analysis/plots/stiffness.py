"""Draw stiffness over the steps and between classes."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sonde.exceptions import InvalidInputError

from ._drawing import (
    LineStyle,
    annotate,
    close,
    color_bar,
    heat_map,
    heat_map_figure,
    legend,
    line,
    line_colors,
    name_handles,
    named_results,
    names_of,
    numbers,
    step_axis,
)


def stiffness(results: xr.Dataset | Mapping[str, xr.Dataset]) -> Figure:
    """Draw stiffness within and between classes over the steps.

    Args:
        results: Result of `analysis.stiffness`, or several by name.

    Returns:
        Figure with two panels, cosine and sign: within classes solid, between classes dashed. A
        result without classes shows the mean over all pairs, dotted.
    """
    named = named_results(results)
    figure, panels = plt.subplots(1, 2, layout="constrained", figsize=(7.2, 3.2), sharex=True)
    styles: dict[str, LineStyle] = {}
    for panel, kind in zip(panels, ("cosine", "sign"), strict=True):
        panel.axhline(0, color="0.6", linewidth=0.8)
        for color, result in zip(line_colors(len(named)), named.values(), strict=True):
            for part, style in _parts(result, kind).items():
                styles[part.removeprefix(f"{kind}_").replace(kind, "all pairs")] = style
                line(panel, result["step"].values, result[part].values, color, style)
        step_axis(panel, [result["step"].values for result in named.values()])
        panel.set_title(f"{kind} stiffness", fontsize="medium")
    handles = [
        Line2D([], [], color="0.2", linestyle=style, marker="o", markersize=3, label=part)
        for part, style in styles.items()
    ]
    legend(figure, [*name_handles(named), *handles])
    return close(figure)


def class_matrix(result: xr.Dataset, step: int = -1) -> Figure:
    """Draw the class matrices of stiffness at one step.

    Args:
        result: Result of `analysis.stiffness` with classes.
        step: Step of the result; -1 is its last.

    Returns:
        Figure with two heat maps, cosine and sign; up to 12 classes with their numbers.

    Raises:
        InvalidInputError: If `result` has no class matrix or no such step.
    """
    if "cosine_matrix" not in result:
        raise InvalidInputError("`result` has no class matrix; use stiffness(run, by='class')")
    steps = result["step"].values.tolist()
    at = steps[-1] if step == -1 else step
    if at not in steps:
        raise InvalidInputError(f"`step` (={step}) is not in the result; steps: {steps}")
    names = names_of(result["class"])
    figure, panels = heat_map_figure(names, names, panels=2, cell=0.36)
    images = []
    for panel, kind in zip(panels, ("cosine", "sign"), strict=True):
        values = result[f"{kind}_matrix"].sel(step=at).values
        image = heat_map(panel, values, names, names, color_map="RdBu_r", limits=(-1, 1))
        images.append(image)
        if len(names) <= 12:
            annotate(image, numbers(values))
        panel.set_title(f"{kind} stiffness, step {at}", fontsize="medium")
        panel.set_xlabel("class")
    panels[0].set_ylabel("class")
    color_bar(figure, images[0], panels, "mean over pairs of examples")
    return close(figure)


def _parts(result: xr.Dataset, kind: str) -> dict[str, LineStyle]:
    """List what a stiffness result can show, with its line style."""
    if f"{kind}_within" in result:
        return {f"{kind}_within": "-", f"{kind}_between": "--"}
    return {kind: ":"}
