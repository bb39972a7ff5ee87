"""Parameters without a rule: by `torch.func`, or one example after the other, or named."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from sonde.hooks.gradients.factors.dense import Factor
from sonde.hooks.gradients.rules.places import UnsupportedError
from sonde.hooks.gradients.uses.parameters import OwnedParameter
from sonde.hooks.gradients.uses.stand_ins import HeldParameters
from sonde.hooks.losses.coupled import COUPLED
from sonde.hooks.losses.per_example import Loss

from .batch import BatchGradients
from .checks import differing
from .given_examples import GivenExamples
from .one_by_one import gradients_one_by_one
from .verdicts import Problems, Verdict
from .vmapped import fallback_gradients


class WithoutRules:
    """Forms the gradients that no rule gives.

    Args:
        model: The model.
        loss: Its loss.
        held: What stands for the parameters of the model.
        memory: How many bytes the gradients of a batch may take.

    Attributes:
        problems: Why no rule gives them, by the name of the parameter.
        one_by_one: The parameters that were evaluated one example after the other, and why
            `torch.func` does not give them.
        unsupported: Why there are none at all.
    """

    def __init__(
        self, model: nn.Module, loss: Loss | None, held: HeldParameters, memory: int
    ) -> None:
        self._model = model
        self._loss = loss
        self._held = held
        self._memory = memory
        self.problems: Problems = {}
        self.one_by_one: Problems = {}
        self.unsupported: Problems = {}

    def coverage(self, name: str) -> str | None:
        """Return how a parameter is covered; None if it is by rules."""
        if name not in self.problems:
            return None
        if name in self.one_by_one:
            reasons = "; ".join(dict.fromkeys([self.problems[name], self.one_by_one[name]]))
            return f"fallback: one example after the other, because {reasons}"
        return f"fallback: {self.problems[name]}"

    def parts(
        self, examples: GivenExamples, verdict: Verdict, parameters: Sequence[OwnedParameter]
    ) -> Iterator[dict[OwnedParameter, Factor]]:
        """Yield the gradients of examples, of as many parameters at once as fit into memory.

        Args:
            examples: The examples.
            verdict: What was found for such examples; what they show is noted in it.
            parameters: The parameters, which no rule covers.
        """
        remaining = list(parameters)
        while remaining:
            fitting = that_fit(remaining, {}, examples.num_examples, self._memory)
            yield self._factors(examples, verdict, fitting)
            remaining = remaining[len(fitting) :]

    def _factors(
        self, examples: GivenExamples, verdict: Verdict, parameters: Sequence[OwnedParameter]
    ) -> dict[OwnedParameter, Factor]:
        known = verdict.untransformed
        found = self._transformed(examples, verdict, [p for p in parameters if p.name not in known])
        # No gradient of an example is there to be found.
        self.unsupported |= {name: why for name, why in known.items() if why.startswith(COUPLED)}
        others = [p for p in parameters if p.name in known and p.name not in self.unsupported]
        self.one_by_one |= {p.name: known[p.name] for p in others}
        if others:
            found |= self._one_by_one(examples, verdict, others)
        return found

    def _transformed(
        self, examples: GivenExamples, verdict: Verdict, parameters: Sequence[OwnedParameter]
    ) -> dict[OwnedParameter, Factor]:
        """Form gradients by `torch.func`; note in the verdict what it does not give."""
        if not parameters:
            return {}
        tensors = [parameter.tensor for parameter in parameters]
        number, axes = examples.num_examples, examples.probe.axes
        try:
            factors = fallback_gradients(
                self._model, self._loss, *examples.take(), number, tensors, axes
            )
        except UnsupportedError as reason:
            verdict.untransformed |= {parameter.name: str(reason) for parameter in parameters}
            return {}
        differ = differing(
            self._model,
            self._loss,
            examples.probe,
            examples.rows.start,
            BatchGradients(number, factors),
            parameters,
            self._held,
        )
        verdict.untransformed |= {
            p.name: differ[p.tensor] for p in parameters if p.tensor in differ
        }
        return {p: factors[p.tensor] for p in parameters if p.tensor not in differ}

    def _one_by_one(
        self, examples: GivenExamples, verdict: Verdict, parameters: Sequence[OwnedParameter]
    ) -> dict[OwnedParameter, Factor]:
        tensors = [parameter.tensor for parameter in parameters]
        has_functions = bool(verdict.in_functions)
        try:
            factors = gradients_one_by_one(
                self._model, self._loss, examples, tensors, has_functions=has_functions
            )
        except UnsupportedError as reason:
            for parameter in parameters:
                reasons = [self.problems[parameter.name], self.one_by_one[parameter.name]]
                joined = "; ".join(dict.fromkeys([*reasons, str(reason)]))
                self.unsupported[parameter.name] = joined
            return {}
        return {parameter: factors[parameter.tensor] for parameter in parameters}


def that_fit(
    parameters: Sequence[OwnedParameter],
    found: Mapping[OwnedParameter, Factor],
    num_examples: int,
    memory: int,
    left_out: Collection[str] = (),
) -> list[OwnedParameter]:
    """Return the first parameters, at least one, whose gradients fit into memory.

    Args:
        parameters: The parameters.
        found: The gradients of some examples, of those that have some by rules; of the others each
            example takes as much as the parameter, in float32 at least.
        num_examples: Of how many examples they are held.
        memory: How many bytes they may take.
        left_out: The names of parameters that nothing is held of.
    """
    num_bytes = 0
    fitting: list[OwnedParameter] = []
    for parameter in parameters:
        if parameter in found:
            num_bytes += found[parameter].row_bytes * num_examples
        elif parameter.name not in left_out:
            itemsize = max(parameter.tensor.itemsize, torch.float32.itemsize)
            num_bytes += parameter.tensor.numel() * itemsize * num_examples
        if fitting and num_bytes > memory:
            break
        fitting.append(parameter)
    return fitting
