"""Record three small trainings, then answer from their logs what they learned.

Two runs with different seeds learn scikit-learn's bundled digits, a third one learns random labels.
A recorder is attached by one line in an otherwise ordinary loop. Afterwards, without any model: do
the layers of two seeds agree (CKA), do examples pull together (stiffness), would another seed draw
the same boundary (reproducibility), and in how many pieces (fragmentation).

Run `python examples/quickstart.py`; with `--data-dir` it learns MNIST from that folder instead.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sonde

NUM_PROBE = 200
NUM_TEST = 300


@dataclass(frozen=True)
class Data:
    """Training, probe and test examples; inputs are standardised, [examples, 1, side, side]."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def load_digits() -> Data:
    """Return scikit-learn's bundled digits, 8 × 8 pixels."""
    from sklearn.datasets import load_digits as load

    inputs, targets = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))
    images = torch.tensor(inputs[order], dtype=torch.float32).reshape(-1, 1, 8, 8)
    return split(images, torch.tensor(targets[order]))


def load_mnist(folder: Path) -> Data:
    """Return the first images of MNIST, averaged to 14 × 14 pixels."""
    from torchvision.datasets import MNIST

    dataset = MNIST(str(folder), download=False)
    images = dataset.data[:5000, None].float()
    return split(F.avg_pool2d(images, 2), dataset.targets[:5000])


def split(images: Tensor, targets: Tensor) -> Data:
    """Standardise and split off the test examples."""
    images = (images - images.mean()) / images.std()
    return Data(images[:-NUM_TEST], targets[:-NUM_TEST], images[-NUM_TEST:], targets[-NUM_TEST:])


def make_model(side: int) -> nn.Module:
    """Build a small convolutional classifier, with the things that make recording hard."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            norm1=nn.BatchNorm2d(16),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            norm2=nn.BatchNorm2d(32),
            relu2=nn.ReLU(inplace=True),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(32 * (side // 2) ** 2, 64),
            norm3=nn.BatchNorm1d(64),
            relu3=nn.ReLU(inplace=True),
            dropout=nn.Dropout(0.1),
            fc2=nn.Linear(64, 10),
        )
    )


def train(path: Path, data: Data, targets: Tensor, *, seed: int, num_epochs: int) -> None:
    """Train one model; the recorder is the only thing added to an ordinary loop."""
    torch.manual_seed(seed)
    model = make_model(data.train_inputs.shape[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    num_steps = num_epochs * (len(targets) // 64)
    probe = sonde.Probe(data.train_inputs[:NUM_PROBE], targets[:NUM_PROBE], name="train")
    # Ids are positions in the whole data set, so that an example has one id everywhere.
    test_ids = len(data.train_inputs) + torch.arange(NUM_TEST)
    test = sonde.Probe(data.test_inputs, data.test_targets, test_ids, name="test")
    recorder = sonde.Recorder(
        path,
        model,
        [
            sonde.Activations(probe),
            sonde.ExampleGradients(probe, F.cross_entropy),
            sonde.Predictions(probe),
            sonde.Predictions(test),
            sonde.DecisionPlanes(
                data.train_inputs,
                data.train_targets,
                triplets=60,
                resolution=30,
                when=sonde.log_spaced(num_steps, per_decade=2),
            ),
            sonde.Scalars(),
        ],
        when=sonde.log_spaced(num_steps, per_decade=6),
        config={"seed": seed, "num_epochs": num_epochs},
        overwrite=True,
    ).attach(optimizer)

    for _ in range(num_epochs):
        model.train()
        order = torch.randperm(len(targets))
        for batch in order.split(64)[: len(targets) // 64]:
            loss = F.cross_entropy(model(data.train_inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            recorder.log(loss=loss)
            optimizer.step()
    recorder.close()


def main() -> None:
    """Train, analyze, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--data-dir", type=Path, help="a folder with MNIST, to learn it instead")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    console = Console()
    start = time.perf_counter()

    data = load_mnist(arguments.data_dir) if arguments.data_dir else load_digits()
    shuffled = torch.randint(0, 10, data.train_targets.shape, generator=torch.manual_seed(0))
    plan = {
        "seed0": (data.train_targets, 0, arguments.epochs),
        "seed1": (data.train_targets, 1, arguments.epochs),
        # Random labels take longer to learn by heart.
        "random": (shuffled, 2, 5 * arguments.epochs),
    }
    for name, (targets, seed, num_epochs) in plan.items():
        with console.status(f"training {name} ({num_epochs} epochs)"):
            train(arguments.out / name, data, targets, seed=seed, num_epochs=num_epochs)
        console.print(f"trained {name:6}  {time.perf_counter() - start:5.1f} s")

    runs = {name: sonde.open_run(arguments.out / name) for name in plan}
    with console.status("analyzing the logs"):
        report(runs, arguments.out, console)
    console.print(f"\n{time.perf_counter() - start:.0f} s in all. Look at it:")
    console.print(f"  figures       {arguments.out}/*.png")
    console.print(f"  one run       {program('sonde')} show {arguments.out}/seed0")
    console.print(f"  TensorBoard   {program('tensorboard')} --logdir {arguments.out}")


def report(runs: dict[str, sonde.Run], out: Path, console: Console) -> None:
    """Compute every analysis from the logs, print one table, and draw the figures."""
    from sonde.analysis import cka, fragmentation, plots, reproducibility, stiffness
    from sonde.integrations.tensorboard import export

    within = cka(runs["seed0"])
    across = cka(runs["seed0"], runs["seed1"])
    stiff = {name: stiffness(run) for name, run in runs.items()}
    agreement = reproducibility(list(runs.values()))
    pieces = {name: fragmentation(run) for name, run in runs.items()}

    table = Table(title="What three trainings learned, from their logs")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    final = {name: data.isel(step=-1) for name, data in stiff.items()}
    rows = {
        "accuracy, probe (its own labels)": [accuracy(run, "train") for run in runs.values()],
        "accuracy, test": [accuracy(run, "test") for run in runs.values()],
        "stiffness (cosine) within a class": [float(d.cosine_within) for d in final.values()],
        "stiffness (cosine) between classes": [float(d.cosine_between) for d in final.values()],
        "stiffness (sign) within a class": [float(d.sign_within) for d in final.values()],
        "fragmentation (regions per plane)": [
            float(d.fragmentation.isel(step=-1)) for d in pieces.values()
        ],
        "reproducibility against seed0": agreement.agreement[0].values.tolist(),
    }
    for label, values in rows.items():
        table.add_row(label, *(f"{value:.3f}" for value in values))
    for layer in ("conv1", "conv2", "fc1", "fc2"):
        values = [
            float(cka(runs["seed0"], run).sel(layer=layer, other_layer=layer))
            for run in runs.values()
        ]
        table.add_row(f"CKA of layer {layer} with seed0", *(f"{value:.3f}" for value in values))
    console.print(table)

    figures = {
        "cka_within": plots.cka(within),
        "cka_across": plots.cka(across),
        "stiffness": plots.stiffness(stiff),
        "class_matrix": plots.class_matrix(stiff["seed0"]),
        "decision_planes": plots.decision_planes(list(runs.values()), triplets=[0, 1, 2, 3]),
        "reproducibility": plots.reproducibility(agreement),
        "fragmentation": plots.fragmentation(pieces),
    }
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
    for run in runs.values():
        export(run)


def program(name: str) -> str:
    """Return how to call a program, also where this Python's folder is not on the path."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) is None and beside.exists():
        return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
    return name


def accuracy(run: sonde.Run, source: str) -> float:
    """Return the share of correct predictions at the last recorded step."""
    log = run["predictions", source]
    predicted = sonde.analysis.predicted_classes(log.array("logits"), log.targets)
    return float((predicted == log.targets).mean())


if __name__ == "__main__":
    main()
