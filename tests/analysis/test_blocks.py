"""`blocks` of runs, steps, maps and families, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from matplotlib.patches import Rectangle

from sonde.analysis import blocks, cka, kernels, plots
from sonde.exceptions import InvalidInputError
from sonde.log import Run, open_run
from sonde.log.format.files import write_run_file

mpl.use("Agg")

Array = npt.NDArray[np.float64]
WriteRun = Callable[[str, Mapping[int, Mapping[str, Array]], npt.NDArray[np.int64] | None], Run]

N, NUM_LAYERS = 40, 14
IDS = np.arange(N)
NAMES = [f"layer.{index}" for index in range(NUM_LAYERS)]


def grams(seed: int, first: int = 4, end: int = 11) -> dict[str, Array]:
    """Unrelated layers, of which those from `first` to before `end` share features."""
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(N, 6))
    made = {}
    for index, name in enumerate(NAMES):
        x = generator.normal(size=(N, 6))
        made[name] = kernels.linear_gram(common + 0.5 * x if first <= index < end else x)
    return made


@pytest.fixture
def run(activations_run: WriteRun) -> Run:
    return activations_run("seed0", {0: grams(0, 0, 0), 10: grams(1), 20: grams(2, 2, 12)}, IDS)


def test_a_planted_block_is_found_and_described(run: Run) -> None:
    found = blocks(run, step=10, null=99, intervals=30)
    similarity = cka(run, step=10).values
    inside = similarity[4:11, 4:11][np.triu_indices(7, 1)]
    assert (found.sizes["block"], int(found["num_blocks"])) == (1, 1)
    block = found.isel(block=0)
    assert [int(block[name]) for name in ("start", "end", "size")] == [4, 11, 7]
    assert [str(block[name].item()) for name in ("first_layer", "last_layer")] == [
        "layer.4",
        "layer.10",
    ]
    np.testing.assert_allclose(block["similarity"], inside.mean())
    np.testing.assert_allclose(block["p_value"], 0.01)
    assert 0.5 < float(block["contrast"]) < 1
    assert found["in_block"].values.tolist() == [-1] * 4 + [0] * 7 + [-1] * 3


def test_halves_of_the_examples_bound_its_ends(run: Run) -> None:
    block = blocks(run, step=10, intervals=30).isel(block=0)
    assert float(block["start_low"]) <= 4 <= float(block["start_high"])
    assert float(block["end_low"]) <= 11 <= float(block["end_high"])
    assert float(block["support"]) > 0.9
    assert "support" not in blocks(run, step=10, intervals=0)


def test_attributes_say_what_was_asked_for(run: Run) -> None:
    attributes = blocks(run, step=10, null=9, intervals=5, level=0.2, seed=3).attrs
    expected = {
        "null": "examples of one side permuted",
        "num_permutations": 9,
        "num_halves": 5,
        "level": 0.2,
        "seed": 3,
        "min_size": 3,
        "min_contrast": 0.1,
        "num_faint": 0,
        "run": "seed0",
        "num_examples": N,
    }
    assert {key: attributes[key] for key in expected} == expected


def test_a_block_too_faint_is_counted_and_left_out(run: Run) -> None:
    found = blocks(run, step=10, min_contrast=0.99, null=20)
    assert (int(found["num_blocks"]), found.attrs["num_faint"]) == (0, 1)
    assert found.sizes["block"] == 0


def test_unrelated_layers_have_blocks_at_the_stated_level_only(activations_run: WriteRun) -> None:
    """200 runs of 8 unrelated layers each; chance gets a block in a share of `level`."""
    num_found = 0
    steps = {
        step: {name: gram[:20, :20] for name, gram in list(grams(1000 + step, 0, 0).items())[:8]}
        for step in range(200)
    }
    run = activations_run("noise", steps, IDS[:20])
    for step in range(200):
        found = blocks(run, step=step, null=59, intervals=0, min_contrast=-1, seed=step)
        num_found += int(found["num_blocks"]) > 0
    # Binomial(200, 0.05) lies in 1 to 22 with probability 0.9998.
    assert 1 <= num_found <= 22


def test_steps_are_a_dimension_and_padded(run: Run) -> None:
    found = blocks(run, steps=[0, 10, -1], null=99, intervals=0)
    assert found["num_blocks"].values.tolist() == [0, 1, 1]
    assert found["step"].values.tolist() == [0, 10, 20]
    assert found["first_layer"].values.tolist() == [[""], ["layer.4"], ["layer.2"]]
    np.testing.assert_array_equal(found["end"].values, [[np.nan], [11], [12]])
    assert found["in_block"].dims == ("step", "layer")


def test_blocks_of_a_map_are_judged_by_other_orders_of_its_layers(run: Run) -> None:
    found = blocks(cka(run, step=10), null=99)
    assert (found["start"].values.tolist(), found["end"].values.tolist()) == ([4], [11])
    assert found.attrs["null"] == "layers in random order"
    assert float(found["p_value"][0]) == 0.01


def test_a_map_whose_similarity_depends_on_the_distance_has_no_block() -> None:
    at = np.arange(12)
    values = np.exp(-np.abs(at[:, None] - at) / 4)
    names = [str(name) for name in at]
    similarity = xr.DataArray(
        values, dims=("layer", "other_layer"), coords={"layer": names, "other_layer": names}
    )
    assert int(blocks(similarity)["num_blocks"]) == 0


def test_layers_without_value_are_left_out(activations_run: WriteRun) -> None:
    layers = grams(1) | {"layer.6": np.ones((N, N))}
    run = activations_run("dead", {0: layers}, IDS)
    with pytest.warns(RuntimeWarning, match="no variance over the examples: 'layer.6'"):
        found = blocks(run, null=50, intervals=10)
    assert found["in_block"].values.tolist() == [-1] * 4 + [0, 0, -1, 0, 0, 0, 0] + [-1] * 3
    assert [int(found[name][0]) for name in ("start", "end", "size")] == [4, 11, 6]
    assert float(found["end_high"][0]) >= 11


@pytest.fixture
def family(activations_run: WriteRun) -> list[Run]:
    runs = []
    for width, end in ((8, 4), (64, 11)):
        for seed in (0, 1):
            made = activations_run(f"w{width}s{seed}", {0: grams(width + seed, 4, end)}, IDS)
            write_run_file(made.path, {"config": {"width": width}})
            runs.append(open_run(made.path))
    return runs


def test_blocks_of_a_family_are_averaged(family: list[Run]) -> None:
    found = blocks(family, by="width", null=99, intervals=0)
    assert found["num_blocks"].values.tolist() == [0, 1]
    assert found["largest_size"].values.tolist() == [0, 7]
    np.testing.assert_allclose(found["share_in_blocks"], [0, 0.5])
    assert found["is_in_block"].sel(width=64).values.tolist() == [0] * 4 + [1] * 7 + [0] * 3
    assert found["num_runs"].values.tolist() == [2, 2]
    each = [float(blocks(run, null=99, intervals=0)["contrast"][0]) for run in family[2:]]
    np.testing.assert_allclose(found["largest_contrast"].sel(width=64), np.mean(each))


def test_a_map_with_blocks_shows_them_as_squares(run: Run) -> None:
    found = blocks(run, step=10, null=50, intervals=0)
    axes = plots.cka(cka(run, step=10), blocks=found).axes[0]
    (square,) = axes.patches
    assert isinstance(square, Rectangle)
    assert (square.get_xy(), square.get_width(), square.get_height()) == ((3.5, 3.5), 7, 7)


def test_blocks_are_drawn_over_the_steps(run: Run) -> None:
    figure = plots.blocks(blocks(run, steps=[0, 10, 20], null=99, intervals=9))
    axes = figure.axes[0]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [round(bar.get_y() + 0.45, 6) for bar in bars] == [4, 2]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "10", "20"]
    assert len(axes.lines) == 4
    assert figure.axes[1].get_ylabel() == "contrast of the block"


def test_blocks_of_one_step_and_of_a_family_are_drawn(run: Run, family: list[Run]) -> None:
    _, axes = plt.subplots()
    figure = plots.blocks(blocks(run, step=10, null=50, intervals=0), ax=axes)
    assert (figure is axes.figure, len(axes.patches)) == (True, 1)
    plt.close("all")
    shares = plots.blocks(blocks(family, by="width", null=50, intervals=0))
    assert shares.axes[0].get_xlabel() == "width"
    assert plots.blocks(blocks(family, null=50, intervals=0)).axes[0].get_xlabel() == "runs"


def test_wrong_results_are_not_drawn(run: Run, family: list[Run]) -> None:
    similarity = cka(run)
    with pytest.raises(InvalidInputError, match="`found` is no result of sonde"):
        plots.blocks(similarity.to_dataset())
    over = blocks(run, steps=[0, 10], null=20, intervals=0)
    with pytest.raises(InvalidInputError, match="`blocks` must be of one run at one step"):
        plots.cka(similarity, blocks=over)


def test_other_inputs_are_refused(run: Run) -> None:
    similarity = cka(run)
    with pytest.raises(InvalidInputError, match="expected a map"):
        blocks(similarity.expand_dims("width"))
    with pytest.raises(InvalidInputError, match="compares different layers; blocks are of layers"):
        blocks(cka(run, layers="layer.0", other_layers="layer.1"))
    with pytest.raises(InvalidInputError, match=r"`null` \(=0\) must be at least 1: it decides"):
        blocks(run, null=0)
