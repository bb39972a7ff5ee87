"""What sonde runs itself is no pass of the training, whoever runs it: beside others, and nested."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import sonde
from sonde.hooks import Measure
from sonde.hooks.examples.probe import _Eagerly
from sonde.hooks.recording import closing

N = 8
NUM_STEPS = 2
Array = np.ndarray[Any, Any]


class Mixed(nn.Module):
    """A recurrent layer, an attention, a weight made of parameters: each is seen in its own way."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.recurrent = nn.LSTM(4, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.normed = weight_norm(nn.Linear(6, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.recurrent(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        logits: Tensor = self.head(self.normed(x.mean(1)).tanh())
        return logits


def data(number: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 3, 4, generator=generator)
    return inputs, torch.randint(3, (number,), generator=generator)


def observed() -> list[Measure]:
    return [
        sonde.Activations(sonde.TRAINING, store=sonde.Full()),
        sonde.OutputGradients(sonde.TRAINING, store=sonde.Full()),
        sonde.ExampleGradients(sonde.TRAINING),
    ]


Other = Callable[[nn.Module, Path, torch.optim.Optimizer], list[Callable[[], object]]]


def train(path: Path, other: Other | None = None) -> tuple[sonde.Run, list[Tensor], nn.Module]:
    """Train beside an in-band recorder; between the passes call what `other` returns."""
    model = Mixed()
    untrained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sonde.Recorder(
        path / "observed", model, observed(), when=sonde.every(1), on_error="raise"
    ).attach(optimizer)
    calls = [] if other is None else other(model, path, optimizer)
    inputs, targets = data(N, 1)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        for call in calls:
            call()
        recorder.batch(ids=torch.arange(N), targets=targets, loss=loss)
        loss.backward()
        for call in calls:
            call()
        optimizer.step()
    recorder.close()
    return sonde.open_run(path / "observed"), [p.detach() for p in model.parameters()], untrained


def everything_of(run: sonde.Run) -> dict[Any, Array]:
    """Every array of every record."""
    found: dict[Any, Array] = {}
    for measure in ("activations", "output_gradients"):
        log = run[measure, "training"]
        for step in log.steps:
            for layer in log.layers:
                found[measure, step, layer] = np.asarray(log[layer].features(step))
    log = run["example_gradients", "training"]
    for step in log.steps:
        found["total", step] = np.asarray(log.gram(step))
        for layer in log.layers:
            found["gradients", step, layer] = np.asarray(log[layer].gram(step))
    return found


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close what is still open: a recorder in band waits for its step, and so runs all eagerly."""
    yield
    for recorder in list(closing.still_open()):
        recorder.close()


def recorder_of(*measures: Any) -> Other:
    """A second recorder of the same model; measures are made of a probe."""

    def begin(
        model: nn.Module, path: Path, optimizer: torch.optim.Optimizer
    ) -> list[Callable[[], object]]:
        probe = sonde.Probe(*data(20, 2), batch_size=7)
        recorder = sonde.Recorder(
            path / "other",
            model,
            [make(probe) for make in measures],
            when=sonde.every(1),
            on_error="raise",
        ).attach(optimizer)
        return [recorder.measure]

    return begin


def called(function: Callable[[nn.Module], object]) -> Other:
    return lambda model, _, __: [lambda: function(model)]


def in_thread(model: nn.Module) -> None:
    thread = threading.Thread(
        target=sonde.example_gradients, args=(model, F.cross_entropy, *data(5, 3))
    )
    thread.start()
    thread.join()


OTHERS: dict[str, Other] = {
    "predictions": recorder_of(sonde.Predictions),
    "activations": recorder_of(sonde.Activations),
    "gradients": recorder_of(lambda p: sonde.ExampleGradients(p, F.cross_entropy)),
    "planes": recorder_of(
        lambda p: sonde.DecisionPlanes(p.inputs, p.targets, triplets=2, resolution=3)
    ),
    "in band": recorder_of(lambda _: sonde.Activations(sonde.TRAINING)),
    "gradients in band": recorder_of(lambda _: sonde.ExampleGradients(sonde.TRAINING)),
    "called gradients": called(
        lambda model: sonde.example_gradients(model, F.cross_entropy, *data(5, 3))
    ),
    "called gradients of a part": called(
        lambda model: sonde.example_gradients(
            nn.Sequential(*[model.get_submodule("normed"), model.get_submodule("head")]),
            F.cross_entropy,
            torch.ones(4, 6),
            torch.arange(4) % 3,
        )
    ),
    "called layers": called(lambda model: sonde.layers(model, inputs=data(5, 3)[0])),
    "called in a thread": called(in_thread),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_others_evaluate_is_not_recorded(name: str, tmp_path: Path) -> None:
    run, weights, untrained = train(tmp_path / "alone")
    expected = everything_of(run)
    run, beside, _ = train(tmp_path / "beside", OTHERS[name])
    found = everything_of(run)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=str(key))
    assert all(map(torch.equal, beside, weights))
    log = run["activations", "training"]
    assert [log.attributes(step)["micro_batches"] for step in log.steps] == [[N]] * NUM_STEPS
    (coverage,) = [note for note in run.notes if note["event"] == "coverage"]
    assert set(coverage["parameters"].values()) == {"exact"}
    truth = loop(untrained)
    np.testing.assert_allclose(found["total", 0], truth @ truth.T, rtol=1e-4, atol=1e-6)


def loop(model: nn.Module) -> Tensor:
    """The gradient of each example's own loss, in float64, [examples, parameters]."""
    model = copy.deepcopy(model).double()
    inputs, targets = data(N, 1)
    rows = []
    for row in range(N):
        loss = F.cross_entropy(model(inputs[row : row + 1].double()), targets[row : row + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def test_another_model_is_observed_while_one_is_evaluated(tmp_path: Path) -> None:
    """In another thread, in the midst of the evaluation."""
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sonde.Recorder(
        tmp_path / "run", model, observed(), when=sonde.every(1), on_error="raise"
    ).attach(optimizer)
    inputs, targets = data(N, 1)

    def step() -> None:
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    class Interrupted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
            return super().forward(x)

    with sonde.Recorder(
        tmp_path / "other", Interrupted(4, 2), [sonde.Predictions(torch.ones(3, 4))]
    ) as other:
        other.measure()
    recorder.close()
    log = sonde.open_run(tmp_path / "run")["activations"]
    assert log.steps
    assert [log.attributes(step)["micro_batches"] for step in log.steps] == [[N]] * len(log.steps)


class Packed(nn.Module):
    """A recurrent layer over sequences of unequal lengths, whose output is packed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.recurrent = nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        logits: Tensor = self.head(self.recurrent(packed)[1][0][-1])
        return logits


@pytest.mark.parametrize("lengths", [[3, 7, 1, 5, 2, 6], [6, 5, 4, 3, 2, 1], [4] * 6])
def test_gradients_of_packed_sequences_are_exact_beside_activations(
    lengths: list[int], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(4)
    x, targets = torch.randn(6, 7, 5, generator=generator), torch.arange(6) % 3
    model, num_steps = Packed(), torch.tensor(lengths)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    double = copy.deepcopy(model).double()
    measures = [sonde.Activations(sonde.TRAINING), sonde.ExampleGradients(sonde.TRAINING)]
    with sonde.Recorder(tmp_path / "run", model, measures, on_error="raise") as recorder:
        recorder.attach(optimizer)
        loss = F.cross_entropy(model(x, num_steps), targets)
        recorder.batch(loss=loss)
        loss.backward()
        optimizer.step()
    rows = []
    for row in range(6):
        output = double(x[row : row + 1].double(), num_steps[row : row + 1])
        gradients = torch.autograd.grad(
            F.cross_entropy(output, targets[row : row + 1]), list(double.parameters())
        )
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    truth = torch.stack(rows)
    run = sonde.open_run(tmp_path / "run")
    (coverage,) = [note for note in run.notes if note["event"] == "coverage"]
    assert set(coverage["parameters"].values()) == {"exact"}
    gram = run["example_gradients"].gram(0)
    np.testing.assert_allclose(gram, truth @ truth.T, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_is_compiled_again_whatever_recorder_ends_first() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def doubled(x: Tensor) -> Tensor:
        return x * 2

    compiled = torch.compile(doubled, backend=backend)
    eagerly = _Eagerly()  # Of its own: a recorder of another test may still wait for its step.
    with torch.compiler.set_stance("default"):
        eagerly.__enter__()
        eagerly.__enter__()
        eagerly.__exit__()
        compiled(torch.zeros(1, 3))
        assert graphs == []  # The second one still runs.
        eagerly.__exit__()
        compiled(torch.zeros(1, 3))
        assert len(graphs) == 1
