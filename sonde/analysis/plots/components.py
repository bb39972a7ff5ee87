"""Draw principal components of layers: their share, how they align, CKA without them."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sonde.exceptions import InvalidInputError

from ._drawing import close, color_bar, figure_of, heat_map, heat_map_figure, names_of

_MAPS = {
    "alignment": "alignment of the first",
    "cka": "CKA",
    "cka_without_component": "CKA without the first",
    "cka_without_dominant": "CKA without dominant examples",
}


def components(found: xr.Dataset, *, ax: Axes | None = None) -> Figure:
    """Draw the components of the layers of a run, or their means over runs.

    Args:
        found: Result of `analysis.components`, without further dimensions.
        ax: Axes for the shares of variance alone; a new figure of all if None.

    Returns:
        Figure with layers upwards: shares of variance of the leading components as bars, how the
        first ones align, CKA, and CKA without the first component and without the dominant
        examples.

    Raises:
        InvalidInputError: If `found` is no such result, or has further dimensions.
    """
    if "variance_share" not in found or found["variance_share"].dims != ("layer", "component"):
        raise InvalidInputError(
            "`found` must be a result of sonde.analysis.components of one run or one group of "
            "runs: choose one by .sel()"
        )
    names, others = names_of(found["layer"]), names_of(found["other_layer"])
    if ax is not None:
        figure, axes = figure_of(ax, (0, 0))
        _shares(axes, found, names)
        return figure
    figure, panels = heat_map_figure(names, others, panels=1 + len(_MAPS), cell=0.3)
    for panel, (name, title) in zip(panels[1:], _MAPS.items(), strict=True):
        image = heat_map(panel, found[name].values, names, others, origin="lower")
        panel.set_title(title, fontsize="medium")
    _shares(panels[0], found, names)
    color_bar(figure, image, panels, "squared cosine, CKA")
    return close(figure)


def _shares(axes: Axes, found: xr.Dataset, names: list[str]) -> None:
    shares = np.nan_to_num(found["variance_share"].values)
    left = np.zeros(len(shares))
    for index, share in enumerate(shares.T):
        color = colormaps["cividis"](index / max(shares.shape[1] - 1, 1))
        axes.barh(np.arange(len(shares)), share, left=left, color=color, height=0.9)
        left += share
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(0, 1), ylim=(-0.5, len(names) - 0.5), xlabel="share of variance")
    axes.set_ylabel("layer")
    axes.set_title(f"{shares.shape[1]} leading components", fontsize="medium")
