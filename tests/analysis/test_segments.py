"""Segmentation of maps into blocks: planted blocks, noise, and every segmentation of small maps."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.analysis.arrays import segments
from sonde.exceptions import InvalidInputError

Array = npt.NDArray[np.float64]
Blocks = list[tuple[int, int]]


def noise(generator: np.random.Generator, num_layers: int, size: float) -> Array:
    upper = np.triu(generator.normal(size=(num_layers, num_layers)) * size, 1)
    both: Array = upper + upper.T
    return both


def planted(num_layers: int, blocks: Blocks, height: float, decay: float = np.inf) -> Array:
    at = np.arange(num_layers)
    similarity: Array = 0.4 * np.exp(-np.abs(at[:, None] - at) / decay)
    for first, end in blocks:
        similarity[first:end, first:end] += height
    return similarity


def slow_gain(similarity: Array, first: int, end: int) -> float:
    num_layers = len(similarity)
    excess, number = 0.0, 0
    for i, j in combinations(range(first, end), 2):
        distance = j - i
        same = [similarity[k, k + distance] for k in range(num_layers - distance)]
        excess += similarity[i, j] - np.mean(same)
        number += 1
    return float(max(excess, 0) ** 2 / number)


def slow_contrast(similarity: Array, first: int, end: int) -> float:
    inside: dict[int, list[float]] = {}
    across: dict[int, list[float]] = {}
    for i, j in combinations(range(len(similarity)), 2):
        number = (first <= i < end) + (first <= j < end)
        where = {2: inside, 1: across}.get(number)
        if where is not None:
            where.setdefault(j - i, []).append(similarity[i, j])
    total = [
        (len(values) * (np.mean(values) - np.mean(across[distance])), len(values))
        for distance, values in inside.items()
        if distance in across
    ]
    weight = sum(number for _, number in total)
    return float(sum(part for part, _ in total) / weight) if weight else np.nan


def all_segmentations(num_layers: int, number: int, min_size: int) -> list[Blocks]:
    return [
        blocks
        for ends in combinations(range(num_layers + 1), 2 * number)
        for blocks in [list(zip(ends[::2], ends[1::2], strict=True))]
        if all(end - first >= min_size for first, end in blocks)
    ] + (
        [
            [(a, b), (b, c)]
            for a, b, c in combinations(range(num_layers + 1), 3)
            if min(b - a, c - b) >= min_size
        ]
        if number == 2
        else []
    )


@settings(deadline=None, max_examples=25)
@given(num_layers=st.integers(3, 8), seed=st.integers(0, 999))
def test_gains_and_contrasts_are_those_of_a_loop_over_pairs(num_layers: int, seed: int) -> None:
    similarity = noise(np.random.default_rng(seed), num_layers, 1.0)
    gain, contrast = segments.gains(similarity, 2), segments.contrasts(similarity)
    for first, end in combinations(range(num_layers + 1), 2):
        if end - first >= 2:
            expected = slow_gain(similarity, first, end)
            np.testing.assert_allclose(gain[first, end], expected, atol=1e-10)
        expected = slow_contrast(similarity, first, end)
        np.testing.assert_allclose(contrast[first, end], expected, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(num_layers=st.integers(4, 9), min_size=st.integers(2, 3), seed=st.integers(0, 999))
def test_the_best_blocks_are_the_best_of_all(num_layers: int, min_size: int, seed: int) -> None:
    gain = segments.gains(noise(np.random.default_rng(seed), num_layers, 1.0), min_size)
    found = segments.segmentations(gain, 2)
    for number, segmentation in enumerate(found, 1):
        every = all_segmentations(num_layers, number, min_size)
        best = max(
            sum(gain[block] for block in blocks)
            for blocks in every
            if all(gain[block] > 0 for block in blocks)
        )
        np.testing.assert_allclose(segmentation.gain, best)
        np.testing.assert_allclose(sum(gain[block] for block in segmentation.blocks), best)
        assert all(a[1] <= b[0] for a, b in combinations(segmentation.blocks, 2))


@settings(deadline=None, max_examples=60, derandomize=True)  # Exact in 2,000 of 2,000 maps.
@given(data=st.data())
def test_planted_blocks_are_recovered_exactly(data: st.DataObject) -> None:
    """Contrast .4, noise of .05 in every entry, with and without a decay over the distance."""
    sizes = data.draw(st.lists(st.integers(3, 9), min_size=1, max_size=3))
    gaps = data.draw(st.lists(st.integers(1, 6), min_size=len(sizes) + 1, max_size=len(sizes) + 1))
    decay = data.draw(st.sampled_from([np.inf, 8.0]))
    blocks, at = [], 0
    for gap, size in zip(gaps, sizes, strict=False):
        blocks.append((at + gap, at + gap + size))
        at += gap + size
    num_layers = at + gaps[-1]
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    similarity = planted(num_layers, blocks, 0.4, decay) + noise(generator, num_layers, 0.05)
    found = segments.segmentations(segments.gains(similarity), 6)
    assert found[len(blocks) - 1].blocks == blocks
    drawn = np.stack([noise(generator, num_layers, 0.05) for _ in range(99)])
    chosen, _ = segments.choose(found, segments.gains(drawn).max(axis=(1, 2)))
    assert chosen.blocks == blocks


def test_every_further_block_has_to_gain_enough() -> None:
    found = [
        segments.Segmentation(10.0, [(0, 3)]),
        segments.Segmentation(14.0, [(0, 3), (4, 8)]),
        segments.Segmentation(14.5, [(0, 3), (4, 8), (9, 12)]),
    ]
    null_gains = np.arange(101.0) / 100
    chosen, needed = segments.choose(found, null_gains, 0.05)
    assert (chosen, needed) == (found[1], 0.95)
    assert segments.choose(found, null_gains + 20)[0].blocks == []


def test_neighbouring_blocks_are_told_apart() -> None:
    similarity = planted(20, [(0, 9), (9, 20)], 0.5)
    found = segments.segmentations(segments.gains(similarity), 4)
    assert found[1].blocks == [(0, 9), (9, 20)]


def test_blocks_are_found_in_noise_at_the_stated_level() -> None:
    generator = np.random.default_rng(0)
    num_found = 0
    for _ in range(200):
        maps = np.stack([noise(generator, 20, 1.0) for _ in range(60)])
        gain = segments.gains(maps)
        found = segments.segmentations(gain[0], 5)
        chosen, _ = segments.choose(found, gain[1:].max(axis=(1, 2)))
        num_found += bool(chosen.blocks)
    # Binomial(200, 0.05) lies in 1 to 22 with probability 0.9998.
    assert 1 <= num_found <= 22


@pytest.mark.parametrize("similarity", [np.ones((9, 9)), planted(12, [], 0, 4.0)])
def test_similarity_of_the_distance_alone_has_no_block_and_no_contrast(similarity: Array) -> None:
    assert segments.segmentations(segments.gains(similarity), 3) == []
    contrast = segments.contrasts(similarity)
    np.testing.assert_allclose(contrast[np.isfinite(contrast)], 0, atol=1e-12)


def test_the_contrast_of_a_planted_block_is_its_height() -> None:
    contrast = segments.contrasts(planted(15, [(4, 10)], 0.3, 5.0))
    np.testing.assert_allclose(contrast[4, 10], 0.3)


def test_many_maps_at_once_are_each_by_itself() -> None:
    maps = np.stack([noise(np.random.default_rng(seed), 7, 1.0) for seed in range(3)])
    each = np.stack([segments.gains(one) for one in maps])
    np.testing.assert_allclose(segments.gains(maps), each, atol=1e-12)


def test_two_layers_have_no_block_of_three() -> None:
    assert segments.segmentations(segments.gains(np.eye(2)), 3) == []


@pytest.mark.parametrize(
    ("similarity", "min_size", "message"),
    [
        (np.eye(3), 1, r"`min_size` \(=1\) must be at least 2 layers"),
        (np.ones((3, 2)), 2, r"shape \[3, 2\]; expected \[layers, layers\]"),
        (np.full((3, 3), np.nan), 2, "`similarity` holds NaN; leave out the layers"),
    ],
)
def test_what_is_no_map_is_refused(similarity: Array, min_size: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        segments.gains(similarity, min_size)
