"""Contestants: what makes per-example gradients, of sonde and of peers."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from gradient_subjects import FirstOutput, LayerSubject, Subject, without_in_place
from torch import Tensor, nn
from torch.func import functional_call
from turns import PLAIN, Work

import sonde

# Of float32, over thousands of parameters; cuDNN's convolutions are of TF32, as in a training.
TOLERANCES = {"cpu": 1e-3, "cuda": 1e-2}


@contextmanager
def plain(subject: Subject) -> Iterator[Work]:
    """Run the batch forward and backward, as a training does."""

    def work() -> None:
        subject.model.zero_grad()
        F.cross_entropy(subject.model(subject.inputs), subject.targets).backward()

    yield work


@contextmanager
def sonde_gram(subject: Subject) -> Iterator[Work]:
    """Let sonde make the Gram matrices, of all layers and of each."""

    def work() -> Tensor | None:
        return sonde.example_gradients(
            subject.model, F.cross_entropy, subject.inputs, subject.targets
        ).total

    yield work


@contextmanager
def opacus_gram(subject: Subject) -> Iterator[Work]:
    """Form gradients with Opacus, then multiply them."""
    opacus: Any = importlib.import_module("opacus")  # Not always there to be type-checked.
    with warnings.catch_warnings():
        # It warns that modules without a rule take torch.func, and of full backward hooks.
        warnings.simplefilter("ignore")
        model = opacus.GradSampleModule(without_in_place(subject.model), loss_reduction="sum")

        def work() -> Tensor:
            model.zero_grad()
            F.cross_entropy(model(subject.inputs), subject.targets, reduction="sum").backward()
            return gram(taken(model.parameters(), "grad_sample"))

        yield work


@contextmanager
def backpack_gram(subject: Subject) -> Iterator[Work]:
    """Form gradients with BackPACK, then multiply them.

    Raises:
        NotImplementedError: If it has no rule for a layer.
    """
    backpack: Any = importlib.import_module("backpack")  # Not always there to be type-checked.
    extensions: Any = importlib.import_module("backpack.extensions")
    extension = extensions.BatchGrad()
    model = backpack.extend(without_in_place(subject.model))
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

    def work() -> Tensor:
        model.zero_grad()
        value = loss(model(subject.inputs), subject.targets)
        with backpack.backpack(extension):
            value.backward()
        owners = [m for m in model.modules() if list(m.parameters(recurse=False))]
        without = {
            type(owner).__name__
            for owner in owners
            for parameter in owner.parameters(recurse=False)
            if not hasattr(parameter, "grad_batch")
        }
        if without:
            raise NotImplementedError(f"no BatchGrad of {', '.join(sorted(without))}")
        return gram(taken(model.parameters(), "grad_batch"))

    yield work


@contextmanager
def func_gram(subject: Subject) -> Iterator[Work]:
    """Form gradients with torch.func, then multiply them."""
    parameters = {name: p.detach() for name, p in subject.model.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        outputs = functional_call(subject.model, parameters, (row[None],))
        return F.cross_entropy(outputs, target[None])

    gradients = torch.vmap(torch.func.grad(loss_of), (None, 0, 0), randomness="different")

    def work() -> Tensor:
        of_each = gradients(parameters, subject.inputs, subject.targets)
        return gram(of_each.pop(name) for name in list(of_each))

    yield work


CONTESTANTS: dict[str, Callable[[Subject], AbstractContextManager[Work]]] = {
    PLAIN: plain,
    "sonde, Gram()": sonde_gram,
    "Opacus": opacus_gram,
    "BackPACK": backpack_gram,
    "torch.func": func_gram,
}


def taken(parameters: Iterable[Tensor], name: str) -> Iterator[Tensor]:
    """Yield what a peer left at each parameter, and let go of it."""
    for parameter in parameters:
        yield getattr(parameter, name)
        delattr(parameter, name)


def gram(gradients: Iterable[Tensor]) -> Tensor:
    """Return the Gram matrix of gradients, summed over parameters, which are freed in turn."""
    total = torch.zeros(())
    for gradient in gradients:
        rows = gradient.flatten(1)
        total = total.to(rows.device) + rows @ rows.T
    return total


def check(found: Tensor, expected: Tensor) -> None:
    """Hold a result against what another contestant found.

    Raises:
        ValueError: If they differ.
    """
    difference = (found.cpu().double() - expected.cpu().double()).norm() / expected.norm().cpu()
    tolerance = max(TOLERANCES[tensor.device.type] for tensor in (found, expected))
    if not difference <= tolerance:
        raise ValueError(f"its gradients differ by {100 * difference:.1g} %")


@contextmanager
def agreeing(contestant: AbstractContextManager[Work], expected: Tensor) -> Iterator[Work]:
    """Set up a contestant whose result is as expected."""
    with contestant as work:
        check(work(), expected)
        yield work


@contextmanager
def layer_plain(subject: LayerSubject) -> Iterator[Work]:
    """Run a layer forward and backward."""

    def work() -> None:
        subject.layer.zero_grad()
        subject.layer(subject.inputs).sum().backward()

    yield work


@contextmanager
def layer_sonde(subject: LayerSubject) -> Iterator[Work]:
    """Let sonde form the gradients of a layer."""

    def loss(outputs: Tensor, _: None) -> Tensor:
        return outputs.sum()

    def work() -> Tensor:
        result = sonde.example_gradients(subject.layer, loss, subject.inputs, store=sonde.Full())
        return result.norms

    yield work


@contextmanager
def layer_opacus(subject: LayerSubject) -> Iterator[Work]:
    """Let Opacus form the gradients of a layer, or of what it has in its place."""
    with layer_sonde(subject) as other:
        expected = other()
    opacus: Any = importlib.import_module("opacus")  # Not always there to be type-checked.
    layer, inputs = copy.deepcopy(subject.layer), subject.inputs
    is_batch_first = subject.stand_in != "DPMultiheadAttention"
    if not is_batch_first:
        # Its projections would take the steps for the examples.
        inputs = inputs.transpose(0, 1).contiguous()
    if subject.stand_in is not None:
        assert isinstance(layer, FirstOutput)
        layers: Any = importlib.import_module("opacus.layers")
        stand_in = getattr(layers, subject.stand_in)(*subject.options, batch_first=is_batch_first)
        stand_in.load_state_dict(layer.layer.state_dict())
        layer.layer = stand_in.to(subject.inputs.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of full backward hooks.
        model = opacus.GradSampleModule(layer, batch_first=is_batch_first, loss_reduction="sum")

        def work() -> list[Tensor]:
            model.zero_grad()
            model(inputs).sum().backward()
            return list(taken(model.parameters(), "grad_sample"))

        squares = [gradient.flatten(1).double().square().sum(1) for gradient in work()]
        check(torch.stack(squares).sum(0).sqrt(), expected)
        yield work


LAYER_CONTESTANTS: dict[str, Callable[[LayerSubject], AbstractContextManager[Work]]] = {
    PLAIN: layer_plain,
    "sonde, Full()": layer_sonde,
    "Opacus": layer_opacus,
}
