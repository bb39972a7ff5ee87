"""Per-example gradients of the training's own passes, against each example alone in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sonde
from sonde.hooks.gradients.rules.functions import RULES, Rule
from tests.hooks.conftest import ConvNet
from tests.hooks.models import GPT

N = 12


class Attending(nn.Module):
    """Attention, position embeddings, layer scale, a tied head: parameters in many places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        x = x + self.scale * self.layer(x)
        x = self.recurrent(x)[0]
        return F.linear(x, self.embedding.weight).mean(1)


def images(num: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(num, 1, 8, 8, generator=generator), torch.arange(num) % 5


def tokens(num: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 9, (num, 5), generator=generator), torch.arange(num) % 9


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(6 * 64, 5),
    )


def attending() -> nn.Module:
    torch.manual_seed(0)
    return Attending()


def alone(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of each example alone, in float64, [examples, parameters]."""
    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    rows = []
    for row in range(len(inputs)):
        loss = F.cross_entropy(model(inputs[row : row + 1]), targets[row : row + 1])
        gradients = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def record(
    path: Path,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    sizes: list[int],
    reduction: Any = "mean",
    scale: float = 1.0,
    tell: bool = True,
    num_steps: int = 1,
    forward: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> sonde.Run:
    """Train with accumulation over micro-batches of these sizes, and record."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    measure = sonde.ExampleGradients(sonde.TRAINING, **options)
    recorder = sonde.Recorder(path, model, [measure], when=sonde.at(0), on_error="raise")
    recorder.attach(optimizer)
    for _ in range(num_steps):
        for batch in torch.arange(len(inputs)).split(sizes):
            outputs = (forward or model)(inputs[batch])
            loss = F.cross_entropy(outputs, targets[batch], reduction=reduction)
            if tell:
                recorder.batch(ids=batch, targets=targets[batch], loss=loss, reduction=reduction)
            (loss * scale / len(sizes)).backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.close()
    return sonde.open_run(path)


def assert_covered(run: sonde.Run) -> None:
    notes = [note for note in run.notes if note["event"] == "coverage"]
    assert set(notes[-1]["parameters"].values()) <= {"exact", "frozen"}


def assert_close(actual: Any, expected: Tensor, tolerance: float = 1e-4) -> None:
    norms = expected.diagonal().sqrt()
    error = (torch.as_tensor(actual) - expected).abs() / (norms[:, None] * norms)
    assert float(error.max()) < tolerance


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [5, 7]])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize(("make", "data"), [(conv, images), (attending, tokens)])
def test_gradients_equal_those_of_examples_alone(
    make: Callable[[], nn.Module],
    data: Callable[[], tuple[Tensor, Tensor]],
    sizes: list[int],
    reduction: str,
    scale: float,
    tmp_path: Path,
) -> None:
    inputs, targets = data()
    model = make()
    exact = alone(model, inputs, targets)
    run = record(
        tmp_path / "run", model, inputs, targets, sizes=sizes, reduction=reduction, scale=scale
    )
    log = run.example_gradients
    assert_covered(run)
    assert_close(log.gram(step=0), exact @ exact.T)
    norms = torch.tensor(log.array("norm_total", 0))
    torch.testing.assert_close(norms, exact.norm(dim=1), rtol=1e-4, atol=0)
    layers = sum(torch.as_tensor(log.gram(0, layer)) for layer in log.layers)
    torch.testing.assert_close(layers, torch.as_tensor(log.gram(step=0)), rtol=1e-4, atol=1e-6)
    attributes = log.attributes(0)
    assert attributes["sum_check"]["largest_difference"] < 1e-5
    assert attributes["sum_check"]["parameters"] == len(list(model.parameters()))
    assert attributes["scale"].startswith("gradient of one example's loss")
    assert np.array_equal(log.array("id", 0), np.arange(N))


@pytest.mark.parametrize("sizes", [[12], [4, 8]])
def test_other_stores_keep_the_same_gradients(sizes: list[int], tmp_path: Path) -> None:
    inputs, targets = images()
    exact = alone(conv(), inputs, targets)
    run = record(
        tmp_path / "full", conv(), inputs, targets, sizes=sizes, store=sonde.Full(torch.float64)
    )
    log = run.example_gradients
    names = [name for name, _ in conv().named_parameters()]
    full = torch.cat([torch.tensor(log.features(name, 0)) for name in names], 1)
    torch.testing.assert_close(full, exact, rtol=1e-3, atol=1e-5)
    run = record(
        tmp_path / "sketch", conv(), inputs, targets, sizes=sizes, store=sonde.Sketch(4096)
    )
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T, tolerance=0.1)


def test_a_checkpointed_layer_is_seen_once(tmp_path: Path) -> None:
    inputs, targets = images()
    model = conv()
    exact = alone(model, inputs, targets)

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=False)

    run = record(tmp_path / "run", Checkpointed(model), inputs, targets, sizes=[6, 6])
    assert_covered(run)
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T)


def test_batch_statistics_make_contributions_and_the_record_says_so(tmp_path: Path) -> None:
    inputs, targets = images()
    torch.manual_seed(0)
    model = nn.Sequential(*[m for m in ConvNet() if not isinstance(m, nn.Dropout)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    measure = sonde.ExampleGradients(sonde.TRAINING, store=sonde.Full(torch.float64))
    recorder = sonde.Recorder(tmp_path / "run", model, [measure], when=sonde.at(0))
    recorder.attach(optimizer)
    loss = F.cross_entropy(model(inputs), targets)
    recorder.batch(loss=loss)
    loss.backward()
    optimizer.step()
    recorder.close()
    log = sonde.open_run(tmp_path / "run").example_gradients
    assert "batch statistics couple the examples" in log.attributes(0)["coupled"]
    for name, parameter in model.named_parameters():
        mean = torch.tensor(log.features(name, 0)).mean(0)
        assert parameter.grad is not None
        torch.testing.assert_close(mean.float(), parameter.grad.flatten(), rtol=1e-3, atol=1e-6)


def test_clipping_and_a_later_change_of_gradients_are_not_seen(tmp_path: Path) -> None:
    inputs, targets = images()
    model = conv()
    exact = alone(model, inputs, targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    measure = sonde.ExampleGradients(sonde.TRAINING)
    recorder = sonde.Recorder(tmp_path / "run", model, [measure], when=sonde.at(0))
    recorder.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # Of an earlier backward pass.
    loss = F.cross_entropy(model(inputs), targets)
    recorder.batch(loss=loss)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert_covered(run)
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T)


def test_without_the_loss_gradients_keep_their_scale(tmp_path: Path) -> None:
    inputs, targets = images()
    exact = alone(conv(), inputs, targets) / N
    run = record(tmp_path / "run", conv(), inputs, targets, sizes=[N], tell=False)
    assert "unknown: as it came back" in run.example_gradients.attributes(0)["scale"]
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T)


def test_gradients_that_do_not_add_up_are_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = RULES[F.linear]

    def doubled(layout: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
        return linear(layout, input * 2, weight, bias)

    monkeypatch.setitem(RULES, F.linear, Rule(doubled))
    inputs, targets = images()
    with pytest.warns(sonde.SondeWarning, match="do not add up to the gradient"):
        run = record(tmp_path / "run", conv(), inputs, targets, sizes=[N])
    coverage = [note for note in run.notes if note["event"] == "coverage"][-1]["parameters"]
    assert coverage["4.weight"].startswith("unsupported: the per-example gradients do not add up")
    assert coverage["4.bias"] == "exact"
    assert coverage["0.weight"] == "exact"


def test_too_little_memory_costs_steps_of_several_micro_batches(tmp_path: Path) -> None:
    inputs, targets = images()
    exact = alone(conv(), inputs, targets)
    run = record(tmp_path / "one", conv(), inputs, targets, sizes=[N], memory=1)
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T)
    with pytest.warns(sonde.SondeWarning, match="take more memory than `memory` allows"):
        run = record(tmp_path / "two", conv(), inputs, targets, sizes=[6, 6], memory=1)


def test_validation_passes_leave_no_trace(tmp_path: Path) -> None:
    inputs, targets = images()
    model = conv()
    exact = alone(model, inputs, targets)

    def forward(x: Tensor) -> Any:
        with torch.no_grad():
            model(x[:3])
        return model(x)

    run = record(tmp_path / "run", model, inputs, targets, sizes=[6, 6], forward=forward)
    assert_covered(run)
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T)


def test_a_frozen_layer_is_named_and_one_off_the_loss_has_no_gradient(tmp_path: Path) -> None:
    inputs, targets = images()
    model = conv()
    model.get_parameter("0.weight").requires_grad_(False)
    exact = alone(model, inputs, targets)
    run = record(tmp_path / "run", model, inputs, targets, sizes=[N])
    notes = [note for note in run.notes if note["event"] == "coverage"][-1]["parameters"]
    assert notes["0.weight"] == "frozen"
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T)


@pytest.mark.parametrize("compiled", [False, True])
def test_observing_changes_no_number_of_the_training(compiled: bool, tmp_path: Path) -> None:
    def run(is_recorded: bool) -> list[Tensor]:
        torch.manual_seed(0)
        inner = GPT()
        model = torch.compile(inner, backend="aot_eager") if compiled else inner
        optimizer = torch.optim.Adam(inner.parameters(), lr=1e-2)
        recorder = None
        if is_recorded:
            measures = [sonde.ExampleGradients(sonde.TRAINING)]
            recorder = sonde.Recorder(tmp_path / "run", inner, measures, when=sonde.every(2))
            recorder.attach(optimizer)
        losses = []
        for _ in range(4):
            given, _ = tokens()
            loss = model(given).float().square().mean()
            if recorder is not None:
                recorder.batch(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if recorder is not None:
            recorder.close()
            assert sonde.open_run(tmp_path / "run").example_gradients.steps == [0, 2]
        return [*losses, *inner.parameters(), torch.get_rng_state()]

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


def test_half_precision_under_autocast_adds_up_within_its_tolerance(tmp_path: Path) -> None:
    inputs, targets = images()
    model = conv()
    exact = alone(model, inputs, targets)

    def forward(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    run = record(tmp_path / "run", model, inputs, targets, sizes=[N], forward=forward)
    assert_covered(run)
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T, tolerance=0.05)


def test_gradients_of_two_steps_have_inner_products(tmp_path: Path) -> None:
    inputs, targets = images()
    probe = sonde.Probe(inputs.double(), targets)
    exact = []
    for store in (sonde.Full(torch.float64), sonde.Sketch(20000)):
        model = conv().double()
        measure = sonde.ExampleGradients(probe, F.cross_entropy, store=store)
        path = tmp_path / type(store).__name__
        recorder = sonde.Recorder(path, model, [measure], when=sonde.every(1))
        for _ in range(2):
            if isinstance(store, sonde.Full):
                exact.append(alone(model, inputs.double(), targets))
            recorder.measure()
            with torch.no_grad():
                model.get_parameter("4.weight").add_(0.1)
            recorder.step()
        recorder.close()
        log = sonde.open_run(path).example_gradients
        if isinstance(store, sonde.Full):
            names = [name for name, _ in model.named_parameters()]
            actual = sum(log.cross_gram(0, 1, name) for name in names)
            np.testing.assert_allclose(actual, exact[0] @ exact[1].T, rtol=1e-8, atol=1e-10)
        else:
            scale = float((exact[0] @ exact[1].T).abs().max())
            estimate = log.cross_gram(0, 1)
            np.testing.assert_allclose(estimate, exact[0] @ exact[1].T, atol=0.05 * scale)


class OfSequences(nn.Module):
    """A layer that sees (steps, examples), or (examples, steps)."""

    def __init__(self, *, is_time_first: bool, is_plain: bool = True) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 5)
        self.is_time_first, self.is_plain = is_time_first, is_plain

    def forward(self, x: Tensor) -> Any:
        if not self.is_plain and len(x) < N:
            raise ValueError("too few")
        x = x.transpose(0, 1) if self.is_time_first else x
        return self.out(
            self.mix(x).tanh().cumsum(int(not self.is_time_first)).mean(int(not self.is_time_first))
        )


@pytest.mark.parametrize("is_time_first", [False, True])
def test_as_many_steps_as_examples_are_told_apart(is_time_first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(N, N, 4), torch.arange(N) % 5
    model = OfSequences(is_time_first=is_time_first)
    exact = alone(model, inputs, targets)
    run = record(tmp_path / "run", model, inputs, targets, sizes=[N])
    assert_covered(run)
    assert_close(run.example_gradients.gram(step=0), exact @ exact.T)


def test_axes_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    inputs, targets = torch.randn(N, N, 4), torch.arange(N) % 5
    model = OfSequences(is_time_first=False, is_plain=False)
    with pytest.warns(sonde.SondeWarning, match="two axes have the size of the batch"):
        run = record(tmp_path / "run", model, inputs, targets, sizes=[N])
    coverage = [note for note in run.notes if note["event"] == "coverage"][-1]["parameters"]
    assert coverage["mix.weight"].startswith("unsupported: two axes")
    assert coverage["out.weight"] == "exact"


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.GroupNorm(2, 8)])
def test_a_norm_of_half_precision_is_computed_again_in_full(
    norm: nn.Module, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), norm, nn.Tanh(), nn.Linear(8, 5))
    inputs, targets = images()

    def forward(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x.flatten(1)).float()

    options: dict[str, Any] = {"sizes": [N], "forward": forward, "layers": "1"}
    run = record(tmp_path / "run", model, inputs, targets, **options)
    assert_covered(run)
    # What comes back is rounded for both alike, so only the norm itself can make a difference.
    assert run.example_gradients.attributes(0)["sum_check"]["largest_difference"] < 1e-4
