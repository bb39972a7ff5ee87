from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks import DecisionPlanes, Subject


class Coordinates(nn.Module):
    """A "classifier" that only gives back the points it is asked about."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5]


def recorded(measure: DecisionPlanes, model: nn.Module) -> dict[str, Any]:
    arrays = [*measure.record(Subject(model)).arrays, *measure.table()]
    return {array.field: array.values for array in arrays}


def points_of(measure: DecisionPlanes, shape: tuple[int, ...]) -> Tensor:
    model = Coordinates()
    points: list[Tensor] = []
    model.register_forward_hook(lambda _, args, __: points.append(args[0]))
    recorded(measure, model)
    return torch.cat(points).reshape(shape)


@pytest.fixture
def examples() -> Tensor:
    return torch.randn(30, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def classes() -> Tensor:
    return torch.arange(30) % 5


def test_points_are_those_of_a_plane_through_the_triplet(examples: Tensor, classes: Tensor) -> None:
    measure = DecisionPlanes(examples, classes, triplets=3, resolution=5)
    points = points_of(measure, (3, 25, 6))
    tables = {array.field: array.values for array in measure.table()}
    for plane in range(3):
        corners = examples.flatten(1)[tables["triplet"][plane]]
        spanned = torch.linalg.matrix_rank(torch.cat([points[plane], corners]) - corners[0])
        assert int(spanned) == 2


def test_distances_between_points_are_those_of_their_coordinates(
    examples: Tensor, classes: Tensor
) -> None:
    measure = DecisionPlanes(examples, classes, triplets=2, resolution=4)
    points = points_of(measure, (2, 4, 4, 6))
    extent = next(a.values for a in measure.table() if a.field == "extent")
    for plane in range(2):
        (low_1, high_1), (low_2, high_2) = extent[plane]
        columns, rows = np.linspace(low_1, high_1, 4), np.linspace(low_2, high_2, 4)
        grid = torch.tensor(np.stack(np.meshgrid(columns, rows), -1))
        actual = torch.cdist(points[plane].flatten(0, 1), points[plane].flatten(0, 1))
        expected = torch.cdist(grid.flatten(0, 1), grid.flatten(0, 1))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_triplet_lies_where_its_coordinates_say(examples: Tensor, classes: Tensor) -> None:
    measure = DecisionPlanes(examples, classes, triplets=4, resolution=2)
    tables = {array.field: array.values for array in measure.table()}
    for corners, coordinates in zip(tables["triplet"], tables["coordinates"], strict=True):
        flat = examples.flatten(1)[corners]
        at = torch.tensor(coordinates)
        torch.testing.assert_close(torch.cdist(flat, flat), torch.cdist(at, at))
        assert coordinates[0].tolist() == [0.0, 0.0]
        assert coordinates[1, 1] == 0
        assert coordinates[2, 1] > 0


def test_the_grid_reaches_beyond_the_triplet_by_the_margin(
    examples: Tensor, classes: Tensor
) -> None:
    tables = {
        array.field: array.values
        for array in DecisionPlanes(examples, classes, triplets=3, margin=0.5).table()
    }
    low, high = tables["coordinates"].min(1), tables["coordinates"].max(1)
    np.testing.assert_allclose(tables["extent"][..., 0], low - 0.5 * (high - low))
    np.testing.assert_allclose(tables["extent"][..., 1], high + 0.5 * (high - low))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(["distinct", "any", "same"]))
def test_triplets_are_of_the_population(seed: int, population: Any) -> None:
    targets = torch.arange(12) % 4
    inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
    measure = DecisionPlanes(inputs, targets, triplets=20, population=population, seed=seed)
    tables = {array.field: array.values for array in measure.table()}
    counts = {len(set(row)) for row in tables["triplet_target"].tolist()}
    assert counts <= {"distinct": {3}, "any": {1, 2, 3}, "same": {1}}[population]
    assert {len(set(row)) for row in tables["triplet"].tolist()} == {3}


def test_batches_of_any_size_give_the_same_labels(examples: Tensor, classes: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5)).double()
    labels = [
        recorded(
            DecisionPlanes(examples, classes, triplets=4, resolution=6, batch_size=size), model
        )["labels"].tolist()
        for size in (1, 50, 10**6)
    ]
    assert labels[0] == labels[1] == labels[2]


def test_rows_run_along_the_second_axis(examples: Tensor, classes: Tensor) -> None:
    measure = DecisionPlanes(examples, classes, triplets=1, resolution=7, margin=0)
    points = points_of(measure, (7, 7, 6))
    corners = examples.flatten(1)[
        next(a for a in measure.table() if a.field == "triplet").values[0]
    ]
    side = corners[1] - corners[0]
    along_row = (points[0, 1] - points[0, 0]) @ side
    along_column = (points[1, 0] - points[0, 0]) @ side
    assert float(along_row) > 0
    assert abs(float(along_column)) < 1e-9


def test_the_digest_tells_other_planes_apart(examples: Tensor, classes: Tensor) -> None:
    made = [
        DecisionPlanes(examples, classes, triplets=5),
        DecisionPlanes(examples, classes, triplets=5),
        DecisionPlanes(examples, classes, triplets=5, seed=1),
        DecisionPlanes(examples, classes, triplets=5, resolution=9),
        DecisionPlanes(examples * 2, classes, triplets=5),
    ]
    digests = [measure.describe()["digest"] for measure in made]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"triplets": [[0, 0, 1]]}, r"the examples at \[0, 0, 1\] span no plane"),
        ({"triplets": [[0, 1, 99]]}, "positions 0 to 99; there are 30 examples"),
        ({"triplets": [[0, 1]]}, r"expected \[triplets, 3\]"),
        ({"triplets": 0}, r"`triplets` \(=0\) must be a whole number >= 1"),
        ({"ids": range(5)}, r"`ids` has shape \(5,\); expected one integer for each of the 30"),
        ({"ids": np.full(30, 2**64 - 1, np.uint64)}, "the log holds ids as int64"),
        ({"batch_size": 0}, r"`batch_size` \(=0\) must be a whole number >= 1"),
        ({"resolution": 1}, r"`resolution` \(=1\) must be a whole number >= 2"),
        ({"population": "all"}, "must be 'distinct', 'any' or 'same'"),
        ({"targets": torch.zeros(30)}, "expected one class for each of the 30"),
        ({"targets": torch.zeros(30, dtype=torch.int64)}, "cannot draw triplets"),
        ({"inputs": torch.ones(30, 4, dtype=torch.int64)}, "expected floating-point examples"),
        ({"inputs": torch.ones(30, 4)}, "drawn triplets span no plane"),
        ({"inputs": torch.arange(30.0)[:, None] * torch.ones(4)}, "span no plane"),
    ],
)
def test_what_spans_no_plane_is_refused_before_training(
    options: dict[str, Any], message: str, examples: Tensor, classes: Tensor
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        DecisionPlanes(**{"inputs": examples, "targets": classes, **options}).check(nn.Identity())


def test_outputs_that_are_no_class_scores_are_refused(examples: Tensor, classes: Tensor) -> None:
    measure = DecisionPlanes(examples, classes, triplets=1)
    with pytest.raises(InvalidInputError, match=r"need scores \[examples, classes\] of at"):
        measure.record(Subject(nn.Identity()))
