"""Draw maps of CKA."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

import xarray as xr
from matplotlib.figure import Figure

from sonde.exceptions import InvalidInputError

from ._drawing import close, color_bar, heat_map, heat_map_figure, label, names_of


def cka(similarity: xr.DataArray) -> Figure:
    """Draw layers against layers, or layers over steps, as a heat map.

    Args:
        similarity: Result of `analysis.cka`, [layer, other_layer], or of `analysis.cka_over_steps`,
            [step, layer].

    Returns:
        Figure with one heat map; layers grow upwards, missing values are grey.

    Raises:
        InvalidInputError: If `similarity` has other dimensions.
    """
    if similarity.dims == ("layer", "other_layer"):
        rows, columns = similarity["layer"], similarity["other_layer"]
        labels = [f"layer{_of(similarity, side)}" for side in ("", "other_")]
    elif similarity.dims == ("step", "layer"):
        similarity = similarity.transpose("layer", "step")
        rows, columns = similarity["layer"], similarity["step"]
        labels = ["layer", "step"]
    else:
        raise InvalidInputError(
            f"`similarity` has dimensions {similarity.dims}; "
            "expected ('layer', 'other_layer') or ('step', 'layer')"
        )
    figure, (axes,) = heat_map_figure(names_of(rows), names_of(columns))
    image = heat_map(axes, similarity.values, names_of(rows), names_of(columns), origin="lower")
    axes.set(ylabel=labels[0], xlabel=labels[1])
    # Debiased values of unrelated layers scatter around 0; a point on the bar says so.
    extend: Literal["min", "neither"] = "min" if similarity.min() < -0.005 else "neither"
    color_bar(figure, image, [axes], _cka_name(similarity), extend)
    return close(figure)


def _of(similarity: xr.DataArray, side: str) -> str:
    """Say which run and step a side of a CKA map is, as far as its attributes know."""
    run, step = similarity.attrs.get(f"{side}run"), similarity.attrs.get(f"{side}step")
    return "" if run is None else f" of {label(run)}, step {label(step)}"


def _cka_name(similarity: xr.DataArray) -> str:
    estimator: Hashable = similarity.attrs.get("estimator", "")
    prefix = "debiased " if estimator == "unbiased" else ""
    reference = similarity.attrs.get("reference_step")
    return f"{prefix}CKA" + ("" if reference is None else f" with step {reference}")
