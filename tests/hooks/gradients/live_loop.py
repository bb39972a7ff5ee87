"""A training that is recorded in band, and the slow way to the numbers of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks import Measure
from sonde.log import Run

NUM_EXAMPLES = 6
Array = npt.NDArray[Any]


class Net(nn.Sequential):
    """Two layers with an in-place operation and dropout between them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(5, 3))


class Seen:
    """What plain hooks see: the loop's own way to the same numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if not list(module.children()):
                self.outputs[name] = []
                module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.outputs[name].append(output.detach().clone())

        return hook


@dataclass
class Batch:
    inputs: Tensor
    targets: Tensor
    ids: Tensor


def batches(number: int, size: int = NUM_EXAMPLES, features: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [
        Batch(
            torch.randn(size, features, generator=generator),
            torch.randint(3, (size,), generator=generator),
            torch.arange(size) + 10 * i,
        )
        for i in range(number)
    ]


def record(
    path: Path,
    model: nn.Module,
    measures: Sequence[Measure],
    loop: Callable[[sonde.Recorder, torch.optim.Optimizer], object],
    **options: Any,
) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"when": sonde.every(1), "on_error": "raise", **options}
    with sonde.Recorder(path / "run", model, measures, **options) as recorder:
        recorder.attach(optimizer)
        loop(recorder, optimizer)
    return sonde.open_run(path / "run")


def plain_loop(model: nn.Module, data: Sequence[Batch]) -> Callable[..., None]:
    def loop(_: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()

    return loop


def activations(layers: Any = None) -> sonde.Activations:
    return sonde.Activations(sonde.TRAINING, layers, sonde.Full())


def gradients(layers: Any = None) -> sonde.OutputGradients:
    return sonde.OutputGradients(sonde.TRAINING, layers, sonde.Full())


def features(run: Run, measure: str, layer: str, step: int = -1) -> Array:
    return np.asarray(run[measure][layer].features(step))


def missing(run: Run) -> dict[str, str]:
    return {note["name"]: note["reason"] for note in run.notes if note["event"] == "missing"}


def alone(model: nn.Module, layer: str, data: Batch) -> Tensor:
    """The gradient of each example's own loss with respect to a layer's output, one at a time."""
    model = copy.deepcopy(model).double().eval()
    rows = []
    for row in range(len(data.inputs)):
        outputs: list[Tensor] = []

        def replace(_: nn.Module, __: Any, output: Tensor, kept: list[Tensor] = outputs) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0].clone()

        handle = model.get_submodule(layer).register_forward_hook(replace)
        output = model(data.inputs[row : row + 1].double())
        F.cross_entropy(output, data.targets[row : row + 1]).backward()
        handle.remove()
        assert outputs[0].grad is not None
        rows.append(outputs[0].grad.flatten())
    return torch.stack(rows)
