"""Probes in float32, also where the model enters autocast by itself."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import SondeWarning
from sonde.hooks.examples.probe import undisturbed

_INPUTS = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
_TARGETS = torch.arange(12) % 3


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def _decorated(net: nn.Sequential) -> nn.Module:
    net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)  # type: ignore[method-assign]
    return net


def _decorated_twice(net: nn.Sequential) -> nn.Module:
    inner = _decorated(net).forward
    net.forward = lambda *args: inner(*args).float()  # type: ignore[method-assign]
    return net


class _Within(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.as_tensor(self.net(x)).float()


class _Casting(nn.Module):
    """Needs its autocast, as it brings bfloat16 to layers of float32."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.as_tensor(self.net(x.bfloat16()))


def _record(path: Path, model: nn.Module, num_steps: int = 2) -> sonde.Run:
    probe = sonde.Probe(_INPUTS, _TARGETS)
    measures: list[sonde.hooks.Measure] = [
        sonde.Activations(probe, layers=[nn.Linear], store=sonde.Full()),
        sonde.ExampleGradients(probe, F.cross_entropy),
        sonde.Predictions(probe),
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = sonde.Recorder(path, model, measures, when=sonde.every(1)).attach(optimizer)
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(_INPUTS).float(), _TARGETS).backward()
        optimizer.step()
    recorder.close()
    return sonde.open_run(path)


@pytest.mark.parametrize("wrap", [_decorated, _decorated_twice, _Within])
def test_probes_run_without_the_autocast_of_the_model(
    tmp_path: Path, wrap: Callable[[nn.Sequential], nn.Module]
) -> None:
    plain = _net()
    entering = torch.autocast.__enter__
    model = wrap(_net())
    own = vars(model).get("forward")
    run = _record(tmp_path / "run", model)
    assert vars(model).get("forward") is own
    assert torch.autocast.__enter__ is entering
    with torch.no_grad():
        expected = [plain[0](_INPUTS), plain(_INPUTS)]
    features = [run["activations"].features(layer, 0) for layer in run["activations"].layers]
    np.testing.assert_array_equal(features[0], expected[0])
    np.testing.assert_array_equal(features[1], expected[1])
    np.testing.assert_array_equal(run["predictions"].array("logits", 0), expected[1])
    double = copy.deepcopy(plain).double()
    norms = []
    for x, y in zip(_INPUTS.double(), _TARGETS, strict=True):
        loss = F.cross_entropy(double(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(double.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
    recorded = run["example_gradients"].array("norm_total", 0)
    # Of float32; bfloat16 is off by more than 1e-3 here.
    np.testing.assert_allclose(recorded, norms, rtol=1e-5)
    for measure in ("activations", "example_gradients", "predictions"):
        assert run[measure].attributes(1)["precision"] == ["float32"]


@pytest.mark.parametrize("wrap", [_decorated, _decorated_twice, _Within])
def test_the_training_keeps_its_autocast(
    tmp_path: Path, wrap: Callable[[nn.Sequential], nn.Module]
) -> None:
    bare, recorded = wrap(_net()), wrap(_net())
    optimizer = torch.optim.SGD(bare.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(bare(_INPUTS).float(), _TARGETS).backward()
        optimizer.step()
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        if module.training:
            seen.add(output.dtype)

    for module in recorded.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    _record(tmp_path / "run", recorded)
    assert seen == {torch.bfloat16}
    for one, other in zip(bare.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_threads_keep_their_autocast() -> None:
    model = _decorated(_net())
    found: list[torch.dtype] = []

    def elsewhere() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            found.append(F.linear(_INPUTS, torch.ones(2, 8)).dtype)

    with undisturbed(model), torch.no_grad():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert model(_INPUTS).dtype == torch.float32
    assert found == [torch.bfloat16]
    assert model(_INPUTS).dtype == torch.bfloat16


def test_a_model_that_fails_without_its_autocast_keeps_it_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(SondeWarning) as caught:
        run = _record(tmp_path / "run", _Casting(_net()))
    told = [str(warning.message) for warning in caught]
    assert any("_Casting enters autocast by itself and fails without it" in text for text in told)
    assert any("casts by itself: 3 of 3 outputs of layers are torch.bfloat16" in t for t in told)
    plain = _net()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain(_INPUTS).float()
    np.testing.assert_array_equal(run["predictions"].array("logits", 0), expected)
    assert run["predictions"].attributes(0)["precision"] == ["bfloat16"]


def test_a_failure_of_another_kind_leaves_autocast_out(tmp_path: Path) -> None:
    model = _Within(_net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
        raise TypeError("no loss")

    probe = sonde.Probe(_INPUTS, _TARGETS)
    measures = [sonde.ExampleGradients(probe, wrong), sonde.Predictions(probe)]
    recorder = sonde.Recorder(tmp_path / "run", model, measures).attach(optimizer)
    with pytest.warns(SondeWarning, match="no loss"):
        recorder.measure()
    recorder.close()
    with torch.no_grad():
        expected = _net()(_INPUTS)
    run = sonde.open_run(tmp_path / "run")
    np.testing.assert_array_equal(run["predictions"].array("logits", 0), expected)


def test_types_that_the_model_has_itself_are_noted_without_a_warning(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 3).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.second(self.first(x).bfloat16()))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = _record(tmp_path / "run", Mixed())
    assert run["predictions"].attributes(0)["precision"] == ["float32", "bfloat16"]
