from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.analysis import fragmentation, reproducibility
from sonde.analysis.boundary import (
    agreement,
    bootstrap_interval,
    chance_agreement,
    cohen_kappa,
    num_regions,
)
from sonde.exceptions import InvalidInputError, MismatchError, StepNotFoundError
from sonde.log import Run

Labels = npt.NDArray[Any]
WriteRun = Callable[[str, Mapping[int, Labels], str], Run]


def _labels(seed: int, num_triplets: int = 6) -> Labels:
    return np.random.default_rng(seed).integers(0, 3, (num_triplets, 5, 5))


def test_a_model_agrees_with_itself_everywhere() -> None:
    assert agreement(_labels(0), _labels(0)).tolist() == [1] * 6


@given(seed=st.integers(0, 2**32 - 1))
def test_agreement_is_symmetric(seed: int) -> None:
    a, b = _labels(seed), _labels(seed + 1)
    np.testing.assert_array_equal(agreement(a, b), agreement(b, a))


def test_agreement_is_counted_per_triplet() -> None:
    a = np.zeros((2, 2, 2), dtype=int)
    b = np.array([[[0, 0], [0, 1]], [[1, 1], [1, 1]]])
    assert agreement(a, b).tolist() == [0.75, 0]


def test_chance_agreement_of_a_hand_case() -> None:
    a, b = np.array([[[0, 0, 0, 1]]]), np.array([[[0, 1, 2, 2]]])
    assert chance_agreement(a, b) == 3 / 4 * 1 / 4 + 1 / 4 * 1 / 4


def test_independent_models_agree_by_chance() -> None:
    a, b = _labels(0, 2000), _labels(1, 2000)
    # 50,000 points: the standard error is 0.002.
    assert agreement(a, b).mean() == pytest.approx(chance_agreement(a, b), abs=0.01)


def test_kappa_of_a_hand_case() -> None:
    # Table [[20, 5], [10, 15]]: observed 0.7, chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    a = np.repeat([0, 0, 1, 1], [20, 5, 10, 15]).reshape(1, 5, 10)
    b = np.repeat([0, 1, 0, 1], [20, 5, 10, 15]).reshape(1, 5, 10)
    actual = cohen_kappa(float(agreement(a, b).mean()), chance_agreement(a, b))
    assert actual == pytest.approx(0.4)


def test_kappa_is_nan_where_chance_is_certain() -> None:
    assert np.isnan(cohen_kappa(1.0, 1.0))


def test_bootstrap_interval_covers_as_the_normal_one_does() -> None:
    values = np.random.default_rng(0).normal(size=400)
    error = values.std() / 20
    expected = (values.mean() - 1.96 * error, values.mean() + 1.96 * error)
    # 20,000 resamples put a quantile at about 0.02 standard errors.
    actual = bootstrap_interval(values, num_resamples=20_000)
    assert actual == pytest.approx(expected, abs=0.1 * error)


def test_bootstrap_interval_repeats_with_its_seed() -> None:
    values = np.arange(10, dtype=np.float64)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_checkerboard_has_two_regions_through_corners(size: int) -> None:
    board = np.indices((size, size)).sum(axis=0) % 2
    assert num_regions(board[None]).tolist() == [2]


@pytest.mark.parametrize("size", [2, 5, 8])
def test_checkerboard_falls_apart_without_corners(size: int) -> None:
    board = np.indices((size, size)).sum(axis=0) % 2
    assert num_regions(board[None], connectivity=4).tolist() == [size**2]


def _slow_num_regions(plane: Labels, neighbours: list[tuple[int, int]]) -> int:
    """Flood fill, region by region."""
    left, count = set(np.ndindex(*plane.shape)), 0
    while left:
        count += 1
        border = [left.pop()]
        while border:
            row, column = border.pop()
            for down, right in neighbours:
                point = (row + down, column + right)
                if point in left and plane[point] == plane[row, column]:
                    left.remove(point)
                    border.append(point)
    return count


@given(seed=st.integers(0, 2**32 - 1), connectivity=st.sampled_from([4, 8]))
def test_regions_equal_a_flood_fill(seed: int, connectivity: int) -> None:
    labels = _labels(seed, 2)
    reach = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if connectivity == 8 or a * b == 0]
    expected = [_slow_num_regions(plane, reach) for plane in labels]
    assert num_regions(labels, connectivity).tolist() == expected


@given(seed=st.integers(0, 2**32 - 1), num_classes=st.integers(2, 6))
def test_a_linear_classifier_has_one_region_per_class(seed: int, num_classes: int) -> None:
    # Classes point in evenly spaced directions: every region is convex, and a cone so wide that
    # the grid does not cut its tip off, as it does for about 1 in 200 with random directions.
    generator = np.random.default_rng(seed)
    angles = generator.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(num_classes) / num_classes
    offsets = generator.normal(scale=0.4, size=num_classes)
    y, x = np.meshgrid(np.linspace(-1, 1, 50), np.linspace(-1, 1, 50), indexing="ij")
    scores = np.multiply.outer(np.cos(angles), x) + np.multiply.outer(np.sin(angles), y)
    labels = (scores + offsets[:, None, None]).argmax(axis=0)
    assert num_regions(labels[None]).tolist() == [len(np.unique(labels))]


def test_planes_of_different_shape_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"`labels_a` has shape \[6, 5, 5\], `labels_b` \[7,"):
        agreement(_labels(0), _labels(0, 7))


def test_planes_need_three_axes() -> None:
    with pytest.raises(InvalidInputError, match=r"`labels` has shape \[5, 5\]; expected \[trip"):
        num_regions(_labels(0)[0])


def test_an_unknown_connectivity_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"`connectivity` \(=6\) must be 4 or 8"):
        num_regions(_labels(0), connectivity=6)


def test_an_impossible_confidence_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"`confidence` \(=95\) must be between 0 and 1"):
        bootstrap_interval(np.ones(3), confidence=95)


def test_a_bootstrap_of_nothing_is_refused() -> None:
    message = r"`num_resamples` \(=2000\) and the number of values \(=0\) must be >= 1"
    with pytest.raises(InvalidInputError, match=message):
        bootstrap_interval(np.array([]))


@pytest.fixture
def runs(planes_run: WriteRun) -> list[Run]:
    return [planes_run(f"seed{i}", {0: _labels(i), 9: _labels(i + 10)}, "same") for i in range(3)]


def test_every_pair_of_runs_is_compared(runs: list[Run]) -> None:
    result = reproducibility(runs)
    expected = [
        [agreement(_labels(i), _labels(j)).mean() for j in (10, 11, 12)] for i in (10, 11, 12)
    ]
    np.testing.assert_allclose(result["agreement"].values, expected)


def test_chance_and_kappa_stand_beside_the_agreement(runs: list[Run]) -> None:
    pair = reproducibility(runs).sel(run="seed0", other_run="seed2")
    chance = chance_agreement(_labels(10), _labels(12))
    expected = [chance, (pair["agreement"].item() - chance) / (1 - chance)]
    assert [pair["chance"].item(), pair["kappa"].item()] == pytest.approx(expected)


def test_the_interval_is_the_bootstrap_over_triplets(runs: list[Run]) -> None:
    pair = reproducibility(runs, confidence=0.9, seed=7).sel(run="seed0", other_run="seed1")
    expected = bootstrap_interval(agreement(_labels(10), _labels(11)), confidence=0.9, seed=7)
    assert (pair["low"].item(), pair["high"].item()) == expected


def test_the_steps_compared_are_stated(runs: list[Run], planes_run: WriteRun) -> None:
    longer = planes_run("longer", {20: _labels(0)}, "same")
    assert reproducibility([runs[0], longer])["step"].values.tolist() == [9, 20]


def test_runs_of_the_same_name_go_by_their_path(
    runs: list[Run], planes_run: WriteRun, tmp_path: Path
) -> None:
    (tmp_path / "again").mkdir()
    twin = planes_run("again/seed0", {9: _labels(0)}, "same")
    names = reproducibility([*runs, twin])["run"].values.tolist()
    assert names == [str(runs[0].path), "seed1", "seed2", str(twin.path)]


def test_runs_on_other_planes_are_named(runs: list[Run], planes_run: WriteRun) -> None:
    other = planes_run("other", {9: _labels(0)}, "different")
    with pytest.raises(MismatchError, match=r"from those of run 'seed0' in runs \['other'\]"):
        reproducibility([*runs, other])


def test_one_run_cannot_be_compared(runs: list[Run]) -> None:
    with pytest.raises(InvalidInputError, match="`runs` has 1 runs; expected at least 2"):
        reproducibility(runs[:1])


def test_fragmentation_is_the_mean_number_of_regions(runs: list[Run]) -> None:
    expected = [num_regions(_labels(seed)).mean() for seed in (0, 10)]
    assert fragmentation(runs[0])["fragmentation"].values.tolist() == expected


def test_fragmentation_keeps_every_triplet(runs: list[Run]) -> None:
    actual = fragmentation(runs[0], steps=[-1], connectivity=4)["regions"].sel(step=9)
    assert actual.values.tolist() == num_regions(_labels(10), connectivity=4).tolist()


def test_standard_error_is_over_triplets(runs: list[Run]) -> None:
    expected = num_regions(_labels(0)).std(ddof=1) / np.sqrt(6)
    assert fragmentation(runs[0], steps=[0])["standard_error"].item() == pytest.approx(expected)


def test_one_triplet_has_no_standard_error(planes_run: WriteRun) -> None:
    run = planes_run("single", {0: _labels(0, 1)}, "same")
    assert np.isnan(fragmentation(run)["standard_error"].item())


def test_a_step_not_recorded_is_refused(runs: list[Run]) -> None:
    with pytest.raises(StepNotFoundError, match="step 5 of 'decision_planes' was not recorded"):
        fragmentation(runs[0], steps=[5])
