from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.analysis import kernels
from sonde.exceptions import InvalidInputError, MismatchError

Array = npt.NDArray[np.float64]


def _features(seed: int, num_examples: int = 20, num_features: int = 5) -> Array:
    return np.random.default_rng(seed).standard_normal((num_examples, num_features))


def _gram(seed: int, num_examples: int = 20, num_features: int = 5) -> Array:
    return kernels.linear_gram(_features(seed, num_examples, num_features))


def _cka(x: Array, y: Array, *, unbiased: bool) -> float:
    grams = [kernels.linear_gram(x), kernels.linear_gram(y)]
    return float(kernels.cka_matrix(grams, unbiased=unbiased)[0, 1])


@pytest.fixture
def reference_pair() -> tuple[Array, Array]:
    """The pair that the numbers of Kornblith et al.'s released code were taken on."""
    state = np.random.RandomState(1337)
    x = state.randn(100, 10)
    return x, state.randn(100, 10) + x


def test_biased_linear_cka_matches_the_released_code(reference_pair: tuple[Array, Array]) -> None:
    assert _cka(*reference_pair, unbiased=False) == pytest.approx(0.557613, abs=5e-7)


def test_debiased_linear_cka_matches_the_released_code(reference_pair: tuple[Array, Array]) -> None:
    assert _cka(*reference_pair, unbiased=True) == pytest.approx(0.513456, abs=5e-7)


def test_rbf_cka_matches_the_released_code(reference_pair: tuple[Array, Array]) -> None:
    grams = [kernels.rbf_gram(features, 0.5) for features in reference_pair]
    actual = kernels.cka_matrix(grams, unbiased=False)[0, 1]
    assert actual == pytest.approx(0.654831, abs=5e-7)


def test_unbiased_hsic_matches_the_reference(reference_pair: tuple[Array, Array]) -> None:
    actual = kernels.hsic(*(kernels.linear_gram(features) for features in reference_pair))
    assert actual == pytest.approx(9.895956, abs=5e-7)


# Tolerance: the spread over seeds, about 1/n.
@pytest.mark.parametrize(
    ("num_examples", "num_features", "biased", "debiased"),
    [(100, 10, 0.10, 0.01), (100, 1000, 0.91, 0.02), (256, 16384, 0.984, -0.005)],
)
def test_only_biased_cka_rates_independent_features_as_similar(
    num_examples: int, num_features: int, biased: float, debiased: float
) -> None:
    x, y = (_features(seed, num_examples, num_features) for seed in (0, 1))
    actual = [_cka(x, y, unbiased=False), _cka(x, y, unbiased=True)]
    assert actual == pytest.approx([biased, debiased], abs=0.03)


def test_biased_cka_equals_its_spectral_form() -> None:
    x, y = (features - features.mean(axis=0) for features in (_features(0), _features(1)))
    (ux, sx, _), (uy, sy, _) = (np.linalg.svd(z, full_matrices=False) for z in (x, y))
    overlaps = (ux.T @ uy) ** 2
    expected = sx**2 @ overlaps @ sy**2 / np.sqrt((sx**4).sum() * (sy**4).sum())
    assert _cka(x, y, unbiased=False) == pytest.approx(expected, rel=1e-12)


def test_outliers_pull_cka_to_the_limit_of_davari() -> None:
    # Davari et al. (2022), arXiv 2210.16156: a fraction of the examples moves to infinity.
    x = _features(0, 1000, 20) * np.linspace(0.2, 2, 20)
    x -= x.mean(axis=0)
    moved = x[:50].mean(axis=0)
    spectrum = np.linalg.eigvalsh(x.T @ x / len(x))
    participation = spectrum.sum() ** 2 / (spectrum**2).sum()
    expected = 0.05 / 0.95 * (moved @ moved) / spectrum.sum() * np.sqrt(participation)
    y = x.copy()
    y[:50, 0] += 1e7
    # The distance to the limit falls as one over the translation.
    assert _cka(x, y, unbiased=False) == pytest.approx(expected, rel=1e-4)


def _hsic_by_definition(k: Array, m: Array) -> float:
    """Song et al. (2012), equation 5, term by term."""
    n, ones = len(k), np.ones(len(k))
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    trace = np.trace(k @ m)
    sums = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (ones @ k @ m @ ones)
    return float((trace + sums - cross) / (n * (n - 3)))


@pytest.mark.parametrize("num_examples", [4, 5, 30])
def test_unbiased_hsic_equals_its_definition(num_examples: int) -> None:
    k, m = _gram(0, num_examples), _gram(1, num_examples)
    assert kernels.hsic(k, m) == pytest.approx(_hsic_by_definition(k, m), rel=1e-9)


def test_biased_hsic_equals_its_definition() -> None:
    k, m, n = _gram(0), _gram(1), 20
    h = np.eye(n) - 1 / n
    expected = np.trace(k @ h @ m @ h) / (n - 1) ** 2
    assert kernels.hsic(k, m, unbiased=False) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("unbiased", [True, False])
def test_matrix_equals_cka_pair_by_pair(unbiased: bool) -> None:
    grams = [_gram(seed, num_features=3 + seed) for seed in range(4)]

    def hsic(k: Array, m: Array) -> float:
        return kernels.hsic(k, m, unbiased=unbiased)

    expected = [[hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)) for m in grams] for k in grams]
    np.testing.assert_allclose(kernels.cka_matrix(grams, unbiased=unbiased), expected, rtol=1e-10)


def test_cka_of_other_layers_is_a_block_of_the_whole_matrix() -> None:
    grams = [_gram(seed) for seed in range(5)]
    whole = kernels.cka_matrix(grams)
    np.testing.assert_allclose(kernels.cka_matrix(grams[:2], grams[2:]), whole[:2, 2:], rtol=1e-12)


def test_an_array_of_grams_is_the_same_as_a_sequence() -> None:
    grams = [_gram(seed) for seed in range(3)]
    np.testing.assert_array_equal(kernels.cka_matrix(np.stack(grams)), kernels.cka_matrix(grams))


def test_inputs_are_left_as_they_are() -> None:
    gram = _gram(0)
    kernels.cka_matrix([gram])
    np.testing.assert_array_equal(gram, _gram(0))


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3), unbiased=st.booleans())
def test_cka_ignores_rotation_and_scale(seed: int, scale: float, unbiased: bool) -> None:
    x, y = _features(seed), _features(seed + 1)
    rotation, _ = np.linalg.qr(_features(seed + 2, 5, 5))
    actual = _cka(scale * x @ rotation, y, unbiased=unbiased)
    assert actual == pytest.approx(_cka(x, y, unbiased=unbiased), abs=1e-10)


@given(seed=st.integers(0, 2**32 - 1), unbiased=st.booleans())
def test_cka_is_symmetric_and_one_with_itself(seed: int, unbiased: bool) -> None:
    actual = kernels.cka_matrix([_gram(seed), _gram(seed + 1)], unbiased=unbiased)
    np.testing.assert_allclose(actual, [[1, actual[1, 0]], [actual[0, 1], 1]], atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1))
def test_biased_cka_lies_between_zero_and_one(seed: int) -> None:
    actual = _cka(_features(seed), _features(seed + 1), unbiased=False)
    assert 0 <= actual <= 1


def test_cka_changes_under_an_invertible_linear_map() -> None:
    x, y = _features(0), _features(1)
    stretched = x * np.array([100, 1, 1, 1, 1])
    assert abs(_cka(stretched, y, unbiased=True) - _cka(x, y, unbiased=True)) > 0.01


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_layer_without_variance_is_nan(unbiased: bool, dtype: type[Any]) -> None:
    constant = kernels.linear_gram(np.full((20, 5), 0.1)).astype(dtype)
    actual = kernels.cka_matrix([_gram(0), constant], unbiased=unbiased)
    np.testing.assert_array_equal(np.isnan(actual), [[False, True], [True, True]])


def test_a_small_signal_on_a_large_mean_is_kept() -> None:
    x = _features(0)
    assert _cka(x + 1e4, x, unbiased=True) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("unbiased", [True, False])
def test_rows_of_a_centered_gram_sum_to_zero(unbiased: bool) -> None:
    np.testing.assert_allclose(kernels.center(_gram(0), unbiased).sum(axis=0), 0, atol=1e-12)


def test_linear_gram_flattens_feature_maps() -> None:
    maps = np.random.default_rng(0).standard_normal((4, 2, 3, 3))
    np.testing.assert_allclose(kernels.linear_gram(maps), np.einsum("iabc,jabc->ij", maps, maps))


def test_linear_gram_accumulates_in_float64() -> None:
    features = np.full((4, 100_000), 0.1, dtype=np.float32)
    expected = 100_000 * float(np.float32(0.1)) ** 2
    assert kernels.linear_gram(features)[0, 1] == pytest.approx(expected, rel=1e-12)


def test_rbf_gram_equals_its_definition() -> None:
    x = _features(0, 6)
    distances = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
    expected = np.exp(-distances / (2 * 0.7**2 * np.median(distances)))
    np.testing.assert_allclose(kernels.rbf_gram(x, 0.7), expected, rtol=1e-12)


def _call_center(gram: Array) -> object:
    return kernels.center(gram)


def _call_matrix(gram: Array) -> object:
    return kernels.cka_matrix([_gram(0), gram])


@pytest.mark.parametrize(
    ("call", "name"), [(_call_center, "`gram`"), (_call_matrix, r"`grams\[1\]`")]
)
@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones((4, 5)), r" has shape \[4, 5\]; expected \[examples, examples\]"),
        (np.ones(4), r" has shape \[4\]; expected \[examples, examples\]"),
        (np.eye(3), r" has 3 examples; expected at least 4 \(unbiased HSIC divides by n - 3\)"),
        (np.diag([1, np.nan, np.inf, 1]), r" holds 2 non-finite values"),
        (np.triu(np.ones((4, 4))), r" is not symmetric; make a Gram matrix of features with"),
    ],
)
def test_an_unusable_gram_is_refused(
    call: Callable[[Array], object], name: str, gram: Array, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=name + message):
        call(gram)


def test_biased_centring_needs_two_examples() -> None:
    with pytest.raises(InvalidInputError, match="`gram` has 1 examples; expected at least 2"):
        kernels.center(np.eye(1), unbiased=False)


def test_hsic_refuses_different_examples() -> None:
    with pytest.raises(MismatchError, match="`gram` has 5 examples, `other` 6"):
        kernels.hsic(_gram(0, 5), _gram(0, 6))


def test_grams_of_different_examples_are_refused() -> None:
    with pytest.raises(MismatchError, match=r"`grams\[1\]` has 6 examples, `grams\[0\]` 5"):
        kernels.cka_matrix([_gram(0, 5), _gram(0, 6)])


def test_others_of_different_examples_are_refused() -> None:
    with pytest.raises(MismatchError, match="`grams` are of 5 examples, `others` of 6"):
        kernels.cka_matrix([_gram(0, 5)], [_gram(0, 6)])


def test_no_gram_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="`grams` is empty; expected at least one"):
        kernels.cka_matrix([])


def test_features_need_two_axes() -> None:
    with pytest.raises(InvalidInputError, match=r"`features` has shape \[5\]; expected \[ex"):
        kernels.linear_gram(np.ones(5))


def test_features_must_be_finite() -> None:
    with pytest.raises(InvalidInputError, match="`features` holds 1 non-finite values"):
        kernels.linear_gram(np.array([[1.0, np.nan]]))


def test_rbf_threshold_must_be_positive() -> None:
    with pytest.raises(InvalidInputError, match=r"`threshold` \(=0\) must be > 0"):
        kernels.rbf_gram(np.eye(4), 0)


def test_rbf_needs_different_examples() -> None:
    with pytest.raises(InvalidInputError, match="median distance of 0 between examples"):
        kernels.rbf_gram(np.ones((4, 2)))


def _blocks(gram: Array, sizes: list[int]) -> list[Array]:
    ends = np.cumsum(sizes)
    return [gram[end - size : end, end - size : end] for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("unbiased", [True, False])
def test_blocks_count_by_the_pairs_they_hold(unbiased: bool) -> None:
    sizes = [9, 6, 5]
    x, y = (_blocks(_gram(seed), sizes) for seed in (0, 1))
    weights = [n * (n - 3) if unbiased else (n - 1) ** 2 for n in sizes]
    expected = sum(
        weight * kernels.hsic(k, m, unbiased=unbiased)
        for weight, k, m in zip(weights, x, y, strict=True)
    )
    actual = np.vdot(kernels.center_blocks(x, unbiased), kernels.center_blocks(y, unbiased))
    assert actual == pytest.approx(expected)


def test_blocks_of_equal_size_give_the_ratio_of_means_of_the_study() -> None:
    x, y = (_blocks(_gram(seed), [10, 10]) for seed in (0, 1))

    def mean_hsic(grams: list[Array], others: list[Array]) -> float:
        return float(np.mean([kernels.hsic(k, m) for k, m in zip(grams, others, strict=True)]))

    stack, others = (kernels.center_blocks(blocks)[None] for blocks in (x, y))
    expected = mean_hsic(x, y) / np.sqrt(mean_hsic(x, x) * mean_hsic(y, y))
    assert kernels.centered_cka(stack, others)[0, 0] == pytest.approx(expected)


def test_a_short_block_hardly_adds_to_the_spread() -> None:
    # Between unrelated layers the variance of HSIC₁ of n examples goes with 1 / (n(n - 3)): with
    # 32, 32, 32 and 4 of them it should be near that of the first three blocks alone.
    def values(sizes: list[int]) -> Array:
        found = []
        for seed in range(200):
            stacks = [
                kernels.center_blocks(_blocks(_gram(seed + 1000 * side, 100), sizes))[None]
                for side in (1, 2)
            ]
            found.append(kernels.centered_cka(*stacks)[0, 0])
        return np.array(found)

    with_short, without = values([32, 32, 32, 4]), values([32, 32, 32])
    assert with_short.std() < 1.1 * without.std()


def test_blocks_too_small_to_be_centered_are_zero() -> None:
    vector = kernels.center_blocks(_blocks(_gram(0), [17, 3]))
    assert np.flatnonzero(vector[17 * 17 :]).tolist() == []
    np.testing.assert_array_equal(vector[: 17 * 17], kernels.center(_gram(0)[:17, :17]).ravel())


def test_blocks_that_are_all_too_small_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="has 3 examples; expected at least 4"):
        kernels.center_blocks(_blocks(_gram(0, 6), [3, 3]))
