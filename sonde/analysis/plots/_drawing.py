"""What the figures share: heat maps, step axes, colours, legends."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from sonde.exceptions import InvalidInputError
from sonde.visible import visible

Values = npt.NDArray[Any]  # Any: heat maps show integers and floats.
LineStyle = Literal["-", "--", ":"]

# Okabe and Ito (2008), "Color Universal Design", for lines.
_LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Tol (2021), "Colour Schemes", the muted scheme, for areas.
_CLASS_COLORS = (
    "#88CCEE",
    "#CC6677",
    "#DDCC77",
    "#117733",
    "#332288",
    "#AA4499",
    "#44AA99",
    "#999933",
    "#882255",
    "#DDDDDD",
)
_MAX_INCHES = 60.0  # Of a heat map; more than that no renderer has memory for.
_NAME_LENGTH = 60
_MISSING = "0.85"  # Light grey: NaN cells of a heat map.


def label(text: object) -> str:
    r"""Return a name as matplotlib draws it letter by letter: without mathematics, not too long.

    `$` begins a formula, and matplotlib's parser ends at one that is none. `\$` is a dollar.
    """
    return visible(text, _NAME_LENGTH).replace("$", r"\$")


def legend_label(text: object) -> str:
    """Return a name for a legend, which leaves out names that begin with an underscore."""
    shown = label(text)
    return f"\u200a{shown}" if shown.startswith("_") else shown


def heat_map_figure(
    rows: Sequence[str], columns: Sequence[str], *, panels: int = 1, cell: float = 0.5
) -> tuple[Figure, list[Axes]]:
    """Make a figure in which every row and column of the heat maps has room for its name.

    The panels share their rows. `cell` is the largest size of a cell in inches.
    """
    most = max(len(rows), len(columns))
    cell = min(cell, max(0.15, 6.0 / most), _MAX_INCHES / most)
    size = _name_size(rows, columns)
    # An average character is about 0.6 times as wide as it is high; 72 points are an inch.
    margins = [max(len(name) for name in names) * 0.6 * size / 72 for names in (rows, columns)]
    width = panels * max(2.0, cell * len(columns)) + margins[0] + 1.3
    height = max(2.0, cell * len(rows)) + (margins[1] if _is_long(columns) else 0.2) + 0.7
    figure, axes = plt.subplots(
        1, panels, layout="constrained", figsize=(width, height), sharey=True, squeeze=False
    )
    return figure, list(axes[0])


def heat_map(
    axes: Axes,
    values: Values,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    color_map: str = "viridis",
    limits: tuple[float, float] = (0, 1),
    origin: Literal["lower", "upper"] = "upper",
) -> AxesImage:
    """Draw a matrix with the names of its rows and columns, and NaN in grey."""
    colors: Colormap = colormaps[color_map].with_extremes(bad=_MISSING)
    # Square cells come from the size of the figure: a fixed aspect confuses constrained layout.
    image = axes.imshow(
        values, origin=origin, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    size = _name_size(rows, columns)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    rotation = 90 if _is_long(columns) else 0
    axes.set_xticks(range(len(columns)), columns, fontsize=size, rotation=rotation)
    axes.tick_params(length=2)
    return image


def color_bar(
    figure: Figure,
    image: AxesImage,
    axes: Sequence[Axes],
    label: str,
    extend: Literal["min", "neither"] = "neither",
) -> None:
    """Add a colour bar about 0.2 inches wide and as high as the heat maps."""
    aspect = figure.get_figheight() / 0.2
    figure.colorbar(image, ax=list(axes), label=label, extend=extend, fraction=0.1, aspect=aspect)


def _name_size(rows: Sequence[str], columns: Sequence[str]) -> float:
    """Choose a font size in points: the more names there are, the smaller."""
    return float(np.interp(max(len(rows), len(columns)), [12, 60], [9, 6.5]))


def _is_long(columns: Sequence[str]) -> bool:
    return max(len(name) for name in columns) > 3 or len(columns) > 20


def annotate(image: AxesImage, texts: Values) -> None:
    """Write a text in each cell, black or white, whichever stands out from its colour."""
    axes, array = image.axes, image.get_array()
    assert array is not None  # Drawn by `heat_map`.
    values = np.ma.filled(array, np.nan)
    size = float(np.interp(len(values), [5, 20], [8, 6]))
    for (row, column), text in np.ndenumerate(texts):
        red, green, blue, _ = image.cmap(image.norm(values[row, column]))
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color="black" if luminance > 0.45 else "white",
        )


def numbers(values: Values) -> Values:
    """Write numbers with two digits and no leading zero; nothing for NaN."""
    texts = np.full(values.shape, "", dtype=object)
    for index, value in np.ndenumerate(values):
        if not np.isnan(value):
            texts[index] = f"{value:.2f}".replace("0.", ".").replace("-.00", ".00")
    return texts


def step_axis(axes: Axes, steps: Sequence[Values]) -> None:
    """Make the step axis logarithmic above the first step after 0, linear below."""
    positive = np.concatenate([values[values > 0] for values in steps])
    axes.set_xlabel("step")
    if len(positive) == 0:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    # One decade of width for the linear part.
    axes.set_xscale("symlog", linthresh=float(positive.min()), linscale=0.5)
    axes.xaxis.set_minor_locator(NullLocator())


def line(axes: Axes, steps: Values, values: Values, color: str, style: LineStyle) -> None:
    axes.plot(steps, values, color=color, linestyle=style, marker="o", markersize=3, linewidth=1.4)


def line_colors(count: int) -> list[str]:
    return [_LINE_COLORS[index % len(_LINE_COLORS)] for index in range(count)]


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Put a legend below the figure, in one row if it fits."""
    if not handles:
        return
    num_characters = sum(len(str(handle.get_label())) + 6 for handle in handles)
    fits = num_characters < 12 * figure.get_figwidth()
    columns = len(handles) if fits else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def class_colors(num_classes: int) -> ListedColormap:
    """Choose one colour per class: Tol's ten, or a rainbow where there are more."""
    if num_classes <= len(_CLASS_COLORS):
        return ListedColormap(_CLASS_COLORS[:num_classes])
    return ListedColormap(colormaps["turbo"](np.linspace(0, 1, num_classes)))


def close(figure: Figure) -> Figure:
    plt.close(figure)
    return figure


def named_results(results: xr.Dataset | Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Make a mapping of results; a single one goes without a name.

    Raises:
        InvalidInputError: If the mapping is empty.
    """
    # A Dataset is a Mapping, too.
    if isinstance(results, xr.Dataset):
        return {"": results}
    if not results:
        raise InvalidInputError("`results` is empty; expected at least one result")
    return dict(results)


def name_handles(named: Mapping[str, xr.Dataset]) -> list[Line2D]:
    """Legend entries for the names of results; none for a single one without a name."""
    return [
        Line2D([], [], color=color, label=legend_label(name))
        for color, name in zip(line_colors(len(named)), named, strict=True)
        if name
    ]


def names_of(values: xr.DataArray) -> list[str]:
    """Return the names along a dimension; the model itself, whose name is empty, is `(model)`."""
    return [label(value) if value != "" else "(model)" for value in values.values.tolist()]


def figure_of(axes: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return the axes to draw on with their figure, or those of a new figure of this size."""
    if axes is None:
        return plt.subplots(layout="constrained", figsize=size)
    figure = axes.get_figure(root=True)
    assert figure is not None  # Axes that were removed have none, and cannot be drawn on.
    return figure, axes
