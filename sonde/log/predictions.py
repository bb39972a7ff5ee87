"""Predictions: which class the recorded scores of a model say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError

if TYPE_CHECKING:
    from .measure_log import MeasureLog

Scores = npt.NDArray[Any]  # Any: whichever float type was recorded.


def is_one_logit(logits: Scores, targets: npt.NDArray[Any] | None) -> bool:
    """Return whether outputs are one logit per example, whose sign decides between two classes.

    Args:
        logits: Recorded outputs, [examples] or [examples, …].
        targets: The class of each example; None if it is not known.
    """
    if logits.ndim > 2 or (logits.ndim == 2 and logits.shape[1] != 1):
        return False
    return targets is None or not np.setdiff1d(targets, (0, 1)).size


def predicted_classes(logits: Scores, targets: npt.NDArray[Any] | None = None) -> Scores:
    """Return the class that recorded outputs predict for each example.

    Args:
        logits: Scores [examples, classes], of which the highest decides; or one logit per example,
            [examples] or [examples, 1], positive for class 1 and else class 0.
        targets: The class of each example; with others than 0 and 1 one logit is refused.

    Returns:
        Classes, integers [examples].

    Raises:
        InvalidInputError: If outputs are neither.

    Example:
        >>> predicted_classes(np.array([[0.1, 0.3, 0.2], [2.0, 1.0, 0.0]]))
        array([1, 0])
        >>> predicted_classes(np.array([[-1.5], [0.2]]), np.array([0, 1]))
        array([0, 1])
    """
    if is_one_logit(logits, targets):
        return (logits.reshape(-1) > 0).astype(np.int64)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InvalidInputError(
            f"`logits` has shape {list(logits.shape)}; expected [examples, classes], or one logit "
            "per example with targets 0 and 1"
        )
    classes: Scores = logits.argmax(axis=1)
    return classes


def accuracy_of(log: MeasureLog, step: int = -1) -> float | None:
    """Return the share of examples whose class a record of predictions says rightly.

    Args:
        log: The measure `predictions` of one source.
        step: The step; negative numbers count from the end.

    Returns:
        In [0, 1]; None where targets are no classes, or are not known.

    Raises:
        StepNotFoundError: If the step was not recorded.
    """
    targets = log.targets_at(step)
    if targets is None or targets.ndim != 1 or targets.dtype.kind not in "iub":
        return None
    logits = log.array("logits", step)
    if not is_one_logit(logits, targets) and (logits.ndim != 2 or logits.shape[1] < 2):
        return None
    return float((predicted_classes(logits, targets) == targets).mean())
