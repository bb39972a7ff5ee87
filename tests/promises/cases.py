"""The cases: models × losses × regimes, drawn from all that fit together."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .losses import IGNORED, LOSSES, LossCase, draw_targets
from .models import CLASSIFIERS, LANGUAGE_MODELS, draw_inputs, make_model
from .truth import doubled, scores_of

NUM_EXAMPLES = 8
# The least and highest margin of the true class to the next: float32 loses the true class's entry
# from 17 on, float64 from 37 on; from 43 on float32 has no squares of its gradients.
MARGINS = {"sure": (18.0, 26.0), "very sure": (38.0, 43.0)}

CaseT = TypeVar("CaseT", bound=Hashable)


@dataclass(frozen=True)
class Setup:
    """A model, examples, and how they are trained on."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: LossCase
    is_sure: bool = False

    @property
    def returns_loss(self) -> bool:
        return hasattr(self.model, "gpt")


def fits(model: str, loss: str) -> bool:
    """Whether a loss takes what a model returns."""
    if model in ("own loss", "own loss in a dict"):
        return loss == "its own"
    return (LOSSES[loss].kind == "tokens") == (model in LANGUAGE_MODELS) and loss != "its own"


def make_setup(model: str, loss: str, data: str = "plain", num: int = NUM_EXAMPLES) -> Setup:
    """Make a model and examples.

    Args:
        model: Its name.
        loss: That of its loss.
        data: `plain`; `sure` and `very sure`: the model is, as float32 and float64 do not show it;
            `offset`: inputs have a large common offset.
        num: The number of examples.
    """
    made, case = make_model(model), LOSSES[loss]
    inputs, targets = draw_inputs(model, num), draw_targets(case.kind, num)
    if data == "offset":
        inputs = inputs + 100.0
        for parameter in made.parameters():
            if parameter.shape[-1:] == inputs.shape[1:] and parameter.ndim == 2:
                with torch.no_grad():  # The features behind it are as large as without.
                    parameter.sub_(parameter.mean(-1, keepdim=True))
    elif data in MARGINS:
        inputs, targets = sure_examples(made, model, case, num, MARGINS[data])
    return Setup(made, inputs, targets, case, data in MARGINS)


def sure_examples(
    model: nn.Module, name: str, loss: LossCase, num: int, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Choose examples that a model is sure of, and raise its gain; return them and their targets.

    Args:
        model: The model.
        name: Its name.
        loss: The loss.
        num: How many examples.
        bounds: The least and highest margin of the true class to the next, or of a score to 0. Of
            tokens those with other margins are left out.
    """
    inputs = draw_inputs(name, 3000, seed=5)
    body = getattr(model, "gpt", model)
    with torch.no_grad():
        scores = scores_of(doubled(body)(doubled(inputs)))
    highest = scores.topk(2, dim=-1)
    margins = highest.values[..., 0] - highest.values[..., 1]
    if loss.kind in ("many", "values"):
        margins = scores.abs().amin(-1)
    lowest = margins.quantile(0.5)
    is_sure = (margins >= lowest) & (margins <= bounds[1] / bounds[0] * lowest)
    chosen = is_sure.view(len(inputs), -1).sum(1).topk(num).indices.sort().values
    body.gain = bounds[0] / float(lowest)
    best, targets = highest.indices[chosen, ..., 0], draw_targets(loss.kind, num)
    if loss.kind == "many":
        targets = (scores[chosen] > 0).float()
    elif loss.kind == "tokens":
        targets = torch.where(is_sure[chosen], best, IGNORED)
    elif loss.kind == "weighted":
        targets[:, 0] = best.float()
    elif loss.kind != "values":
        targets = torch.where(targets == IGNORED, targets, best)
    return inputs[chosen], targets


def drawn(
    cases: Iterable[CaseT], kind_of: Callable[[CaseT], Hashable], each: int, seed: int = 16
) -> list[CaseT]:
    """Draw some cases of each kind, the same every day."""
    kinds: dict[Hashable, list[CaseT]] = defaultdict(list)
    for case in cases:
        kinds[kind_of(case)].append(case)
    rng = random.Random(seed)
    return [c for of in kinds.values() for c in rng.sample(of, min(each, len(of)))]


def pairs() -> list[tuple[str, str]]:
    """Every model with every loss that takes what it returns."""
    models = (*CLASSIFIERS, *LANGUAGE_MODELS)
    return [pair for pair in itertools.product(models, LOSSES) if fits(*pair)]


def named(case: Sequence[Any]) -> str:
    """Return the readable id of a case."""
    return "-".join(str(part) for part in case)
