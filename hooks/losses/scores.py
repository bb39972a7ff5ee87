"""Scores: which tensor of what a model returns scores the classes, or is what targets are of.

One rule for predictions, decision planes and the default loss. Where a model returns one tensor, it
is that. Else it is what `output` says; else the one called `logits`; else the only one that fits
the targets. Where several do, or none, an error lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.axes import ExampleAxes
from sonde.hooks.examples.probe import Inputs, call, undisturbed
from sonde.hooks.model.state import MadeParametersError
from sonde.hooks.model.taps import tensor_leaves, tensor_paths

Output: TypeAlias = str | int | Callable[[Any], Tensor]
"""Which output of a model: its name, its position, the path to it, such as `[heads][0]`, or a
function of what the model returns."""


class OutputChoiceError(InvalidInputError):
    """It is not clear which output of the model is meant; `output` has to say it."""


class Scores:
    """Chooses among the outputs of a model.

    Args:
        output: Which one; None where names or targets tell.
        targets: One target per example, if there are any.
        axes: Where the examples are in them.

    Raises:
        InvalidInputError: If `output` is nothing that says which one.
    """

    def __init__(
        self, output: Output | None, targets: Tensor | None, axes: ExampleAxes | None = None
    ) -> None:
        if output is not None and not isinstance(output, str | int) and not callable(output):
            raise InvalidInputError(
                f"`output` (={output!r}) must be the name, position or path of an output, such as "
                "'logits', 1 or '[heads][0]', or a function of what the model returns"
            )
        self._output = output
        self._chosen = ""
        self.num_classes = 0
        self._rest: list[int] | None = None
        if targets is not None:
            axis = (axes or ExampleAxes()).of(targets)
            self._rest = [size for at, size in enumerate(targets.shape) if at != axis]
            if self._rest == [1]:
                self._rest = []
            if not targets.is_floating_point() and targets.numel():
                self.num_classes = int(targets.max()) + 1
        self._has_classes = self.num_classes > 0

    @property
    def is_binary(self) -> bool:
        """Whether the targets are of two classes, so that one logit decides between them."""
        return self._has_classes and self.num_classes <= 2

    def of(self, returned: Any, num_examples: int) -> tuple[str, Tensor]:
        """Return the way to the output that is meant, and the output.

        Args:
            returned: What the model returned.
            num_examples: For how many examples.

        Raises:
            OutputChoiceError: If it is not clear which one it is, or there is no such.
        """
        if callable(self._output):
            chosen = self._output(returned)
            if not isinstance(chosen, Tensor):
                raise OutputChoiceError(
                    f"`output` returned a {type(chosen).__name__}; expected a tensor"
                )
            return "(output)", chosen
        leaves = tensor_leaves(returned)
        if not leaves:
            kind = type(returned).__name__
            raise OutputChoiceError(f"the model's output ({kind}) holds no tensor")
        if self._output is not None:
            return self._said(returned)
        if len(leaves) == 1:
            return leaves[0]
        if self._chosen in dict(leaves):  # Another may fit by chance, by the size of a batch.
            return self._chosen, dict(leaves)[self._chosen]
        named = [leaf for leaf in leaves if leaf[0].endswith("[logits]")]
        fitting = [leaf for leaf in leaves if self._fits(leaf[1], num_examples)]
        for found in (named, fitting):
            if len(found) == 1:
                self._chosen = found[0][0]
                return found[0]
        example = (fitting or leaves)[-1][0]
        raise OutputChoiceError(
            f"{self._problem(fitting)}: {_listed(leaves)}, for {num_examples} examples; "
            f"say which one is meant by `output`, such as output={example!r}, or a function of all "
            "that the model returns"
        )

    def is_sign(self, scores: Tensor, num_examples: int) -> bool:
        """Return whether scores are one logit per example, whose sign decides."""
        is_one = scores.is_floating_point() and scores.shape in ((num_examples,), (num_examples, 1))
        return self.is_binary and is_one

    def are_of_classes(self, scores: Tensor, num_examples: int) -> bool:
        """Return whether scores are [examples, classes], with a column for each class."""
        if scores.ndim != 2 or len(scores) != num_examples or not scores.is_floating_point():
            return False
        return scores.shape[1] >= max(2, self.num_classes)

    def _said(self, returned: Any) -> tuple[str, Tensor]:
        said = f"{self._output}"
        path = said if said.startswith("[") else f"[{said}]"
        paths = tensor_paths(returned)
        found = dict(paths).get(path)
        if found is None:
            raise OutputChoiceError(
                f"the model has no output {self._output!r}; it returns {_listed(paths)}"
            )
        return ("" if len(paths) == 1 else path), found

    def _fits(self, tensor: Tensor, num_examples: int) -> bool:
        if not tensor.is_floating_point() or num_examples not in tensor.shape:
            return False
        rest = list(tensor.shape)
        rest.remove(num_examples)
        if self._rest is None:
            return True
        if not self._has_classes:
            return math.prod(rest) == math.prod(self._rest)
        if self.is_binary and rest in (self._rest, [*self._rest, 1]):
            return True
        return any(
            rest[:at] + rest[at + 1 :] == self._rest and size >= self.num_classes
            for at, size in enumerate(rest)
        )

    def _problem(self, fitting: list[tuple[str, Tensor]]) -> str:
        """Say why none of several outputs is chosen."""
        if self._rest is None:
            return "the model has several outputs, and no targets tell which one is meant"
        targets = f"targets of shape [examples{''.join(f', {size}' for size in self._rest)}]"
        if self._has_classes:
            targets = f"targets of {self.num_classes} classes"
        fit = "several outputs of the model fit" if fitting else "no output of the model fits"
        return f"{fit} {targets}"


def check_outputs(model: nn.Module, inputs: Inputs, check: Callable[[Any], object]) -> None:
    """Show what a model returns for a few examples to a check, which may refuse it before training.

    Args:
        model: The model; one that cannot be run yet is let pass, as recording will tell.
        inputs: What it is called with.
        check: Is given what the model returns.
    """
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        return
    with suppress(MadeParametersError), undisturbed(model), torch.no_grad():
        try:
            returned = call(model, inputs)
        except Exception:  # The model may not be ready to run.
            return
        check(returned)


def _listed(leaves: list[tuple[str, Tensor]]) -> str:
    return ", ".join(f"{path or 'one tensor'} {list(tensor.shape)}" for path, tensor in leaves)
