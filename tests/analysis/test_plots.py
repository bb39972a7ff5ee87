from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from sonde.analysis import fragmentation, plots, reproducibility
from sonde.exceptions import InvalidInputError, MismatchError
from sonde.log import Run

WriteRun = Callable[[str, Mapping[int, npt.NDArray[Any]], str], Run]

mpl.use("Agg")


def _image(axes: Axes) -> npt.NDArray[Any]:
    values = axes.images[0].get_array()
    assert values is not None
    filled: npt.NDArray[Any] = np.ma.filled(values, np.nan)
    return filled


def _texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def _names(axes: Axes, side: str) -> list[str]:
    labels = axes.get_xticklabels() if side == "x" else axes.get_yticklabels()
    return [label.get_text() for label in labels]


def _legend(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def _lines(axes: Axes) -> list[list[float]]:
    """Values of the drawn lines, without the line at zero."""
    return [
        np.asarray(line.get_ydata()).tolist() for line in axes.lines if line.get_marker() == "o"
    ]


@pytest.fixture
def similarity() -> xr.DataArray:
    return xr.DataArray(
        [[1.0, -0.1, np.nan], [0.3, 0.9, np.nan]],
        dims=("layer", "other_layer"),
        coords={"layer": ["conv", "fc"], "other_layer": ["a", "b", "dead"]},
        attrs={
            "estimator": "unbiased",
            "run": "seed0",
            "step": 5,
            "other_run": "seed1",
            "other_step": 9,
        },
    )


def test_cka_shows_the_values(similarity: xr.DataArray) -> None:
    actual = _image(plots.cka(similarity).axes[0])
    np.testing.assert_array_equal(actual, similarity.values)


def test_cka_names_the_layers(similarity: xr.DataArray) -> None:
    axes = plots.cka(similarity).axes[0]
    assert (_names(axes, "y"), _names(axes, "x")) == (["conv", "fc"], ["a", "b", "dead"])


def test_cka_says_which_runs_and_steps(similarity: xr.DataArray) -> None:
    axes = plots.cka(similarity).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == (
        "layer of seed0, step 5",
        "layer of seed1, step 9",
    )


def test_cka_bar_names_the_estimator(similarity: xr.DataArray) -> None:
    assert plots.cka(similarity).axes[1].get_ylabel() == "debiased CKA"


def test_cka_over_steps_has_the_steps_below(similarity: xr.DataArray) -> None:
    over_steps = xr.DataArray(
        [[0.2, 0.4], [1, 1]],
        dims=("step", "layer"),
        coords={"step": [0, 100], "layer": ["conv", "fc"]},
        attrs={"estimator": "biased", "reference_step": 100},
    )
    figure = plots.cka(over_steps)
    assert _names(figure.axes[0], "x") == ["0", "100"]
    assert figure.axes[1].get_ylabel() == "CKA with step 100"


def test_the_model_itself_is_called_so(similarity: xr.DataArray) -> None:
    axes = plots.cka(similarity.assign_coords(layer=["", "fc"])).axes[0]
    assert _names(axes, "y") == ["(model)", "fc"]


def test_cka_outlines_what_is_beyond_chance(similarity: xr.DataArray) -> None:
    p = [[0.01, 0.5, np.nan], [0.5, 0.5, np.nan]]
    judged = similarity.assign_coords(p_value_of_maximum=(("layer", "other_layer"), p))
    (outline,) = plots.cka(judged.assign_attrs(level=0.05)).axes[0].collections
    assert isinstance(outline, LineCollection)
    corners = np.concatenate(outline.get_segments())
    assert len(outline.get_segments()) == 4
    assert corners.min(0).tolist() == [-0.5, -0.5]
    assert corners.max(0).tolist() == [0.5, 0.5]


def test_cka_draws_a_coordinate_of_the_result(similarity: xr.DataArray) -> None:
    spread = similarity.copy(data=np.full((2, 3), 0.25))
    figure = plots.cka(similarity.assign_coords(spread=spread), show="spread")
    assert _image(figure.axes[0]).tolist() == [[0.25] * 3] * 2
    assert figure.axes[1].get_ylabel() == "debiased CKA, spread over runs"
    with pytest.raises(InvalidInputError, match=r"`show` \(=calibrated\) is not known .*null=200"):
        plots.cka(similarity, show="calibrated")


def test_cka_of_groups_is_a_grid(similarity: xr.DataArray) -> None:
    groups = xr.concat([similarity, similarity + 0.1], xr.Variable("width", [8, 64]))
    grid = xr.concat([groups, groups], xr.Variable("depth", [1, 2]))
    grid = grid.assign_coords(num_runs=(("depth", "width"), [[3, 3], [3, 0]]))
    figure = plots.cka(grid)
    assert [axes.get_title() for axes in figure.axes[:4]] == [
        f"depth {depth}, width {width}" for depth in (1, 2) for width in (8, 64)
    ]
    np.testing.assert_array_equal(_image(figure.axes[3]), grid[1, 1].values)
    assert _texts(figure.axes[3]) == ["no run"]
    with pytest.raises(InvalidInputError, match=r"`ax` holds one map; .* of depth, width"):
        plots.cka(grid, ax=figure.axes[0])


def test_a_mean_is_not_titled_by_one_run(similarity: xr.DataArray) -> None:
    mean = similarity.assign_coords(num_runs=3).assign_attrs(run=None, other_run=None)
    axes = plots.cka(mean).axes[0]
    assert (axes.get_title(), axes.get_ylabel()) == ("mean of 3 runs", "layer")


def test_cka_is_drawn_on_given_axes(similarity: xr.DataArray) -> None:
    figure, axes = plt.subplots()
    assert plots.cka(similarity, ax=axes) is figure
    np.testing.assert_array_equal(_image(axes), similarity.values)
    plt.close(figure)


def test_cka_refuses_other_results(similarity: xr.DataArray) -> None:
    with pytest.raises(InvalidInputError, match=r"dimensions \('a', 'b'\); expected \('layer', 'o"):
        plots.cka(similarity.rename(layer="a", other_layer="b"))


@pytest.mark.parametrize("num_layers", [5, 60])
def test_names_of_layers_do_not_overlap(num_layers: int) -> None:
    names = [f"layer{index}.conv" for index in range(num_layers)]
    values = xr.DataArray(
        np.eye(num_layers),
        dims=("layer", "other_layer"),
        coords={"layer": names, "other_layer": names},
    )
    figure = plots.cka(values)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    gaps = [above.y0 - below.y1 for below, above in pairwise(boxes)]
    assert min(gaps) > 0


@pytest.fixture
def result() -> xr.Dataset:
    """Stiffness of two classes at three steps."""
    matrices = np.array([[[0.5, -0.1], [-0.1, 0.7]]]) * np.array([1, 0.5, 0.2])[:, None, None]
    steps, dims = [0, 10, 100], ("step", "class", "other_class")
    coords = {"step": steps, "class": [0, 1], "other_class": [0, 1]}
    data = xr.Dataset(coords=coords)
    for kind, scale in (("cosine", 1), ("sign", 1.2)):
        data[kind] = ("step", scale * matrices.mean(axis=(1, 2)))
        data[f"{kind}_within"] = ("step", scale * matrices[:, [0, 1], [0, 1]].mean(axis=1))
        data[f"{kind}_between"] = ("step", scale * matrices[:, 0, 1])
        data[f"{kind}_matrix"] = (dims, scale * matrices)
    return data


def test_stiffness_draws_within_and_between(result: xr.Dataset) -> None:
    axes = plots.stiffness(result).axes[0]
    expected = [result["cosine_within"].values.tolist(), result["cosine_between"].values.tolist()]
    assert _lines(axes) == expected


def test_stiffness_has_a_panel_for_each_kind(result: xr.Dataset) -> None:
    titles = [axes.get_title() for axes in plots.stiffness(result).axes]
    assert titles == ["cosine stiffness", "sign stiffness"]


def test_stiffness_axis_is_logarithmic_and_shows_step_zero(result: xr.Dataset) -> None:
    axes = plots.stiffness(result).axes[0]
    assert (axes.get_xscale(), axes.get_xlim()[0] < 0) == ("symlog", True)


def test_stiffness_legend_names_the_runs(result: xr.Dataset) -> None:
    figure = plots.stiffness({"true labels": result, "random labels": result})
    assert _legend(figure) == ["true labels", "random labels", "within", "between"]


def test_stiffness_without_classes_shows_all_pairs(result: xr.Dataset) -> None:
    figure = plots.stiffness(result[["cosine", "sign"]])
    assert _lines(figure.axes[1]) == [result["sign"].values.tolist()]
    assert _legend(figure) == ["all pairs"]


def test_stiffness_at_step_zero_alone_can_be_drawn(result: xr.Dataset) -> None:
    assert plots.stiffness(result.isel(step=[0])).axes[0].get_xscale() == "linear"


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="`results` is empty; expected at least one result"):
        plots.stiffness({})


def test_class_matrix_shows_both_kinds_at_the_step(result: xr.Dataset) -> None:
    figure = plots.class_matrix(result, 10)
    actual = np.stack([_image(axes) for axes in figure.axes[:2]])
    at = result.sel(step=10)
    np.testing.assert_array_equal(actual, [at["cosine_matrix"], at["sign_matrix"]])


def test_class_matrix_writes_its_numbers(result: xr.Dataset) -> None:
    assert _texts(plots.class_matrix(result, 0).axes[0]) == [".50", "-.10", "-.10", ".70"]


def test_class_matrix_is_of_the_last_step_by_default(result: xr.Dataset) -> None:
    assert plots.class_matrix(result).axes[1].get_title() == "sign stiffness, step 100"


def test_class_matrix_needs_classes(result: xr.Dataset) -> None:
    with pytest.raises(InvalidInputError, match=r"no class matrix; use stiffness\(run, by='class'"):
        plots.class_matrix(result[["cosine", "sign"]])


def test_class_matrix_needs_a_step_of_the_result(result: xr.Dataset) -> None:
    with pytest.raises(
        InvalidInputError, match=r"`step` \(=7\) is not in the result; steps: \[0, 1"
    ):
        plots.class_matrix(result, 7)


def _labels(seed: int, num_triplets: int = 5) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 3, (num_triplets, 6, 6))


@pytest.fixture
def runs(planes_run: WriteRun) -> list[Run]:
    return [planes_run(f"seed{index}", {0: _labels(index)}, "same") for index in range(2)]


def test_planes_have_a_row_per_run_and_a_column_per_triplet(runs: list[Run]) -> None:
    panels = plots.decision_planes(runs, triplets=[3, 1]).axes
    expected = [_labels(0)[3], _labels(0)[1], _labels(1)[3], _labels(1)[1]]
    np.testing.assert_array_equal([_image(axes) for axes in panels], expected)


def test_planes_name_runs_and_triplets(runs: list[Run]) -> None:
    panels = plots.decision_planes(runs, triplets=[3, 1]).axes
    titles = [axes.get_title() for axes in panels[:2]]
    assert (titles, [axes.get_ylabel() for axes in panels[::2]]) == (
        ["triplet 3", "triplet 1"],
        ["seed0", "seed1"],
    )


def test_planes_mark_the_three_images(runs: list[Run]) -> None:
    (axes,) = plots.decision_planes(runs[0], triplets=[0]).axes
    marks = [mark for mark in axes.collections if isinstance(mark, PathCollection)]
    np.testing.assert_array_equal(marks[-1].get_offsets(), [[0, 0], [2, 0], [1, 4]])


def test_planes_put_grid_points_at_pixel_centres(runs: list[Run]) -> None:
    # Six points from -0.2 to 2.2 are 0.48 apart, from -0.4 to 4.4 0.96.
    (axes,) = plots.decision_planes(runs[0], triplets=[0]).axes
    assert axes.images[0].get_extent() == pytest.approx((-0.44, 2.44, -0.88, 4.88))


def test_planes_legend_names_the_classes(runs: list[Run]) -> None:
    assert _legend(plots.decision_planes(runs[0])) == ["0", "1", "2"]


def test_four_planes_are_drawn_by_default(runs: list[Run]) -> None:
    assert len(plots.decision_planes(runs[0]).axes) == 4


def test_planes_can_be_given_as_arrays() -> None:
    planes = plots.Planes(
        labels=np.full((1, 4, 4), 14),
        extent=np.array([[[0.0, 1.0], [0.0, 1.0]]]),
        coordinates=np.zeros((1, 3, 2)),
        name="teacher",
    )
    figure = plots.decision_planes(planes)
    assert (figure.axes[0].get_ylabel(), _legend(figure)) == ("teacher", ["14"])


def test_planes_of_different_runs_must_be_the_same(runs: list[Run], planes_run: WriteRun) -> None:
    fewer = planes_run("fewer", {0: _labels(0, 2)}, "other")
    with pytest.raises(MismatchError, match="planes of 'fewer' are not those of 'seed0'"):
        plots.decision_planes([runs[0], fewer])


def test_planes_need_a_run() -> None:
    with pytest.raises(InvalidInputError, match="`runs` is empty; expected at least one run"):
        plots.decision_planes([])


@pytest.mark.parametrize("triplets", [[5], [-1], []])
def test_planes_need_triplets_that_exist(runs: list[Run], triplets: list[int]) -> None:
    with pytest.raises(InvalidInputError, match=r"must be from 0 to 4, at least one"):
        plots.decision_planes(runs, triplets=triplets)


def test_reproducibility_shows_the_agreement(runs: list[Run]) -> None:
    data = reproducibility(runs)
    axes = plots.reproducibility(data).axes[0]
    np.testing.assert_array_equal(_image(axes), data["agreement"].values)


def test_reproducibility_writes_value_and_interval(runs: list[Run]) -> None:
    pair = reproducibility(runs).isel(run=0, other_run=1)
    value, low, high = (
        f"{pair[name].item():.2f}".removeprefix("0") for name in ("agreement", "low", "high")
    )
    text = _texts(plots.reproducibility(reproducibility(runs)).axes[0])[1]
    assert text == f"{value}\n{low}\u2013{high}"


def test_fragmentation_draws_the_mean(runs: list[Run]) -> None:
    data = fragmentation(runs[0])
    assert _lines(plots.fragmentation(data).axes[0]) == [data["fragmentation"].values.tolist()]


def test_fragmentation_legend_names_the_runs(runs: list[Run]) -> None:
    results = {run.name: fragmentation(run) for run in runs}
    assert _legend(plots.fragmentation(results)) == ["seed0", "seed1"]


def test_figures_are_closed(similarity: xr.DataArray) -> None:
    plots.cka(similarity)
    assert plt.get_fignums() == []
