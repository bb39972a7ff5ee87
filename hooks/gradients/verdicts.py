"""Verdicts: what was found for a model is not found again, unless shapes or the loss are others.

With as many examples as time steps the batch is another axis, and a loss may use parameters, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeAlias
from weakref import WeakKeyDictionary

from torch import nn

from sonde.hooks.losses.per_example import Loss

from .given_examples import GivenExamples

Problems: TypeAlias = dict[str, str]
"""Why no rule gives the gradients of a parameter, by name; of a model they do not change."""


@dataclass
class Verdict:
    """What was found for batches of some shapes.

    Attributes:
        traced: The parameters whose rows were traced.
        checked: The parameters that were checked.
        choices: Which of `layouts.ORDERS` told where the examples are, if it was not the first.
        problems: Why no rule gives the gradients of a parameter.
        in_functions: The parameters that autograd functions use, where nothing is seen.
        untransformed: Why `torch.func` does not give them either.
        loss: Returns the loss that was used, as long as it is there.
    """

    loss: Callable[[], Loss | None]
    traced: set[str] = field(default_factory=set)
    checked: set[str] = field(default_factory=set)
    choices: dict[str, int] = field(default_factory=dict)
    problems: Problems = field(default_factory=dict)
    in_functions: set[str] = field(default_factory=set)
    untransformed: Problems = field(default_factory=dict)


_verdicts: WeakKeyDictionary[nn.Module, dict[Hashable, Verdict]] = WeakKeyDictionary()


def verdict_of(model: nn.Module, loss: Loss | None, examples: GivenExamples) -> Verdict:
    """Return what was found for such examples; nothing yet, if there have been none."""
    verdicts = _verdicts.setdefault(model, {})
    key = (examples.num_examples, examples.probe.axes.batch_dim, examples.shapes, id(loss))
    verdict = verdicts.get(key)
    if verdict is None or verdict.loss() is not loss:
        # Another loss may have been made where one was that is gone.
        verdict = verdicts[key] = Verdict(_reference(loss))
    return verdict


def _reference(loss: Loss | None) -> Callable[[], Loss | None]:
    """Refer to a loss without keeping it, or the model it may hold, alive."""
    try:
        return (lambda: None) if loss is None else weakref.ref(loss)
    except TypeError:  # Not every callable can be referred to.
        return lambda: loss
