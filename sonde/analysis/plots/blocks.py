"""Draw blocks of layers: where they are, over the steps of a run or over families."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sonde.exceptions import InvalidInputError

from ._drawing import close, color_bar, figure_of, heat_map, heat_map_figure, label, names_of

_OUTLINE = "#CC79A7"


def blocks(found: xr.Dataset, *, ax: Axes | None = None) -> Figure:
    """Draw which layers are in blocks, over the steps of a run or over groups of runs.

    Args:
        found: Result of `analysis.blocks`: of a run at one step or at several, or of several runs
            grouped by at most one key.
        ax: Axes to draw on; a new figure if None.

    Returns:
        Figure with the layers upwards. Of a run, a bar per block whose colour is its contrast, with
        lines where its ends lie on halves of the examples; of several runs, the share of runs in
        which a layer is in a block.

    Raises:
        InvalidInputError: If `found` has other dimensions.
    """
    if "is_in_block" in found:
        return _shares(found, ax)
    if "in_block" not in found:
        raise InvalidInputError("`found` is no result of sonde.analysis.blocks")
    over = found if "step" in found.dims else found.expand_dims(step=[found.attrs.get("step", 0)])
    names, steps = names_of(over["layer"]), names_of(over["step"])
    figure, axes = _figure(ax, names, steps)
    colors = ScalarMappable(Normalize(0, 1), colormaps["viridis"])
    for column in range(over.sizes["step"]):
        at = over.isel(step=column)
        for index in range(int(at["num_blocks"])):
            block = at.isel(block=index)
            start, size = float(block["start"]), float(block["end"] - block["start"])
            color = colormaps["viridis"](float(block["contrast"]))
            axes.add_patch(Rectangle((column - 0.35, start - 0.45), 0.7, size - 0.1, color=color))
            for end in ("start", "end"):
                if f"{end}_low" in block and np.isfinite(float(block[f"{end}_low"])):
                    low, high = (float(block[f"{end}_{side}"]) - 0.5 for side in ("low", "high"))
                    axes.plot([column, column], [low, high], color="black", linewidth=1.2)
    axes.set(xlim=(-0.5, over.sizes["step"] - 0.5), ylim=(-0.5, len(names) - 0.5))
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(steps)), steps)
    axes.set(ylabel="layer", xlabel="step")
    figure.colorbar(colors, ax=axes, label="contrast of the block")
    return figure if ax is not None else close(figure)


def check_blocks(found: xr.Dataset | None) -> None:
    """Refuse what cannot be drawn on one map.

    Raises:
        InvalidInputError: If it is no result of `analysis.blocks` of one run at one step.
    """
    if found is not None and ("start" not in found or found["start"].dims != ("block",)):
        raise InvalidInputError(
            "`blocks` must be of one run at one step, or of one map; see sonde.analysis.blocks"
        )


def outline_blocks(axes: Axes, found: xr.Dataset) -> None:
    """Draw the blocks of one map as squares on it."""
    for start, end in zip(found["start"].values, found["end"].values, strict=True):
        square = Rectangle(
            (start - 0.5, start - 0.5),
            end - start,
            end - start,
            fill=False,
            edgecolor=_OUTLINE,
            linewidth=2.4,
        )
        axes.add_patch(square)


def _shares(found: xr.Dataset, ax: Axes | None) -> Figure:
    """Draw the share of runs in which each layer is in a block.

    Raises:
        InvalidInputError: If runs are grouped by several keys.
    """
    shares = found["is_in_block"]
    keys = [dim for dim in shares.dims if dim != "layer"]
    if len(keys) > 1:
        raise InvalidInputError(
            f"`found` has dimensions {shares.dims}; choose one of {', '.join(map(str, keys))} by "
            ".sel()"
        )
    key = keys[0] if keys else "runs"
    values = shares if keys else shares.expand_dims({key: [int(found["num_runs"])]})
    values = values.transpose("layer", key)
    names, columns = names_of(values["layer"]), names_of(values[key])
    figure, axes = _figure(ax, names, columns)
    image = heat_map(axes, values.values, names, columns, origin="lower")
    axes.set(ylabel="layer", xlabel=label(key))
    color_bar(figure, image, [axes], "share of runs with the layer in a block")
    return figure if ax is not None else close(figure)


def _figure(ax: Axes | None, rows: list[str], columns: list[str]) -> tuple[Figure, Axes]:
    if ax is not None:
        return figure_of(ax, (0, 0))
    figure, (axes,) = heat_map_figure(rows, columns)
    return figure, axes
