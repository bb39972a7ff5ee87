"""What `cka` gives beside values: nulls, intervals, kernels, families, examples left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr

from sonde.analysis import cka, kernels
from sonde.analysis.arrays import null
from sonde.exceptions import InvalidInputError, MismatchError
from sonde.log import Run, open_run
from sonde.log.format.files import write_run_file

Array = npt.NDArray[np.float64]
WriteRun = Callable[[str, Mapping[int, Mapping[str, Array]], npt.NDArray[np.int64] | None], Run]

LAYERS = ("conv.0", "conv.1", "fc")
N = 16
IDS = np.arange(N) + 100


def features(seed: int, layers: tuple[str, ...] = LAYERS) -> dict[str, Array]:
    """Layers of which the first two are alike, and the last is not."""
    generator = np.random.default_rng(seed)
    common = generator.standard_normal((N, 4))
    made = {name: common + 0.3 * generator.standard_normal((N, 4)) for name in layers}
    made[layers[-1]] = generator.standard_normal((N, 4))
    return made


def grams(seed: int, layers: tuple[str, ...] = LAYERS) -> dict[str, Array]:
    return {name: kernels.linear_gram(x) for name, x in features(seed, layers).items()}


@pytest.fixture
def run(activations_run: WriteRun) -> Run:
    return activations_run("seed0", {0: grams(0)}, IDS)


@pytest.fixture
def family(activations_run: WriteRun) -> list[Run]:
    runs = []
    for width in (8, 64):
        for seed in (0, 1, 2):
            made = activations_run(f"w{width}s{seed}", {0: grams(10 * width + seed)}, IDS)
            write_run_file(made.path, {"config": {"width": width, "seed": seed}})
            runs.append(open_run(made.path))
    return runs


def values_of(seeds: list[int]) -> Array:
    return np.stack([kernels.cka_matrix(list(grams(seed).values())) for seed in seeds])


def test_p_values_are_those_of_a_loop_over_permutations(run: Run) -> None:
    result = cka(run, null=19, seed=3)
    layers = list(grams(0).values())
    drawn = np.stack(
        [
            kernels.cka_matrix(layers, [gram[np.ix_(order, order)] for gram in layers])
            for order in null.permutations([N], 19, 3)
        ]
    )
    expected = (1 + (drawn >= result.values - 1e-10).sum(0)) / 20
    np.testing.assert_allclose(result["p_value"], expected)
    np.testing.assert_allclose(result["null_mean"], drawn.mean(0), atol=1e-12)
    rows, columns = np.triu_indices(3, 1)
    largest = drawn[:, rows, columns].max(1)
    of_maximum = (1 + (largest[:, None, None] >= result.values - 1e-10).sum(0)) / 20
    np.testing.assert_allclose(result["p_value_of_maximum"], of_maximum)
    np.testing.assert_allclose(result["null_maximum"], np.sort(largest)[-1])


def test_alike_layers_are_found_and_unrelated_are_not(run: Run) -> None:
    p = cka(run, null=99)["p_value_of_maximum"]
    assert float(p.sel(layer="conv.0", other_layer="conv.1")) <= 0.02
    assert float(p.sel(layer="conv.0", other_layer="fc")) > 0.05


def test_calibrated_scores_are_above_0_where_p_is_small(run: Run) -> None:
    result = cka(run, null=99)
    np.testing.assert_array_equal(result["calibrated"] > 0, result["p_value"] <= 0.05)


def test_attributes_say_how_the_null_was_drawn(run: Run) -> None:
    attributes = cka(run, null=9, intervals=5, level=0.1, seed=2).attrs
    assert {
        key: attributes[key] for key in ("null", "num_permutations", "level", "seed", "interval")
    } == {
        "null": "examples of one side permuted",
        "num_permutations": 9,
        "level": 0.1,
        "seed": 2,
        "interval": "from halves of the examples, drawn without replacement",
    }


def test_intervals_hold_the_value_and_end_at_1(run: Run) -> None:
    result = cka(run, intervals=40)
    assert bool((result["low"] <= result + 1e-12).all())
    assert float(result["high"].max()) <= 1
    width = result["high"] - result["low"]
    assert float(width.sel(layer="conv.0", other_layer="fc")) > 0.05
    np.testing.assert_allclose(np.diagonal(width), 0, atol=1e-12)


def test_an_rbf_kernel_is_made_from_the_gram_matrix(run: Run) -> None:
    expected = kernels.cka_matrix([kernels.rbf_gram(x, 0.5) for x in features(0).values()])
    np.testing.assert_allclose(cka(run, bandwidth=0.5), expected, atol=1e-10)


def test_several_bandwidths_are_a_dimension(run: Run) -> None:
    result = cka(run, bandwidth=[0.5, 2.0], null=5)
    assert result.dims == ("bandwidth", "layer", "other_layer")
    one = cka(run, bandwidth=2.0, null=5)
    np.testing.assert_allclose(result.sel(bandwidth=2.0), one)
    np.testing.assert_allclose(result["p_value"].sel(bandwidth=2.0), one["p_value"])


def test_layers_most_of_whose_examples_are_equal_have_no_bandwidth(
    activations_run: WriteRun,
) -> None:
    equal = np.zeros((N, N))
    equal[0, 0] = 1
    run = activations_run("run", {0: grams(0) | {"fc": equal}}, IDS)
    with pytest.warns(RuntimeWarning, match="no bandwidth: 'fc'"):
        assert np.isnan(cka(run, bandwidth=1.0).sel(layer="fc")).all()


def test_examples_are_left_out_by_id(run: Run, activations_run: WriteRun) -> None:
    order = np.random.default_rng(0).permutation(N)
    shuffled = {name: gram[np.ix_(order, order)] for name, gram in grams(5).items()}
    other = activations_run("other", {0: shuffled}, IDS[order])
    kept = np.setdiff1d(np.arange(N), [2, 7])
    sides = [[gram[np.ix_(kept, kept)] for gram in grams(seed).values()] for seed in (0, 5)]
    result = cka(run, other, without=[107, 102])
    np.testing.assert_allclose(result, kernels.cka_matrix(sides[0], sides[1]))
    assert result.attrs["num_examples"] == N - 2
    alone = cka(run, without=np.array([102, 107]))
    np.testing.assert_allclose(alone, kernels.cka_matrix(sides[0]))


def test_unknown_ids_to_leave_out_are_refused(run: Run) -> None:
    message = r"`without` names 6 ids that 'probe' of run 'seed0' has not, .*: 0, 1, 2, 3, 4, …"
    with pytest.raises(InvalidInputError, match=message):
        cka(run, without=[100, *range(6)])


def test_leaving_out_too_many_is_refused(run: Run) -> None:
    with pytest.raises(InvalidInputError, match="`without` leaves 3 examples of 'probe'; expected"):
        cka(run, without=IDS[3:])


def test_leaving_out_takes_ids(activations_run: WriteRun) -> None:
    anonymous = activations_run("anonymous", {0: grams(0)}, None)
    with pytest.raises(MismatchError, match="records no example ids"):
        cka(anonymous, without=[1])


def test_leading_components_are_removed(run: Run) -> None:
    removed = []
    for x in features(0).values():
        centered = x - x.mean(0)
        u, s, v = np.linalg.svd(centered, full_matrices=False)
        removed.append(kernels.linear_gram(centered - s[0] * np.outer(u[:, 0], v[0])))
    result = cka(run, remove_components=1)
    np.testing.assert_allclose(result, kernels.cka_matrix(removed), atol=1e-10)
    assert result.attrs["estimator"] == "unbiased, without 1 leading components"


def test_a_layer_of_no_more_components_has_no_variance_left(run: Run) -> None:
    with pytest.warns(RuntimeWarning, match="no variance over the examples: 'conv.0'"):
        assert np.isnan(cka(run, remove_components=4)).all()


def test_mismatched_ids_are_counted_and_named(run: Run, activations_run: WriteRun) -> None:
    other = activations_run("other", {0: grams(1)}, IDS + 2)
    message = r"CKA on the 14 examples .*; 4 are in one of them only: 100, 101, 116, 117"
    with pytest.warns(RuntimeWarning, match=message):
        cka(run, other)
    far = activations_run("far", {0: grams(1)}, IDS + 1000)
    message = r"share 0 .*first ids are 100, 101, 102, 103, 104, … and 1100, 1101"
    with pytest.raises(MismatchError, match=message):
        cka(run, far)


def test_a_family_is_mean_and_spread_under_its_own_name(family: list[Run]) -> None:
    result = cka(family, by="width")
    assert (result.name, result.dims) == ("cka", ("width", "layer", "other_layer"))
    for width in (8, 64):
        expected = values_of([10 * width + seed for seed in range(3)])
        at = result.sel(width=width)
        np.testing.assert_allclose(at, expected.mean(0))
        np.testing.assert_allclose(at["spread"], expected.std(0, ddof=1), atol=1e-12)
        assert int(at["num_runs"]) == 3
    assert result.attrs["runs"] == [run.name for run in family]


def test_the_null_of_a_mean_is_the_mean_of_the_nulls(family: list[Run]) -> None:
    runs = family[:3]
    result = cka(runs, null=9)
    orders = null.permutations([N], 9, 0)
    each = []
    for seed in range(3):
        layers = list(grams(80 + seed).values())
        each.append([kernels.cka_matrix(layers, [g[np.ix_(o, o)] for g in layers]) for o in orders])
    drawn = np.mean(each, axis=0)
    expected = (1 + (drawn >= result.values - 1e-10).sum(0)) / 10
    np.testing.assert_allclose(result["p_value"], expected)


def test_pairs_of_seeds_are_compared(family: list[Run]) -> None:
    result = cka(family, by="width", between=True)
    layers = [list(grams(80 + seed).values()) for seed in range(3)]
    pairs = np.stack(
        [kernels.cka_matrix(layers[a], layers[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    )
    np.testing.assert_allclose(result.sel(width=8), pairs.mean(0))
    assert result["num_pairs"].values.tolist() == [3, 3]


def test_runs_of_other_depths_are_averaged_where_they_have_layers(
    activations_run: WriteRun,
) -> None:
    deep = ("conv.0", "conv.1", "conv.2", "fc")
    runs = [
        activations_run("shallow", {0: grams(0)}, IDS),
        activations_run("deep", {0: grams(1, deep)}, IDS),
    ]
    result = cka(runs, null=5)
    assert result["layer"].values.tolist() == list(deep)
    assert result["num_values"].sel(layer="conv.2").values.tolist() == [1, 1, 1, 1]
    assert result["num_values"].sel(layer="fc", other_layer="fc") == 2
    assert np.isfinite(result["p_value"]).all()


def test_each_of_several_runs_is_compared_with_another(family: list[Run]) -> None:
    result = cka(family[:2], family[2])
    assert result.attrs["other_run"] == "w8s2"
    expected = [cka(run, family[2]).values for run in family[:2]]
    np.testing.assert_allclose(result, np.mean(expected, axis=0))


def test_results_survive_a_file(family: list[Run], tmp_path: object) -> None:
    result = cka(family, by="width", null=5, intervals=3)
    path = f"{tmp_path}/cka.nc"
    result.to_netcdf(path)
    with xr.open_dataarray(path) as read:
        xr.testing.assert_allclose(read.load(), result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null": -1}, r"`null` \(=-1\) must be at least 0"),
        ({"remove_components": -2}, r"`remove_components` \(=-2\) must be at least 0"),
        ({"bandwidth": []}, "`bandwidth` is empty; expected at least one"),
        ({"bandwidth": 0.0}, r"`bandwidth` \(=0.0\) must be > 0"),
        ({"by": "width"}, "`between` and `by` take several runs; one run was given"),
        ({"null": 5, "level": 2}, r"`level` \(=2\) must be between 0 and 1"),
    ],
)
def test_wrong_options_are_refused(run: Run, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        cka(run, **options)  # type: ignore[arg-type]  # Some are wrong on purpose.


def test_pairs_of_runs_take_no_other(family: list[Run]) -> None:
    with pytest.raises(InvalidInputError, match="leave out `other`"):
        cka(family, family[0], between=True)
    with pytest.raises(InvalidInputError, match="no two runs were given; nothing to compare"):
        cka(family[:1], between=True)
