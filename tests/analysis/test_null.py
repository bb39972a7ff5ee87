"""The permutation null and halves of the examples, against plain loops over whole matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sonde.analysis.arrays import kernels, null
from sonde.exceptions import InvalidInputError

Array = npt.NDArray[np.float64]


def grams(generator: np.random.Generator, num_layers: int, n: int, width: int = 5) -> list[Array]:
    return [kernels.linear_gram(generator.normal(size=(n, width)) + 1) for _ in range(num_layers)]


def blocks_of(gram: Array, sizes: Sequence[int]) -> list[Array]:
    ends = np.cumsum(sizes)
    return [gram[e - s : e, e - s : e] for e, s in zip(ends, sizes, strict=True)]


def stacked(layers: Sequence[Array], sizes: Sequence[int], unbiased: bool) -> Array:
    return np.stack([kernels.center_blocks(blocks_of(g, sizes), unbiased) for g in layers])


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(4, 7), min_size=1, max_size=3),
    num_layers=st.integers(1, 4),
    num_others=st.integers(1, 4),
    unbiased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_null_maps_are_cka_of_permuted_matrices(
    sizes: list[int], num_layers: int, num_others: int, unbiased: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    n = sum(sizes)
    layers, others = grams(generator, num_layers, n), grams(generator, num_others, n)
    orders = null.permutations(sizes, 3, seed)
    sides = [null.triangles(stacked(side, sizes, unbiased), sizes) for side in (layers, others)]
    actual = null.null_maps(sides[0], sides[1], sizes, orders)
    # The smaller side is permuted.
    for order, found in zip(orders, actual, strict=True):
        moved = np.ix_(order, order)
        is_first = num_others > num_layers
        one = [g[moved] for g in layers] if is_first else layers
        other = others if is_first else [g[moved] for g in others]
        expected = kernels.centered_cka(
            stacked(one, sizes, unbiased), stacked(other, sizes, unbiased)
        )
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_permutations_stay_inside_their_blocks_and_reach_every_order() -> None:
    orders = null.permutations([3, 2], 400)
    assert {tuple(sorted(order[:3])) for order in orders.tolist()} == {(0, 1, 2)}
    assert len({tuple(order) for order in orders.tolist()}) == 12


def test_p_counts_scores_that_are_as_large_and_the_one_observed() -> None:
    scores = np.array([0.3, np.nan, 0.1])
    drawn = np.array([[0.3, 0.0, 0.0], [0.2, 0.0, 0.2], [0.1, 0.0, 0.3], [0.0, 0.0, 0.4]])
    np.testing.assert_array_equal(null.p_values(scores, drawn), [2 / 5, np.nan, 4 / 5])


def test_a_permutation_that_changes_nothing_counts_as_equal() -> None:
    generator = np.random.default_rng(0)
    sizes = [12]
    stack = stacked(grams(generator, 2, 12), sizes, True)
    values = null.triangles(stack, sizes)
    same = null.null_maps(values, values, sizes, np.arange(12)[None])
    np.testing.assert_array_equal(null.p_values(kernels.centered_cka(stack), same), np.ones((2, 2)))


def test_p_of_unrelated_layers_is_uniform() -> None:
    generator = np.random.default_rng(0)
    p = []
    for index in range(500):
        sizes = [20]
        layers = grams(generator, 2, 20)
        stack = stacked(layers, sizes, True)
        values = null.triangles(stack, sizes)
        orders = null.permutations(sizes, 99, index)
        drawn = null.null_maps(values[:, :1], values[:, 1:], sizes, orders)
        p.append(null.p_values(kernels.centered_cka(stack)[:1, 1:], drawn).item())
    # p is 1/100, 2/100, …; half a step is taken off, so that it can be compared with a continuum.
    assert stats.kstest(np.array(p) - 0.005, "uniform").pvalue > 0.01


def test_the_null_of_the_maximum_holds_its_level_over_a_map() -> None:
    generator = np.random.default_rng(1)
    sizes, counted = [16], np.triu(np.ones((6, 6), dtype=bool), 1)
    num_found = 0
    for index in range(200):
        stack = stacked(grams(generator, 6, 16), sizes, True)
        values = null.triangles(stack, sizes)
        drawn = null.null_maps(values, values, sizes, null.permutations(sizes, 59, index))
        largest = null.maxima(drawn, counted)
        p = null.p_values(kernels.centered_cka(stack)[counted], largest[:, None])
        num_found += bool((p <= 0.05).any())
    # Binomial(200, 0.05) lies in 1 to 22 with probability 0.9998.
    assert 1 <= num_found <= 22


def test_chance_over_a_map_is_as_large_as_it_was_found_to_be() -> None:
    """Unrelated random layers, 30 x 30, n = 50: .63 biased and .110 debiased were found before.

    The width of those layers is not known. Of 50, 64, 80 and 100 independent features 64 gives the
    biased number; the debiased one, which hardly depends on the width, is then a check.
    """
    generator = np.random.default_rng(0)
    sides = [grams(generator, 30, 50, 64) for _ in range(2)]
    largest, observed = {}, {}
    for unbiased in (False, True):
        stacks = [stacked(side, [50], unbiased) for side in sides]
        values = [null.triangles(stack, [50]) for stack in stacks]
        drawn = null.null_maps(values[0], values[1], [50], null.permutations([50], 200))
        quantile = null.null_quantile(null.maxima(drawn, np.ones((30, 30), dtype=bool)))
        largest[unbiased] = float(quantile)
        observed[unbiased] = float(kernels.centered_cka(stacks[0], stacks[1]).max())
    np.testing.assert_allclose([largest[False], largest[True]], [0.63, 0.11], atol=0.02)
    # Debiasing takes away the mean, not the maximum; the null of the maximum does.
    assert observed[True] > 0.06
    assert all(observed[unbiased] < largest[unbiased] for unbiased in (False, True))


def test_calibration_maps_the_quantile_to_0_and_keeps_1() -> None:
    quantile = null.null_quantile(np.linspace(0, 1, 101)[:, None], 0.05)
    np.testing.assert_allclose(quantile, 0.95)
    scores = np.array([quantile[0], 1.0, 0.0])
    np.testing.assert_allclose(null.calibrated(scores, quantile), [0, 1, -19])


def test_the_quantile_is_never_below_the_share_that_was_asked_for() -> None:
    drawn = np.arange(10.0)[:, None]
    assert null.null_quantile(drawn, 0.25) == 7


def test_layers_without_variance_have_no_null() -> None:
    stack = np.stack([np.zeros(16), np.full(16, np.nan), np.empty(16)])
    gram = np.diag([1.0, 2, 3, 4]) + np.outer([1, 0, 0, 2], [1, 0, 0, 2])
    stack[2] = kernels.center(gram).ravel()
    values = null.triangles(stack, [4])
    drawn = null.null_maps(values, values, [4], null.permutations([4], 5))
    assert np.isnan(drawn[:, :2]).all()
    assert np.isfinite(drawn[:, 2, 2]).all()
    assert np.isnan(null.maxima(drawn, np.triu(np.ones((3, 3), dtype=bool), 1))).all()


@pytest.mark.parametrize("unbiased", [True, False])
def test_halves_are_cka_of_the_examples_kept(unbiased: bool) -> None:
    generator = np.random.default_rng(0)
    sizes = [10, 9, 5]
    layers = grams(generator, 3, 24)
    drawn = null.halves(sizes, 4)
    actual = null.half_maps(stacked(layers, sizes, unbiased), None, sizes, drawn, unbiased=unbiased)
    for kept, found in zip(drawn, actual, strict=True):
        assert [len(kept[kept < 10]), len(kept[kept >= 10])] == [5, 4]  # 5 are too few to halve.
        parts = [[g[np.ix_(k, k)] for k in (kept[:5], kept[5:])] for g in layers]
        stack = np.stack([kernels.center_blocks(part, unbiased) for part in parts])
        np.testing.assert_allclose(found, kernels.centered_cka(stack), atol=1e-12)


def test_intervals_from_halves_hold_the_value_of_the_population() -> None:
    """Examples are drawn anew 200 times; how often does an interval hold the value of very many."""
    generator = np.random.default_rng(0)

    def sample(n: int) -> list[Array]:
        x = generator.normal(size=(n, 4))
        y = x + generator.normal(size=(n, 4))
        return [kernels.linear_gram(x), kernels.linear_gram(y)]

    truth = kernels.cka_matrix(sample(3000))[0, 1]
    num_held = 0
    for index in range(200):
        stack = stacked(sample(60), [60], True)
        value = kernels.centered_cka(stack)[0, 1]
        maps = null.half_maps(stack, None, [60], null.halves([60], 60, index))[:, 0, 1]
        low, high = value + np.quantile(maps - maps.mean(), [0.025, 0.975])
        num_held += low <= truth <= high
    assert 170 <= num_held <= 199


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: null.permutations([4], 0), r"`null` \(=0\) must be at least 1 permutation"),
        (lambda: null.null_quantile(np.ones((3, 1)), 1.0), r"`level` \(=1.0\) must be between 0"),
        (lambda: null.halves([7], 3), "takes halves of the examples, at least 4 each; there are 7"),
        (lambda: null.halves([9], 0), r"`intervals` \(=0\) must be at least 1 half"),
    ],
)
def test_wrong_arguments_are_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(InvalidInputError, match=message):
        call()
