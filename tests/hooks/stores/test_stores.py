from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sonde
from sonde.analysis import kernels
from sonde.exceptions import InvalidInputError
from sonde.hooks import Full, Gram, Sketch, Store
from sonde.log import LogArray


def stored(store: Store, features: Tensor, sizes: list[int] | None = None) -> Any:
    accumulator = store.accumulator(len(features), features[:0])
    for batch in features.split(sizes or [len(features)]):
        accumulator.add(batch)
    return of_features(accumulator.arrays("layer"))


def of_features(arrays: list[LogArray]) -> Any:
    """Undo what a reference, if there is one, does to inner products or sketches."""
    values, *beside = (array.values for array in arrays)
    for others in beside:
        is_gram = arrays[1].field == "gram_offset"
        values = values + (others[:, None] + others[None, :] if is_gram else others)
    return values


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_gram_of_batches_is_that_of_the_whole(sizes: list[int], width: int, seed: int) -> None:
    features = torch.randn(
        sum(sizes), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    expected = features.numpy() @ features.numpy().T
    np.testing.assert_allclose(stored(Gram(), features, sizes), expected, rtol=1e-12, atol=1e-12)


def test_gram_takes_features_before_they_are_overwritten() -> None:
    features = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    accumulator = Gram().accumulator(4, torch.empty(0, 1))
    for start in (0, 2):
        batch = features[start : start + 2].clone()
        accumulator.add(batch)
        batch.zero_()
    expected = features @ features.T
    assert accumulator.arrays("layer")[0].values.tolist() == expected.tolist()


def test_gram_of_half_precision_is_accumulated_in_float32() -> None:
    features = torch.full((2, 4096), 1.0, dtype=torch.float16)
    features[0, 0] = 3
    assert stored(Gram(), features).tolist() == [[4104.0, 4098.0], [4098.0, 4096.0]]


def test_gram_flattens_feature_maps() -> None:
    maps = torch.arange(24.0).reshape(2, 3, 2, 2)
    flat = maps.flatten(1)
    assert stored(Gram(), maps).tolist() == (flat @ flat.T).tolist()


def test_full_keeps_every_bit() -> None:
    features = torch.randn(5, 7)
    assert np.array_equal(stored(Full(), features, [2, 3]), features.numpy())


def test_full_pools_feature_maps_but_not_matrices() -> None:
    maps = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert stored(Full(pool="mean"), maps).tolist() == [[1.5, 5.5]]
    assert stored(Full(pool="max"), maps).tolist() == [[3.0, 7.0]]
    assert stored(Full(pool="mean"), maps.flatten(1)).tolist() == maps.flatten(1).tolist()


def test_sketch_is_the_same_projection_every_time() -> None:
    features = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    whole = stored(Sketch(8), features)
    assert np.array_equal(whole, stored(Sketch(8), features, [2, 2]))
    # After a batch of one example the sums are of differences to it: rounded in another way.
    np.testing.assert_allclose(stored(Sketch(8), features, [1, 3]), whole, atol=1e-5)


def test_sketch_bytes_are_pinned_across_versions() -> None:
    expected = [[0.0, 3.0, 7.0, 1.0]]
    assert stored(Sketch(4), torch.arange(6.0)[None]).tolist() == expected


@settings(max_examples=5)
@given(st.integers(0, 1000))
def test_sketch_inner_products_are_unbiased(seed: int) -> None:
    features = torch.randn(2, 40, generator=torch.Generator().manual_seed(seed)).double()
    exact = float(features[0] @ features[1])
    dim, draws = 16, 600
    estimates = []
    for number in range(draws):
        sketch = stored(Sketch(dim, seed=number), features)
        estimates.append(sketch[0] @ sketch[1])
    squares = (features**2).sum(1)
    # Five standard errors of the mean, by the bound on the variance that the docstring states.
    bound = 5 * np.sqrt((float(squares.prod()) + exact**2) / dim / draws)
    assert abs(float(np.mean(estimates)) - exact) < bound


def test_another_seed_is_another_projection() -> None:
    features = torch.randn(2, 40)
    assert not np.array_equal(stored(Sketch(8), features), stored(Sketch(8, seed=1), features))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gram(torch.float16), "must be torch.float32 or torch.float64"),
        (lambda: Sketch(0), r"`dim` \(=0\) must be a whole number >= 1"),
        (lambda: Full(torch.int8), "must be a floating-point type"),
        (lambda: Full(pool=cast(Any, "sum")), "must be 'mean', 'max' or None"),
    ],
)
def test_stores_refuse_what_they_cannot_keep(make: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()


def block_run(path: Path, store: Store, features: Tensor, **options: Any) -> sonde.Run:
    probe = sonde.Probe(features, **options)
    measure = sonde.Activations(probe, ["0", "1"], store)
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    with sonde.Recorder(path, model, [measure], on_error="raise") as recorder:
        recorder.measure()
    return sonde.open_run(path)


@pytest.mark.parametrize("num_examples", [24, 16, 19, 21])
def test_blocks_of_a_gram_matrix_are_those_of_the_whole(tmp_path: Path, num_examples: int) -> None:
    features = torch.randn(num_examples, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    whole = block_run(tmp_path / "whole", sonde.Gram(), features)
    blocks = block_run(tmp_path / "blocks", sonde.Gram(block=8), features, batch_size=5)
    for layer in ("0", "1"):
        gram = whole.activations[layer].gram()
        found = blocks.activations.gram_blocks(layer)
        assert [len(block) for block in found] == [
            min(8, num_examples - start) for start in range(0, num_examples, 8)
        ]
        for number, block in enumerate(found):
            rows = slice(8 * number, 8 * number + len(block))
            np.testing.assert_allclose(block, gram[rows, rows], rtol=1e-6)
    with pytest.raises(KeyError, match="kept only blocks of the Gram matrix of layer '0'"):
        blocks.activations.gram(layer="0")


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_of_blocks_is_minibatch_cka(tmp_path: Path, unbiased: bool) -> None:
    features = torch.randn(19, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    run = block_run(tmp_path / "blocks", sonde.Gram(block=8), features)
    layers = [features.flatten(1).numpy(), features.flatten(1).relu().numpy()]
    # Section 3 of 2010.15327: sums of HSIC over minibatches, each by the pairs of examples in it.
    # The last one has 3 examples, which the unbiased estimate cannot use.
    sums = np.zeros((2, 2))
    for start in (0, 8) if unbiased else (0, 8, 16):
        grams = [layer[start : start + 8] @ layer[start : start + 8].T for layer in layers]
        weight = 8 * 5 if unbiased else (len(grams[0]) - 1) ** 2
        found_hsic = [[kernels.hsic(a, b, unbiased=unbiased) for b in grams] for a in grams]
        sums += weight * np.array(found_hsic)
    expected = sums[0, 1] / np.sqrt(sums[0, 0] * sums[1, 1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sonde.analysis.cka(run, unbiased=unbiased)
    assert float(found[0, 1]) == pytest.approx(expected, rel=1e-9)
    assert found.attrs["num_examples"] == (16 if unbiased else 19)
    assert ["leaves out 3 examples" in str(warning.message) for warning in caught] == (
        [True] if unbiased else []
    )


def test_some_units_are_columns_of_all(tmp_path: Path) -> None:
    features = torch.arange(24.0).reshape(2, 12)
    kept = stored(Full(units=5), features)
    columns = kept[0].astype(int)
    assert len(set(columns)) == 5
    assert (np.diff(columns) > 0).all()
    np.testing.assert_array_equal(kept, features[:, columns])
    np.testing.assert_array_equal(kept, stored(Full(units=5), features, [1, 1]))
    assert (columns != stored(Full(units=5, seed=2), features)[0]).any()
    np.testing.assert_array_equal(stored(Full(units=12), features), features)
    counts = np.bincount(
        np.concatenate(
            [stored(Full(units=3, seed=seed), features)[0] for seed in range(400)]
        ).astype(int)
    )
    # Each of 12 is drawn 400 · 3 / 12 = 100 times, give or take 5 standard deviations.
    assert np.abs(counts - 100).max() < 44


def test_a_block_too_small_to_be_centred_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`block` \(=3\) must be a whole number >= 4"):
        sonde.Gram(block=3)


@pytest.mark.parametrize("dim", [1, 64, 256, 257, 1000])
def test_each_feature_goes_to_one_sum_with_a_sign(dim: int) -> None:
    num_features = 5000  # More than are projected at a time.
    columns = stored(Sketch(dim), torch.eye(num_features)[::611])
    assert np.array_equal(np.abs(columns).sum(1), np.ones(len(columns)))
    features = torch.randn(3, num_features, generator=torch.Generator().manual_seed(2))
    sums = np.zeros((3, dim))
    for feature, column in enumerate(stored(Sketch(dim), torch.eye(num_features))):
        sums += features[:, feature, None].double().numpy() * column
    np.testing.assert_allclose(stored(Sketch(dim), features), sums, rtol=1e-4, atol=1e-4)
