"""Draw sweeps: a score along a key of the configuration."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sonde.exceptions import InvalidInputError

from ._drawing import close, figure_of, label, legend, legend_label, line_colors

_WIDE = 8.0
"""From this ratio of the largest to the smallest value on, positive values are drawn in logs."""


def sweep(result: xr.Dataset, variable: str | None = None, *, ax: Axes | None = None) -> Figure:
    """Draw a score along a key of the configuration, with its spread over runs as bars.

    Args:
        result: Result of `analysis.sweep`, with one number per run.
        variable: Which score; the first if None.
        ax: Axes to draw on; a new figure if None.

    Returns:
        Figure with a line per group; values that span a factor of 8 have a logarithmic axis.

    Raises:
        InvalidInputError: If `result` is no sweep, has no such score, or more than a number per
            run.
    """
    over, key = result.attrs.get("over"), result.attrs.get("group")
    if over is None:
        raise InvalidInputError("`result` is no sweep; make one with sonde.analysis.sweep")
    dims = (over,) if key is None else (key, over)
    scores = [str(name) for name in result.data_vars if f"{name}_spread" in result]
    if variable is None:
        variable = next((name for name in scores if result[name].dims == dims), scores[0])
    if variable not in scores or result[variable].dims != dims:
        numbers = [name for name in scores if result[name].dims == dims]
        raise InvalidInputError(
            f"`variable` (={variable}) is no single number per run of this sweep; there are: "
            f"{', '.join(numbers) or 'none'}"
        )
    figure, axes = figure_of(ax, (4.6, 3.2))
    at = result[over].values
    is_number = at.dtype.kind in "if"
    places = at if is_number else np.arange(len(at))
    groups = [None] if key is None else result[key].values.tolist()
    colors = line_colors(len(groups))
    for value, color in zip(groups, colors, strict=True):
        part = result if key is None else result.sel({key: value})
        mean, spread = part[variable].values, part[f"{variable}_spread"].values
        there = ~np.isnan(mean)
        axes.errorbar(
            places[there],
            mean[there],
            np.nan_to_num(spread[there]),
            color=color,
            marker="o",
            markersize=3,
            linewidth=1.4,
            capsize=2,
        )
    if not is_number:
        axes.set_xticks(places, [label(value) for value in at.tolist()])
    elif (at > 0).all() and at.max() >= _WIDE * at.min():
        axes.set_xscale("log")
        axes.set_xticks(at, [f"{value:g}" for value in at.tolist()])
        axes.minorticks_off()
    axes.set(xlabel=label(over), ylabel=label(variable.replace("_", " ")))
    num_runs = result["num_runs"].values[result["num_runs"].values > 0]
    low, high = int(num_runs.min()), int(num_runs.max())
    if high > 1:
        count = f"{high}" if low == high else f"{low} to {high}"
        axes.set_title(f"mean and spread of {count} runs", fontsize="medium")
    if key is not None:
        names = [legend_label(f"{key} {value}") for value in groups]
        handles = [
            Line2D([], [], color=color, marker="o", markersize=3, label=name)
            for name, color in zip(names, colors, strict=True)
        ]
        if ax is None:
            legend(figure, handles)
        else:
            axes.legend(handles=handles, frameon=False)
    return figure if ax is not None else close(figure)
