"""Means and spreads over the runs of a family, and sweeps, against a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from sonde.analysis import fragmentation, plots, reproducibility, stiffness, sweep
from sonde.analysis.sides.families import combine, merged
from sonde.exceptions import InvalidInputError, MeasureNotFoundError, StepNotFoundError
from sonde.log import Family, Run, open_run
from sonde.log.format.files import write_run_file

mpl.use("Agg")

WritePlanes = Callable[..., Run]


def labels(seed: int, width: int) -> dict[int, Any]:
    generator = np.random.default_rng([seed, width])
    return {step: generator.integers(0, 2, (6, 5, 5)) for step in (0, 10)}


@pytest.fixture
def family(planes_run: WritePlanes) -> Family:
    """Runs of three widths and two noises, with one to three seeds each."""
    runs = []
    for width, noise, num_seeds in ((8, 0, 3), (8, 0.2, 2), (64, 0, 1), (128, 0.2, 2)):
        for seed in range(num_seeds):
            run = planes_run(f"w{width}n{noise}s{seed}", labels(seed, width), "same")
            write_run_file(run.path, {"config": {"width": width, "noise": noise, "seed": seed}})
            runs.append(open_run(run.path))
    return Family(runs)


def regions(family: Family, step: int, **wanted: Any) -> list[float]:
    return [
        float(fragmentation(run).fragmentation.sel(step=step)) for run in family.where(**wanted)
    ]


def test_an_analysis_of_a_family_is_mean_and_spread_over_its_groups(family: Family) -> None:
    result = fragmentation(family, by=["noise", "width"])
    assert result.fragmentation.dims == ("noise", "width", "step")
    for noise in (0, 0.2):
        for width in (8, 64, 128):
            values = regions(family, 10, noise=noise, width=width)
            at = result.sel(noise=noise, width=width, step=10)
            assert at.num_runs == len(values)
            expected = [
                np.mean(values) if values else np.nan,
                np.std(values, ddof=1) if len(values) > 1 else np.nan,
            ]
            actual = [float(at.fragmentation), float(at.fragmentation_spread)]
            np.testing.assert_allclose(np.array(actual), np.array(expected))


def test_without_by_all_runs_are_one_group(family: Family) -> None:
    result = fragmentation(list(family))
    assert result.num_runs == 8
    np.testing.assert_allclose(result.fragmentation.sel(step=0), np.mean(regions(family, 0)))


def test_attributes_say_what_was_averaged(family: Family) -> None:
    result = fragmentation(family, by="width")
    assert result.attrs == {
        "source": "probe",
        "connectivity": 8,
        "runs": family.names,
        "by": ["width"],
        "lacking": [],
    }


def test_runs_without_the_measure_or_a_key_are_named(
    family: Family, planes_run: WritePlanes, gradients_run: Callable[..., Run]
) -> None:
    other = gradients_run({0: {"fc": np.eye(4)}}, None)
    write_run_file(other.path, {"config": {"width": 8}})
    keyless = planes_run("keyless", labels(0, 1), "same")
    several = [*family, open_run(other.path), keyless]
    message = (
        r"fragmentation leaves out runs: 1 without the configuration key 'width': keyless; "
        r"1 without what it needs \(the measure or source\): run"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        result = fragmentation(several, by="width")
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert result.attrs["runs"] == family.names
    assert len(result.attrs["lacking"]) == 2


def test_a_family_none_of_whose_runs_has_the_measure_is_refused(family: Family) -> None:
    with pytest.raises(MeasureNotFoundError, match="has no records of 'example_gradients'"):
        stiffness(family)


def test_an_empty_family_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="`runs` is empty; expected at least one run"):
        fragmentation(Family([]))


def test_stiffness_of_a_family_is_averaged(gradients_run: Callable[..., Run]) -> None:
    run = gradients_run({0: {"fc": np.eye(4) + 1}}, np.arange(4) % 2)
    result, one = stiffness([run, run]), stiffness(run)
    xr.testing.assert_allclose(result.cosine_matrix, one.cosine_matrix)
    assert float(result.cosine_within_spread.max()) == 0


def test_reproducibility_of_groups_is_the_mean_over_their_pairs(family: Family) -> None:
    message = "reproducibility leaves out runs: w64n0s0, the only one with width=64"
    with pytest.warns(RuntimeWarning, match=message):
        result = reproducibility(family, by="width")
    runs = family.where(width=8, noise=0)
    with pytest.warns(RuntimeWarning, match="w64n0s0"):
        by_both = reproducibility(family, by=["width", "noise"])
    pairs = reproducibility(list(runs)).agreement.values[np.triu_indices(3, 1)]
    at = by_both.sel(width=8, noise=0)
    assert (int(at.num_pairs), result.width.values.tolist()) == (3, [8, 128])
    np.testing.assert_allclose(
        [float(at.agreement), float(at.agreement_spread)], [pairs.mean(), pairs.std(ddof=1)]
    )


def test_reproducibility_needs_two_runs_of_a_group(family: Family) -> None:
    with pytest.raises(InvalidInputError, match="no two runs have the same width and seed and noi"):
        reproducibility(family, by=["width", "seed", "noise"])


def test_a_key_that_is_a_dimension_of_the_result_is_refused(planes_run: WritePlanes) -> None:
    run = planes_run("run", labels(0, 8), "same")
    write_run_file(run.path, {"config": {"step": 3}})
    with pytest.raises(InvalidInputError, match="'step', but the result has a dimension"):
        fragmentation([open_run(run.path)], by="step")


def test_layers_that_some_runs_lack_are_averaged_over_the_others() -> None:
    def of(layers: list[str], value: float) -> xr.Dataset:
        return xr.Dataset({"x": ("layer", [value] * len(layers))}, coords={"layer": layers})

    result = combine([], {(): [of(["conv", "fc"], 1.0), of(["conv", "block", "fc"], 3.0)]})
    assert result.layer.values.tolist() == ["conv", "block", "fc"]
    assert result.x.values.tolist() == [2, 3, 2]
    assert result.num_values_of_x.values.tolist() == [2, 1, 2]


@given(st.lists(st.permutations("abcdef").map(lambda p: p[:4]), max_size=4))
def test_merged_names_are_each_name_once(lists: list[list[str]]) -> None:
    found = merged(lists)
    assert sorted(found) == sorted({name for names in lists for name in names})


@given(st.lists(st.sets(st.sampled_from("abcdef")).map(sorted), max_size=5))
def test_merging_keeps_the_order_within_each_list_against_one_that_has_all(
    lists: list[list[str]],
) -> None:
    assert merged([list("abcdef"), *lists]) == list("abcdef")


def test_a_sweep_follows_the_last_step_along_a_key(family: Family) -> None:
    result = sweep(family, over="width", group="noise", of=fragmentation)
    assert result.fragmentation.dims == ("noise", "width")
    assert result.attrs["of"] == "fragmentation"
    values = regions(family, 10, width=128, noise=0.2)
    np.testing.assert_allclose(result.fragmentation.sel(width=128, noise=0.2), np.mean(values))


def test_a_sweep_takes_any_function_that_gives_a_number(family: Family) -> None:
    def last(run: Run, factor: float) -> float:
        return factor * run.steps()[-1]

    result = sweep(family, over="width", of=last, factor=0.5)
    assert result["last"].values.tolist() == [5, 5, 5]


def test_a_sweep_refuses_what_is_no_number(family: Family) -> None:
    with pytest.raises(InvalidInputError, match=r"`of` \(=<lambda>\) returned a str; expected"):
        sweep(family, over="width", of=lambda run: run.name)


def test_a_sweep_refuses_one_key_twice(family: Family) -> None:
    with pytest.raises(InvalidInputError, match=r"`over` and `group` \(=width\) must be different"):
        sweep(family, over="width", group="width", of=fragmentation)


def test_a_step_that_no_run_has_is_refused(family: Family) -> None:
    with pytest.raises(StepNotFoundError, match=r"has no step 5; steps: \[0, 10\]"):
        sweep(family, over="width", of=fragmentation, step=5)


def test_a_sweep_is_drawn_with_its_spread_and_in_logs(family: Family) -> None:
    result = sweep(family, over="width", group="noise", of=fragmentation)
    figure = plots.sweep(result)
    axes = figure.axes[0]
    lines = [line for line in axes.lines if line.get_marker() == "o"]
    drawn = [np.asarray(line.get_ydata()).tolist() for line in lines]
    expected = [row[~np.isnan(row)].tolist() for row in result.fragmentation.values]
    assert drawn == expected
    assert axes.get_xscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("width", "fragmentation")
    assert axes.get_title() == "mean and spread of 1 to 3 runs"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["noise 0.0", "noise 0.2"]


def test_a_sweep_over_texts_is_drawn_on_given_axes(family: Family) -> None:
    _, axes = plt.subplots()
    result = sweep(family, over="width", of=fragmentation)
    texts = result.assign_coords(width=["a", "b", "$c"])
    figure = plots.sweep(texts, "fragmentation", ax=axes)
    assert figure is axes.figure
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b", r"\$c"]
    plt.close("all")


def test_a_score_that_is_no_number_per_run_is_not_drawn(family: Family) -> None:
    result = sweep(family, over="width", of=fragmentation)
    with pytest.raises(InvalidInputError, match=r"`variable` \(=regions\) is no single number"):
        plots.sweep(result, "regions")
    with pytest.raises(InvalidInputError, match="`result` is no sweep"):
        plots.sweep(fragmentation(family))


def test_values_of_a_mapping_type_are_kept(family: Family) -> None:
    groups: Mapping[Any, Family] = family.by("width")
    assert [len(group) for group in groups.values()] == [5, 1, 2]


def test_runs_of_other_folders_are_opened_by_path(family: Family, tmp_path: Path) -> None:
    assert all(run.path.parent == tmp_path for run in family)
