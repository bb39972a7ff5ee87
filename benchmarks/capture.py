"""CPU cost of recording a training: attached and idle, and at a due step, beside peers.

Idle: training steps of a ResNet-18 with a recorder attached that is never due, with `wandb.watch`
in offline mode that is never due (and logs nothing, not even the loss), and without either. The
plain loop is measured twice; how far its second ratio is from 1 is what the noise amounts to.

Due: all layers of the ResNet-18 on a probe, recorded by sonde and forced to the disk, beside one
plain forward pass of the same images, in eval mode and without hooks. nnsight and TorchLens only
keep all outputs in memory; nnsight keeps the tensors as they are, though later layers change some
in place, and the first call of each layer only. TorchLens wraps the functions of torch for good, so
it runs in a process of its own, beside a plain forward pass of its own.

`products alone` is what no exact Gram matrix costs less than: a forward pass, and the products of
every output with itself by the BLAS of NumPy, which computes half of one, with nothing kept.

Each is measured in turn in every round, in an order that rotates. CPU time (user and system) is of
all threads of the process, with torch on one thread; with `--device cuda` it is the time between
events, so the writer of the log counts where it is waited for. Printed are medians, and the medians
of the ratios within a round. The sealing process is stated separately.

Run `OMP_NUM_THREADS=1 python benchmarks/capture.py`. The peers are in the dependency group `bench`;
one that is missing or fails gets a row that says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from turns import PLAIN, Case, Costs, Work, clock_of, measure

import sonde

NEVER = 10**9


@dataclass(frozen=True)
class Training:
    """What an ordinary training loop has."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor

    def step(self, log: Callable[..., object] | None = None) -> None:
        """Train a step, and tell `log` of the loss."""
        loss = F.cross_entropy(self.model(self.inputs), self.targets)
        self.optimizer.zero_grad()
        loss.backward()
        if log is not None:
            log(loss=loss)
        self.optimizer.step()


def make_training(side: int, device: torch.device) -> Training:
    """Return a ResNet-18 on 32 random images."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, classes = torch.randn(32, 3, side, side), torch.arange(32) % 10
    return Training(model, optimizer, images.to(device), classes.to(device))


@contextmanager
def unwatched(training: Training) -> Iterator[Work]:
    """Train without anything attached."""
    yield training.step


@contextmanager
def recorded(training: Training) -> Iterator[Work]:
    """Train with a recorder that is never due."""
    probe = sonde.Probe(training.inputs, training.targets)
    measures = [
        sonde.Activations(probe),
        sonde.ExampleGradients(probe, F.cross_entropy),
        sonde.Scalars(),
    ]
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "run"
        with sonde.Recorder(path, training.model, measures, when=sonde.at(NEVER)) as recorder:
            recorder.attach(training.optimizer)
            yield partial(training.step, recorder.log)


@contextmanager
def watched(training: Training) -> Iterator[Work]:
    """Train with wandb's hooks on every parameter and module."""
    wandb: Any = importlib.import_module("wandb")  # Not always there to be type-checked.
    with tempfile.TemporaryDirectory() as root:
        run = wandb.init(dir=root, mode="offline", settings=wandb.Settings(silent=True))
        wandb.watch(training.model, log="all", log_freq=NEVER)
        try:
            yield training.step
        finally:
            wandb.unwatch(training.model)
            run.finish()


def make_probe(num_images: int, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Return a ResNet-18 in eval mode, and images of 64 × 64."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    return model.to(device), torch.randn(num_images, 3, 64, 64).to(device)


@contextmanager
def forward(model: nn.Module, images: Tensor) -> Iterator[Work]:
    """Run the images forward."""

    def work() -> None:
        with torch.no_grad():
            model(images)

    yield work


@contextmanager
def multiplied(model: nn.Module, images: Tensor) -> Iterator[Work]:
    """Run the images forward, and multiply the outputs of every layer with themselves."""

    def products(_: nn.Module, __: Any, output: Tensor) -> None:
        rows = output.flatten(1)
        values = rows if rows.is_cuda else rows.numpy()
        values @ values.T

    def work() -> None:
        layers = [module for module in model.modules() if not list(module.children())]
        handles = [layer.register_forward_hook(products) for layer in layers]
        with torch.no_grad():
            model(images)
        for handle in handles:
            handle.remove()

    yield work


@contextmanager
def measured(model: nn.Module, images: Tensor, store: sonde.Gram | sonde.Sketch) -> Iterator[Work]:
    """Record all layers and force them to the disk."""
    measures = [sonde.Activations(sonde.Probe(images, batch_size=len(images)), store=store)]
    with tempfile.TemporaryDirectory() as root:
        with sonde.Recorder(
            Path(root) / "run",
            model,
            measures,
            when=sonde.at(NEVER),
            on_error="raise",
            block=True,
        ) as recorder:

            def work() -> None:
                recorder.step()  # A step is recorded once.
                recorder.measure()
                recorder.sync()

            yield work


@contextmanager
def saved_by_nnsight(model: nn.Module, images: Tensor) -> Iterator[Work]:
    """Keep the outputs of all layers with nnsight."""
    nnsight: Any = importlib.import_module("nnsight")  # It ships no types.
    wrapped = nnsight.NNsight(copy.deepcopy(model))
    names = [name for name, module in model.named_modules() if not list(module.children())]

    def work() -> None:
        with torch.no_grad(), wrapped.trace(images):
            outputs = nnsight.save({})
            for name in names:
                outputs[name] = wrapped.get(name).output
        assert len(outputs) == len(names)

    yield work


@contextmanager
def saved_by_torchlens(model: nn.Module, images: Tensor) -> Iterator[Work]:
    """Keep the outputs of all operations with TorchLens."""
    torchlens: Any = importlib.import_module("torchlens")  # Not always there to be type-checked.

    def work() -> None:
        with torch.no_grad():
            trace = torchlens.trace(model, images)
        assert all(operation.has_saved_activation for operation in trace)

    yield work


def children_seconds() -> float:
    """Return the CPU time of ended children of this process."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure_idle(side: int, num_steps: int, device: torch.device) -> Costs:
    """Measure steps of the same training, with and without what is attached but never due."""
    cases: dict[str, Case] = {
        PLAIN: partial(unwatched, make_training(side, device)),
        "plain, again": partial(unwatched, make_training(side, device)),
        "sonde.Recorder": partial(recorded, make_training(side, device)),
        "wandb.watch": partial(watched, make_training(side, device)),
    }
    return measure(cases, num_steps, clock_of(device))


def measure_due(num_images: int, rounds: int, device: torch.device) -> tuple[Costs, float]:
    """Measure one record of all layers; return also the sealing processes' CPU per record."""
    model, images = make_probe(num_images, device)
    cases: dict[str, Case] = {
        PLAIN: partial(forward, model, images),
        "products alone": partial(multiplied, model, images),
        "sonde, Gram()": partial(measured, model, images, sonde.Gram()),
        "sonde, Sketch(64)": partial(measured, model, images, sonde.Sketch(64)),
        "nnsight": partial(saved_by_nnsight, model, images),
    }
    before = children_seconds()
    costs = measure(cases, rounds, clock_of(device))
    return costs, (children_seconds() - before) / (rounds + 1)


def measure_torchlens(num_images: int, rounds: int, device: torch.device) -> Costs:
    """Measure TorchLens, in a process that should do nothing else."""
    model, images = make_probe(num_images, device)
    cases: dict[str, Case] = {
        PLAIN: partial(forward, model, images),
        "TorchLens": partial(saved_by_torchlens, copy.deepcopy(model), images),
    }
    return measure(cases, rounds, clock_of(device))


def apart(num_images: int, rounds: int, device: torch.device) -> Costs:
    """Measure TorchLens in another process."""
    command = [sys.executable, __file__, "--torchlens", "--device", str(device)]
    command += ["--images", str(num_images), "--rounds", str(rounds)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        return Costs(failures={"TorchLens": f"its process ended with {result.returncode}"})
    return Costs(**json.loads(result.stdout.splitlines()[-1]))


def add_rows(table: Table, costs: Costs, notes: Mapping[str, str]) -> None:
    """Add a row for each case, and for each that does not run."""
    for name, seconds in costs.seconds.items():
        milliseconds = 1e3 * statistics.median(seconds)
        ratio = f"{costs.ratio(name):.3f}×"
        table.add_row(name, f"{milliseconds:.1f}", ratio, notes.get(name, ""))
    for name, reason in costs.failures.items():
        table.add_row(name, "", "", f"does not run here: {reason}")


def make_table(title: str) -> Table:
    """Return a table without rows."""
    table = Table("", title=title, min_width=72)
    table.add_column("ms", justify="right")
    table.add_column("to plain", justify="right")
    table.add_column("")
    return table


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps measured of each")
    parser.add_argument("--rounds", type=int, default=15, help="due steps measured of each")
    parser.add_argument("--side", type=int, default=32, help="of the images trained on, pixels")
    parser.add_argument("--images", type=int, default=256, help="in the probe of a due step")
    parser.add_argument(
        "--torchlens", action="store_true", help="measure only TorchLens, and print it as JSON"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    if arguments.torchlens:
        costs = measure_torchlens(arguments.images, arguments.rounds, device)
        print(json.dumps({"seconds": costs.seconds, "failures": costs.failures}))
        return
    side = arguments.side
    idle = make_table(f"idle: a training step of a ResNet-18, 32 images of {side} × {side}")
    costs = measure_idle(side, arguments.steps, device)
    add_rows(idle, costs, {"sonde.Recorder": "goal: 1.01×"})
    due = make_table(f"due: all layers of a ResNet-18 on {arguments.images} images of 64 × 64")
    costs, sealing = measure_due(arguments.images, arguments.rounds, device)
    add_rows(due, costs, {"sonde, Gram()": "goal: 1.4×"})
    add_rows(
        due, apart(arguments.images, arguments.rounds, device), {PLAIN: "in TorchLens' process"}
    )
    console = Console(width=130)
    console.print(idle)
    console.print(due)
    console.print(
        f"the sealing processes, for a record of both kinds: {1e3 * sealing:.1f} ms of CPU"
    )


if __name__ == "__main__":
    main()
