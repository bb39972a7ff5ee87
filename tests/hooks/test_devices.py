"""Devices: a GPU records what the CPU records, whatever default device or precision is set."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks import Measure
from sonde.hooks.model.precision import full_precision
from sonde.hooks.model.random_states import RandomStates
from tests.hooks.conftest import everything
from tests.hooks.devices import DEVICES, needs_gpu
from tests.hooks.models import GPT, LSTMClassifier

pytest.importorskip("torchvision")
from torchvision import models

NUM_EXAMPLES = 40


@pytest.fixture
def low_precision() -> Iterator[None]:
    """Let the training multiply in TF32, where there is such a thing."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def table() -> nn.Module:
    """A layer whose outputs are the same numbers on every device."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(NUM_EXAMPLES, 5000))


STORES = [sonde.Gram(), sonde.Gram(block=8), sonde.Sketch(32), sonde.Sketch(900), sonde.Full()]


def precisions() -> list[object]:
    """What is set, in every way that torch has."""
    found: list[object] = [torch.backends.cudnn.allow_tf32]
    for backend in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv"):
        try:
            place = operator.attrgetter(backend)(torch.backends)
            found.append(place.fp32_precision)
        except AttributeError:  # Of torch < 2.9.
            continue
    try:
        found.append(torch.get_float32_matmul_precision())
    except RuntimeError:  # It was set in the newer way.
        found.append("unreadable")
    return found


@pytest.mark.parametrize("precision", ["highest", "high", "medium", "newer"])
def test_precision_is_given_back(precision: str, low_precision: None) -> None:
    if precision == "newer":
        settings: Any = torch.backends.cuda.matmul
        if not hasattr(settings, "fp32_precision"):
            pytest.skip("torch has no newer way to set it")
        settings.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision(precision)
    before = precisions()

    def fail() -> None:
        with full_precision():
            assert not set(precisions()) & {True, "tf32", "bf16"}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert precisions() == before


@pytest.fixture
def other_default() -> Iterator[None]:
    """Let tensors without a device be somewhere else than the model."""
    with torch.device("meta"):
        yield


def test_a_default_device_is_not_where_sonde_works(
    conv_net: nn.Module, images: Tensor, classes: Tensor, other_default: None, tmp_path: Path
) -> None:
    measures = [
        *everything(images, classes),
        sonde.Activations(sonde.TRAINING),
        sonde.OutputGradients(sonde.TRAINING, store=sonde.Sketch(4)),
        sonde.ExampleGradients(sonde.TRAINING),
    ]
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    path = tmp_path / "run"
    with sonde.Recorder(path, conv_net, measures, when=sonde.every(1), on_error="raise") as run:
        run.attach(optimizer)
        for rows in torch.arange(24, device="cpu").split([16, 8]):
            loss = F.cross_entropy(conv_net(images[rows]), classes[rows])
            run.batch(ids=rows, targets=classes[rows], loss=loss)
            loss.backward()
            optimizer.step()
            run.log(loss=loss.detach())
    recorded = sonde.open_run(path)
    assert {note["event"] for note in recorded.notes} == {"coverage", "layers"}
    assert len(recorded.measures) == len(measures) - 2  # Two are of a probe and of the training.


@needs_gpu
def test_products_keep_all_bits_where_the_training_lets_go_of_some(low_precision: None) -> None:
    rows = torch.randn(100, 5000, device="cuda")
    exact = rows.double() @ rows.double().T
    with full_precision():
        ours = rows @ rows.T
    assert float((ours - exact).norm() / exact.norm()) < 1e-6
    assert float((rows @ rows.T - exact).norm() / exact.norm()) > 1e-5  # Else nothing is shown.


@needs_gpu
@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize("is_live", [False, True])
def test_both_devices_record_the_same(
    store: Any, is_live: bool, low_precision: None, tmp_path: Path
) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = table().to(device)
        inputs = torch.arange(NUM_EXAMPLES)
        source = sonde.TRAINING if is_live else sonde.Probe(inputs, batch_size=16)
        measure = sonde.Activations(source, store=store)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = tmp_path / device
        with sonde.Recorder(path, model, [measure], when=sonde.at(0), on_error="raise") as recorder:
            recorder.attach(optimizer)
            for rows in inputs.split(16):
                (model(rows.to(device)).square().mean() / 3).backward()
            optimizer.step()
        log = sonde.open_run(path).activations
        found.append(log.array(log.fields("0")[0], 0, "0").astype(float))
    expected, ours = found
    assert ours.shape == expected.shape
    assert np.linalg.norm(ours - expected) < 1e-6 * np.linalg.norm(expected)


@needs_gpu
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["ResNet-18", "GPT"])
def test_gradients_of_a_training_in_low_precision_add_up(
    name: str, half: bool, low_precision: None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    if name == "GPT":
        model: nn.Module = GPT(vocabulary=100, num_tokens=32, width=256, num_heads=4).cuda()
        inputs = torch.randint(100, (16, 32), device="cuda")
        targets = inputs.roll(-1, 1)
    else:
        model = models.resnet18(num_classes=10).cuda()
        inputs, targets = torch.randn(16, 3, 64, 64, device="cuda"), torch.arange(16).cuda() % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=half)
    measures: list[Measure] = [sonde.ExampleGradients(sonde.TRAINING)]
    path = tmp_path / "run"
    with sonde.Recorder(path, model, measures, when=sonde.every(1), on_error="raise") as recorder:
        recorder.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16, enabled=half):
                outputs: Tensor = model(inputs)
                loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
            recorder.batch(loss=loss)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    run = sonde.open_run(path)
    coverage = [note["parameters"] for note in run.notes if note["event"] == "coverage"]
    assert coverage
    assert {verdict for of_step in coverage for verdict in of_step.values()} == {"exact"}


@pytest.mark.parametrize("device", DEVICES)
def test_recurrent_layers_in_eval_mode_keep_their_mode_and_dropout(device: str) -> None:
    torch.manual_seed(0)
    model = LSTMClassifier().to(device).eval()
    inputs, targets = torch.randn(6, 7, 4), torch.arange(6) % 5
    first = sonde.example_gradients(model, F.cross_entropy, inputs, targets)
    assert (model.lstm.training, model.lstm.dropout) == (False, 0.2)
    again = sonde.example_gradients(model.train(), F.cross_entropy, inputs, targets)
    assert (model.lstm.training, model.lstm.dropout) == (True, 0.2)
    assert set(first.coverage.values()) == {"exact"}
    torch.testing.assert_close(first.total, again.total)


@needs_gpu
def test_gradients_of_a_model_on_a_gpu_are_those_on_the_cpu() -> None:
    torch.manual_seed(0)
    model = models.resnet18(num_classes=10).eval()
    inputs, targets = torch.randn(24, 3, 32, 32), torch.arange(24) % 10
    with torch.backends.cudnn.flags(allow_tf32=False):
        ours = sonde.example_gradients(
            copy.deepcopy(model).cuda(), F.cross_entropy, inputs, targets, batch_size=10
        )
    expected = sonde.example_gradients(model.double(), F.cross_entropy, inputs.double(), targets)
    assert set(ours.coverage.values()) == {"exact"}
    assert ours.total is not None
    assert expected.total is not None
    assert float((ours.total - expected.total).norm() / expected.total.norm()) < 1e-5


@needs_gpu
def test_numbers_drawn_on_a_gpu_are_not_noticed_and_the_same_each_time() -> None:
    torch.cuda.manual_seed(3)
    expected = [torch.rand(2, device="cuda") for _ in range(2)]
    torch.cuda.manual_seed(3)
    states = RandomStates()
    drawn = torch.rand(2, device="cuda")
    states.seed(7)
    seeded = torch.rand(2, device="cuda")
    states.seed(7)
    assert torch.equal(torch.rand(2, device="cuda"), seeded)
    assert not torch.equal(drawn, seeded)
    states.restore()
    assert [torch.equal(torch.rand(2, device="cuda"), one) for one in expected] == [True, True]
