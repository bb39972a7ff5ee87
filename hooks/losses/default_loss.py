"""The default loss: cross entropy of the scores among what a model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .scores import Output, Scores


class DefaultLoss:
    """Cross entropy, of the output that scores the classes; of two classes also of one logit.

    Args:
        targets: The class of each example of a probe, integers [examples].
        output: Which output of the model, as for `Predictions`; None where it is clear.
    """

    def __init__(self, targets: Tensor, output: Output | None = None) -> None:
        self.__name__ = "cross_entropy"
        self._scores = Scores(output, targets)

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        loss, scores = self.taken(outputs, len(targets))
        return loss(scores, targets)

    def taken(self, outputs: Any, num_examples: int) -> tuple[Callable[[Any, Any], Tensor], Tensor]:
        """Return the loss of what the model returned, as a function of one tensor, and that.

        Raises:
            OutputChoiceError: If it is not clear which output is meant.
        """
        _, scores = self._scores.of(outputs, num_examples)
        is_sign = self._scores.is_sign(scores, num_examples)
        return (_of_one_logit if is_sign else F.cross_entropy), scores


def _of_one_logit(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.reshape(-1), targets.to(logits.dtype))
