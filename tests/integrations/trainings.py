"""What the tests of trainers share: a model, data, measures, slow gradients, and failures."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import SondeWarning

NUM_EXAMPLES = 22  # Batches of four: five whole ones, and one of two.
NUM_CLASSES = 3


def body() -> nn.Sequential:
    """BatchNorm, dropout and an in-place operation: everything that makes recording hard."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(8, NUM_CLASSES),
    )


def smooth_body() -> nn.Sequential:
    """A body in which an example's gradient is its own, whatever the rest of the batch is."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))


def data() -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(NUM_EXAMPLES, 6, generator=generator)
    return inputs, torch.arange(NUM_EXAMPLES) % NUM_CLASSES


def measures(*, probe: bool = True) -> list[sonde.hooks.Measure]:
    """Everything cheap: in band, out of band, by step and by epoch."""
    x, y = data()
    in_band: list[sonde.hooks.Measure] = [
        sonde.Activations(sonde.TRAINING),
        sonde.OutputGradients(sonde.TRAINING, "*0"),
        sonde.Scalars(),
    ]
    if not probe:
        return in_band
    held = sonde.Probe(x[:5], y[:5])
    return [
        *in_band,
        sonde.Activations(held, when=sonde.epochs(1)),
        sonde.ExampleGradients(held, F.cross_entropy),
    ]


def in_band(id_key: str | int, **options: Any) -> dict[str, Any]:
    """What to record of the training's own passes, at every step, and raise what fails."""
    return {
        "measures": measures(probe=False),
        "when": sonde.every(1),
        "id_key": id_key,
        "reduction": "mean",
        "on_error": "raise",
        **options,
    }


def alone(model: nn.Module, layer: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Gradients of each example's own loss by a layer's output, one example at a time, in float64.

    Args:
        model: From inputs to logits.
        layer: A layer of it.
        inputs: The examples.
        targets: Their classes.
    """
    twin, of_twin = copy.deepcopy((model, layer))
    twin.double().eval()
    rows = []
    for row in range(len(inputs)):
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            output.retain_grad()
            kept.append(output)

        handle = of_twin.register_forward_hook(keep)
        F.cross_entropy(twin(inputs[row : row + 1].double()), targets[row : row + 1]).backward()
        handle.remove()
        assert kept[0].grad is not None
        rows.append(kept[0].grad.flatten())
    return torch.stack(rows)


def break_recorders(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    """Let these methods of a recorder fail, and the record of `Scalars`."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    for name in methods:
        monkeypatch.setattr(sonde.Recorder, name, fail)
    monkeypatch.setattr(sonde.Scalars, "record", fail)


@contextmanager
def told() -> Iterator[list[str]]:
    """Collect what sonde warns of."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if w.category is SondeWarning]
