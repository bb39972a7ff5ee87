from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sonde.exceptions import InvalidInputError
from sonde.hooks import Full, Gram, Sketch, Store


def stored(store: Store, features: Tensor, sizes: list[int] | None = None) -> Any:
    accumulator = store.accumulator(len(features))
    for batch in features.split(sizes or [len(features)]):
        accumulator.add(batch)
    return accumulator.result("layer").values


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_gram_of_batches_is_that_of_the_whole(sizes: list[int], width: int, seed: int) -> None:
    features = torch.randn(
        sum(sizes), width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    expected = features.numpy() @ features.numpy().T
    np.testing.assert_allclose(stored(Gram(), features, sizes), expected, rtol=1e-12, atol=1e-12)


def test_gram_takes_features_before_they_are_overwritten() -> None:
    features = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    accumulator = Gram().accumulator(4)
    for start in (0, 2):
        batch = features[start : start + 2].clone()
        accumulator.add(batch)
        batch.zero_()
    expected = features @ features.T
    assert accumulator.result("layer").values.tolist() == expected.tolist()


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
    assert np.array_equal(stored(Sketch(8), features), stored(Sketch(8), features, [1, 3]))


def test_sketch_bytes_are_pinned_across_versions() -> None:
    expected = [[0.0, 3.0, 7.0, 1.0]]
    assert stored(Sketch(4), torch.arange(6.0)[None]).tolist() == expected


@settings(deadline=None, max_examples=5)
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
        (lambda: Gram(torch.float16), "must be float32 or float64"),
        (lambda: Sketch(0), r"`dim` \(=0\) must be >= 1"),
        (lambda: Full(torch.int8), "must be a floating-point type"),
        (lambda: Full(pool=cast(Any, "sum")), "must be 'mean', 'max' or None"),
    ],
)
def test_stores_refuse_what_they_cannot_keep(make: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()
