"""Which class recorded outputs predict."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonde.analysis import predicted_classes
from sonde.exceptions import InvalidInputError


@pytest.mark.parametrize(
    ("logits", "targets", "expected"),
    [
        ([[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]], [1, 2], [1, 0]),
        ([-2.0, 0.5, 0.0], [0, 1, 1], [0, 1, 0]),
        ([[-2.0], [0.5]], [1, 1], [0, 1]),
        ([[-2.0], [0.5]], None, [0, 1]),
        ([[1.0, -1.0]], [0], [0]),
    ],
)
def test_the_highest_score_or_the_sign_decides(
    logits: Any, targets: list[int] | None, expected: list[int]
) -> None:
    known: npt.NDArray[Any] | None = None if targets is None else np.array(targets)
    np.testing.assert_array_equal(predicted_classes(np.array(logits), known), expected)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4, 2)])
def test_what_predicts_no_class_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InvalidInputError, match=r"`logits` has shape .* one logit per example with"
    ):
        predicted_classes(np.ones(shape), np.array([0, 1, 2]))
