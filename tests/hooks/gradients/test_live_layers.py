"""Layers in band: whatever they do, each is recorded or has a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import sonde

from .live_loop import (
    NUM_EXAMPLES,
    activations,
    batches,
    features,
    gradients,
    missing,
    plain_loop,
    record,
)


class Nested(nn.Module):
    """Outputs in a dict, a layer that is never called, one that is frozen, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.never, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.recurrent = nn.GRU(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.frozen(x)
        hidden = self.shared(self.shared(x))
        out, _ = self.recurrent(hidden.expand(3, -1, -1))
        return {"logits": out[-1, :, :3], "hidden": hidden}


def test_every_layer_is_recorded_or_has_a_reason(tmp_path: Path) -> None:
    model, data = Nested(), batches(1)

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        F.cross_entropy(model(data[0].inputs)["logits"], data[0].targets).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="lacks"):
        run = record(tmp_path, model, [activations(), gradients()], loop)
    assert set(run.activations.layers) == {
        "shared",
        "shared#1",
        "recurrent[0]",
        "recurrent[1]",
        "frozen",
    }
    assert set(run["output_gradients"].layers) == {"shared", "shared#1", "recurrent[0]"}
    assert missing(run) == {
        "never": "it was never called in the forward pass",
        "frozen": "no gradient came back to it",
        "recurrent[1]": "no gradient came back to it",
    }


class Layered(nn.Module):
    """A model of one layer and a head, the layer given by a function of the inputs."""

    def __init__(self, layer: nn.Module, apply: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self._apply_layer = layer, nn.LazyLinear(3), apply

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self._apply_layer(self.layer, x).flatten(1)))


class Halves(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return super().forward(x).chunk(2, 1)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def as_sequence(layer: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.tensor([3, 1, 2, 3, 2, 1])
    packed = pack_padded_sequence(
        x[:, None].expand(-1, 3, -1), lengths[: len(x)], batch_first=True, enforce_sorted=False
    )
    return torch.as_tensor(layer(packed)[1][0])


AWKWARD: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], set[str], set[str]]] = {
    # The layer, how it is used, and the names of its outputs and of the gradients of these.
    "one of two views is unused": (
        Halves(), lambda m, x: m(x)[0], {"layer[0]", "layer[1]"}, {"layer[0]"}
    ),
    "changed in place afterwards": (
        nn.Linear(4, 4), lambda m, x: m(x).relu_(), {"layer"}, {"layer"}
    ),
    "works in place": (InPlace(), lambda m, x: m(x + 0), {"layer"}, set()),
    "attention": (
        nn.MultiheadAttention(4, 2, batch_first=True),
        lambda m, x: m(x[:, None], x[:, None], x[:, None])[0],
        {"layer[0]", "layer[1]"},
        {"layer[0]"},
    ),
    "parametrized": (
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), lambda m, x: m(x),
        {"layer"}, {"layer"},
    ),
    "lazy": (nn.LazyLinear(5), lambda m, x: m(x), {"layer"}, {"layer"}),
    "batch in axis 1": (
        nn.LSTM(4, 3), lambda m, x: m(x.expand(NUM_EXAMPLES, *x.shape))[0][-1],
        {"layer[0]", "layer[1][0]", "layer[1][1]"}, {"layer[0]"},
    ),
    "a packed sequence": (
        nn.GRU(4, 3, batch_first=True), as_sequence, {"layer[0]", "layer[1]"}, {"layer[1]"}
    ),
    "called by its forward": (nn.Linear(4, 4), lambda m, x: m.forward(x), set(), set()),
    "inside torch.func": (
        nn.Linear(4, 4), lambda m, x: torch.func.vmap(m)(x), set(), set()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AWKWARD)
def test_what_layers_do_is_recorded_or_has_a_reason(tmp_path: Path, case: str) -> None:
    layer, apply, outputs, gradient_names = AWKWARD[case]
    model, data = Layered(copy.deepcopy(layer), apply), batches(2)
    is_whole = outputs == gradient_names == {"layer"}
    with nullcontext() if is_whole else pytest.warns(UserWarning, match="lacks layer"):
        layers = ["layer", "head"]
        measures = [activations(layers), gradients(layers)]
        run = record(tmp_path, model, measures, plain_loop(model, data))
    for measure, names in (("activations", outputs), ("output_gradients", gradient_names)):
        assert {name for name in run[measure].layers if name.startswith("layer")} == names
        assert "head" in run[measure].layers
    assert bool(missing(run)) != is_whole


def test_layers_that_are_called_by_themselves_are_recorded(tmp_path: Path) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    model, data = Autoencoder(), batches(2)
    codes = []

    def loop(recorder: sonde.Recorder, optimizer: torch.optim.Optimizer) -> None:
        for batch in data:
            code = model.encoder(batch.inputs)
            codes.append(code.detach())
            F.mse_loss(model.decoder(code), batch.inputs).backward()
            optimizer.step()

    run = record(tmp_path, model, [activations()], loop)
    assert run.layers == ["encoder", "decoder"]
    for step in range(2):
        np.testing.assert_array_equal(features(run, "activations", "encoder", step), codes[step])
