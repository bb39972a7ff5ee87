"""Mutual nearest neighbours, their null, and the influence of single examples, against loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from sonde.analysis import cka, influence, kernels, mutual_knn
from sonde.analysis.arrays import neighbours, null
from sonde.analysis.arrays.influence import leave_one_out
from sonde.exceptions import InvalidInputError, MismatchError
from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.format.files import write_run_file

Array = npt.NDArray[np.float64]
WriteRun = Callable[[str, Mapping[int, Mapping[str, Array]], npt.NDArray[np.int64] | None], Run]

N = 20
IDS = np.arange(N) + 50


def features(seed: int) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(N, 3))
    return {
        "conv": common + 0.2 * generator.normal(size=(N, 3)),
        "fc": common + 0.2 * generator.normal(size=(N, 3)) + 7,
        "head": generator.normal(size=(N, 4)),
    }


def grams(seed: int) -> dict[str, Array]:
    return {name: kernels.linear_gram(x) for name, x in features(seed).items()}


def slow_share(x: Array, y: Array, k: int) -> float:
    """The share in common, by scikit-learn's search and sets."""
    found = []
    for values in (x, y):
        search = NearestNeighbors(n_neighbors=k + 1).fit(values)
        at = search.kneighbors(values, return_distance=False)
        found.append([set(row.tolist()) - {i} for i, row in enumerate(at)])
    return float(np.mean([len(a & b) / k for a, b in zip(*found, strict=True)]))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), k=st.integers(1, 8))
def test_shares_are_those_of_a_search_in_the_features(seed: int, k: int) -> None:
    layers = features(seed)
    found = [neighbours.nearest(gram, k) for gram in grams(seed).values()]
    expected = [[slow_share(x, y, k) for y in layers.values()] for x in layers.values()]
    np.testing.assert_allclose(neighbours.mutual_share(found), expected)


def test_equally_near_examples_are_taken_in_their_order() -> None:
    assert neighbours.nearest(np.eye(4), 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


def test_all_others_are_in_common() -> None:
    found = [neighbours.nearest(gram, N - 1) for gram in grams(0).values()]
    np.testing.assert_allclose(neighbours.mutual_share(found), 1)


def test_the_null_permutes_the_examples_of_the_other_side() -> None:
    one, other = list(grams(0).values()), list(grams(1).values())[:2]
    orders = null.permutations([N], 4)
    drawn = neighbours.null_shares(
        [neighbours.nearest(gram, 5) for gram in one],
        [neighbours.nearest(gram, 5) for gram in other],
        orders,
    )
    for order, found in zip(orders, drawn, strict=True):
        moved = [neighbours.nearest(gram[np.ix_(order, order)], 5) for gram in other]
        same = [neighbours.nearest(gram, 5) for gram in one]
        np.testing.assert_allclose(found, neighbours.mutual_share(same, moved))


def test_unrelated_layers_share_as_many_as_chance() -> None:
    orders = null.permutations([N], 2000)
    found = [neighbours.nearest(gram, 5) for gram in list(grams(0).values())[:1]]
    drawn = neighbours.null_shares(found, None, orders)
    np.testing.assert_allclose(drawn.mean(), 5 / (N - 1), atol=0.005)


@pytest.fixture
def run(activations_run: WriteRun) -> Run:
    return activations_run("seed0", {0: grams(0)}, IDS)


def test_layers_of_runs_are_compared_by_id(run: Run, activations_run: WriteRun) -> None:
    order = np.random.default_rng(0).permutation(N)
    shuffled = {name: gram[np.ix_(order, order)] for name, gram in grams(1).items()}
    other = activations_run("seed1", {0: shuffled}, IDS[order])
    result = mutual_knn(run, other, k=4)
    expected = [[slow_share(x, y, 4) for y in features(1).values()] for x in features(0).values()]
    np.testing.assert_allclose(result, expected)
    assert (result.name, result.attrs["k"], result.attrs["num_examples"]) == ("mutual_knn", 4, N)
    assert result.attrs["chance"] == 4 / (N - 1)


def test_alike_layers_are_beyond_chance(run: Run) -> None:
    p = mutual_knn(run, k=5, null=99)["p_value_of_maximum"]
    assert float(p.sel(layer="conv", other_layer="fc")) <= 0.02


def test_unrelated_layers_are_beyond_chance_at_the_stated_level_only() -> None:
    generator = np.random.default_rng(0)
    num_found = 0
    for index in range(200):
        one, other = (
            [neighbours.nearest(kernels.linear_gram(generator.normal(size=(N, 4))), 5)]
            for _ in range(2)
        )
        drawn = neighbours.null_shares(one, other, null.permutations([N], 59, index))
        p = null.p_values(neighbours.mutual_share(one, other), drawn)
        num_found += float(p[0, 0]) <= 0.05
    # At most 5 %, less where shares are equal; Binomial(200, 0.05) is at most 22 in 0.9999.
    assert 1 <= num_found <= 22


def test_neighbours_of_a_family_are_averaged(run: Run, activations_run: WriteRun) -> None:
    runs = [run, activations_run("seed1", {0: grams(1)}, IDS)]
    result = mutual_knn(runs, k=5)
    np.testing.assert_allclose(result, np.mean([mutual_knn(one, k=5) for one in runs], axis=0))
    pair = mutual_knn(runs, k=5, between=True)
    np.testing.assert_allclose(pair, mutual_knn(runs[0], runs[1], k=5))


def test_layers_without_variance_have_no_neighbours(activations_run: WriteRun) -> None:
    run = activations_run("dead", {0: grams(0) | {"fc": np.ones((N, N))}}, IDS)
    message = "mutual kNN is NaN for layers of run 'dead' with no variance over the examples: 'fc'"
    with pytest.warns(RuntimeWarning, match=message):
        result = mutual_knn(run, k=3, null=3)
    assert np.isnan(result.sel(layer="fc")).all()
    assert np.isnan(result["p_value"].sel(other_layer="fc")).all()
    assert np.isfinite(result.sel(layer="conv", other_layer="head"))


@pytest.mark.parametrize("k", [0, N])
def test_k_has_to_be_a_number_of_others(run: Run, k: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"`k` \(={k}\) must be from 1 to 19: the other"):
        mutual_knn(run, k=k)


def test_wrong_options_are_refused(run: Run) -> None:
    with pytest.raises(InvalidInputError, match=r"`null` \(=-1\) must be at least 0"):
        mutual_knn(run, null=-1)
    with pytest.raises(InvalidInputError, match="`between` and `by` take several runs"):
        mutual_knn(run, by="width")
    with pytest.raises(InvalidInputError, match=r"list was given .*mutual_knn\(a, b\)"):
        mutual_knn(run, [run])  # type: ignore[arg-type]


@pytest.mark.parametrize("unbiased", [True, False])
def test_influence_is_that_of_leaving_each_example_out(unbiased: bool) -> None:
    layers = list(grams(3).values())
    stack = np.stack([kernels.center(gram, unbiased).ravel() for gram in layers])
    actual = leave_one_out(stack, unbiased=unbiased)
    for index in range(N):
        kept = np.delete(np.arange(N), index)
        left = [gram[np.ix_(kept, kept)] for gram in layers]
        expected = kernels.cka_matrix(left, unbiased=unbiased)
        np.testing.assert_allclose(actual[..., index], expected, atol=1e-10)


def test_influence_names_the_example_that_makes_layers_alike(activations_run: WriteRun) -> None:
    layers = features(0)
    for x in layers.values():
        x[7] += 50  # One far example makes any two layers alike.
    run = activations_run(
        "far", {0: {name: kernels.linear_gram(x) for name, x in layers.items()}}, IDS
    )
    found = influence(run, unbiased=False)
    pair = found.sel(layer="conv", other_layer="head")
    assert int(pair["example"].values[np.argmax(pair.values)]) == IDS[7]
    assert float(pair.max()) > 0.5
    expected = cka(run, unbiased=False) - cka(run, unbiased=False, without=[57])
    np.testing.assert_allclose(found.sel(example=57), expected, atol=1e-10)
    np.testing.assert_allclose(found["cka"], cka(run, unbiased=False))


def test_influence_of_what_was_left_out_is_not_there(run: Run, activations_run: WriteRun) -> None:
    other = activations_run("other", {0: grams(1)}, IDS + 2)
    with pytest.warns(RuntimeWarning, match="CKA on the 18 examples"):
        found = influence(run, other, without=[60, 61])
    assert found["example"].values.tolist() == [i for i in range(52, 70) if i not in (60, 61)]
    assert found.attrs["num_examples"] == 16


def test_examples_without_ids_are_positions(activations_run: WriteRun) -> None:
    run = activations_run("anonymous", {0: grams(0)}, None)
    assert influence(run)["example"].values.tolist() == list(range(N))


def test_four_examples_are_too_few_to_leave_one_out() -> None:
    stack = kernels.center(np.diag([1.0, 2, 3, 4])).ravel()[None]
    with pytest.raises(InvalidInputError, match="there are 4 examples; leaving one out takes 5"):
        leave_one_out(stack)


@pytest.mark.parametrize("analyze", [mutual_knn, influence])
def test_blocks_of_gram_matrices_are_refused(
    tmp_path: object, analyze: Callable[[Run], object]
) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "run"
    path.mkdir()
    write_run_file(path, {})
    writer = LogWriter(path, seal=False)
    x = features(0)["conv"]
    halves = np.concatenate([kernels.linear_gram(part).ravel() for part in (x[:10], x[10:])])
    array = LogArray("gram_blocks", halves, ("pair",), layer="conv")
    writer.append("activations", "probe", 0, [array], {"block_sizes": [10, 10]})
    writer.close()
    with pytest.raises(MismatchError, match=r"only blocks of \[10, 10\] examples were kept"):
        analyze(open_run(path))
