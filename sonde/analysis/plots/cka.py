"""Draw maps of layers: CKA, mutual neighbours, and what their null says of them."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import product
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from sonde.exceptions import InvalidInputError

from ._drawing import close, color_bar, figure_of, heat_map, heat_map_figure, label, names_of
from .blocks import check_blocks, outline_blocks

Shown = Literal["value", "calibrated", "calibrated_by_maximum", "spread"]

_PAIR = ("layer", "other_layer")
_OUTLINE = "#D55E00"
_PANEL_INCHES = 2.6
_MAX_PANEL_NAMES = 14


def cka(
    similarity: xr.DataArray,
    *,
    show: Shown = "value",
    blocks: xr.Dataset | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw layers against layers, or layers over steps, as a heat map.

    Args:
        similarity: Result of `analysis.cka`, [layer, other_layer] with up to two more dimensions,
            such as width and depth, or of `analysis.cka_over_steps`, [step, layer].
        show: The values, or a coordinate of the result.
        blocks: Result of `analysis.blocks` of the same layers, drawn as squares on a single map.
        ax: Axes to draw one map on; a new figure if None.

    Returns:
        Figure with one heat map, or a grid of them; layers grow upwards, missing values are grey.
        Where the result has a null, lines surround the pairs that are beyond the largest of chance.

    Raises:
        InvalidInputError: If `similarity` has other dimensions, no such coordinate, or a grid is
            to be drawn on `ax`.
    """
    if show != "value" and show not in similarity.coords:
        raise InvalidInputError(
            f"`show` (={show}) is not known of this result; call sonde.analysis.cka with "
            f"{'null=200' if 'calibrated' in show else 'several runs'}"
        )
    check_blocks(blocks)
    if similarity.dims[-2:] == _PAIR and len(similarity.dims) <= 4:
        figure, image, panels = _maps(similarity, show, ax)
        if blocks is not None:
            outline_blocks(panels[0], blocks)
    elif similarity.dims == ("step", "layer"):
        over = similarity.transpose("layer", "step")
        names, steps = names_of(over["layer"]), names_of(over["step"])
        figure, axes = _single(ax, names, steps)
        image = heat_map(axes, over.values, names, steps, origin="lower")
        axes.set(ylabel="layer", xlabel="step")
        panels = [axes]
    else:
        raise InvalidInputError(
            f"`similarity` has dimensions {similarity.dims}; "
            "expected ('layer', 'other_layer') or ('step', 'layer')"
        )
    # Debiased values of unrelated layers scatter around 0; a point on the bar says so.
    lowest = float(_shown(similarity, show).min())
    extend: Literal["min", "neither"] = "min" if lowest < -0.005 else "neither"
    color_bar(figure, image, panels, _name(similarity, show), extend)
    return figure if ax is not None else close(figure)


def _single(ax: Axes | None, rows: list[str], columns: list[str]) -> tuple[Figure, Axes]:
    if ax is not None:
        return figure_of(ax, (0, 0))
    figure, (axes,) = heat_map_figure(rows, columns)
    return figure, axes


def _maps(
    similarity: xr.DataArray, show: Shown, ax: Axes | None
) -> tuple[Figure, AxesImage, list[Axes]]:
    """Draw a map, or a grid of maps over the dimensions in front of the layers.

    Raises:
        InvalidInputError: If a grid is to be drawn on given axes.
    """
    keys = similarity.dims[:-2]
    names, others = names_of(similarity["layer"]), names_of(similarity["other_layer"])
    if not keys:
        figure, axes = _single(ax, names, others)
        image = _map(axes, similarity, show, names, others)
        axes.set(ylabel=f"layer{_of(similarity, '')}", xlabel=f"layer{_of(similarity, 'other_')}")
        _say_mean(axes, similarity)
        return figure, image, [axes]
    if ax is not None:
        raise InvalidInputError(
            f"`ax` holds one map; choose one by .sel() of {', '.join(map(str, keys))}"
        )
    rows, columns = (similarity.sizes[keys[0]] if len(keys) > 1 else 1, similarity.sizes[keys[-1]])
    figure, panels = plt.subplots(
        rows,
        columns,
        layout="constrained",
        figsize=(_PANEL_INCHES * columns + 1.5, _PANEL_INCHES * rows + 0.8),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for row, column in product(range(rows), range(columns)):
        at = dict(zip(keys, (row, column)[-len(keys) :], strict=True))
        part, axes = similarity.isel(at), panels[row, column]
        image = _map(axes, part, show, _thinned(names), _thinned(others))
        values = [f"{key} {part[key].item()}" for key in keys]
        axes.set_title(label(", ".join(values)), fontsize="medium")
        if "num_runs" in part.coords and not int(part["num_runs"]):
            axes.text(0.5, 0.5, "no run", transform=axes.transAxes, ha="center", va="center")
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    return figure, image, list(panels.ravel())


def _map(
    axes: Axes, similarity: xr.DataArray, show: Shown, rows: list[str], columns: list[str]
) -> AxesImage:
    values = _shown(similarity, show)
    image = heat_map(axes, values, rows, columns, origin="lower")
    if "p_value_of_maximum" in similarity.coords:
        beyond = similarity["p_value_of_maximum"].values <= similarity.attrs["level"]
        _outline(axes, beyond)
    return image


def _shown(similarity: xr.DataArray, show: Shown) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = (similarity if show == "value" else similarity[show]).values
    return values


def _outline(axes: Axes, inside: npt.NDArray[np.bool_]) -> None:
    """Draw lines between cells of which one is inside."""
    padded = np.pad(inside, 1)
    lines: list[Any] = []
    for row, column in np.argwhere(padded[1:] != padded[:-1]):
        lines.append([(column - 1.5, row - 0.5), (column - 0.5, row - 0.5)])
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        lines.append([(column - 0.5, row - 1.5), (column - 0.5, row - 0.5)])
    axes.add_collection(LineCollection(lines, colors=_OUTLINE, linewidths=1.2, clip_on=False))


def _thinned(names: list[str]) -> list[str]:
    """Leave out names that a small panel has no room for."""
    every = -(-len(names) // _MAX_PANEL_NAMES)
    return [name if at % every == 0 else "" for at, name in enumerate(names)]


def _say_mean(axes: Axes, similarity: xr.DataArray) -> None:
    for count, what in (("num_runs", "runs"), ("num_pairs", "pairs of runs")):
        if count in similarity.coords:
            axes.set_title(f"mean of {int(similarity[count])} {what}", fontsize="medium")


def _of(similarity: xr.DataArray, side: str) -> str:
    """Say which run and step a side of a CKA map is, as far as its attributes know."""
    run, step = similarity.attrs.get(f"{side}run"), similarity.attrs.get(f"{side}step")
    return "" if run is None else f" of {label(run)}, step {label(step)}"


def _name(similarity: xr.DataArray, show: Shown) -> str:
    estimator: Hashable = similarity.attrs.get("estimator", "")
    if similarity.name not in (None, "cka"):
        measure = label(str(similarity.name).replace("_", " "))
    else:
        prefix = "debiased " if str(estimator).startswith("unbiased") else ""
        measure = f"{prefix}CKA"
    reference = similarity.attrs.get("reference_step")
    how = {
        "value": "",
        "calibrated": ", 0: the null's quantile",
        "calibrated_by_maximum": ", 0: the quantile of the null's maximum",
        "spread": ", spread over runs",
    }[show]
    return f"{measure}{how}" + ("" if reference is None else f" with step {reference}")
