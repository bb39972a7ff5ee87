"""Stiffness with the head of the gradients in float32 and in float64, on the same weights.

softmax − one-hot rounds the true class's entry of a confident example to 0 in float32. Both columns
are of the same network and the same probe; only the gradient with respect to the logits differs:
that of `F.cross_entropy` in float32, or sonde's. What comes after it, down to the parameters, is
float32 in both. A fully connected network 500-300-100 is trained by Adam with batches of 32 on the
first 2,000 images, and measured on 50 of these of each class (as Fort et al., 2019, 1901.09491).

Run `OMP_NUM_THREADS=1 python benchmarks/stiffness_precision.py --data-dir DIR`, where DIR/MNIST/raw
holds MNIST as torchvision keeps it; without `--data-dir` the digits of scikit-learn take its place.
Printed is a markdown table, mean ± standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.analysis.stiffness import stiffness_matrices, summarize

NUM_TRAINED = 2000
NUM_PROBED = 50
BATCH_SIZE = 32
# Name, learning rate, random labels, epochs at which it is measured.
RUNS = [
    ("init", 1e-3, False, (0,)),
    ("lr 1e-4", 1e-4, False, (8,)),
    ("lr 1e-3", 1e-3, False, (2, 32)),
    ("random labels, lr 1e-3", 1e-3, True, (32,)),
]
COLUMNS = ("cos within", "cos between", "sign within", "sign between")


@dataclass(frozen=True)
class Images:
    """Images as rows, and their classes, for training and for validation."""

    trained: Tensor
    trained_targets: Tensor
    held_out: Tensor
    held_out_targets: Tensor


def load(data_dir: str | None) -> Images:
    """Return MNIST, or the digits of scikit-learn, with pixels from 0 to 1."""
    if data_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
        classes = torch.tensor(digits.target)
        return Images(pixels[:1200], classes[:1200], pixels[1200:], classes[1200:])
    from torchvision.datasets import MNIST

    first, last = MNIST(data_dir, train=True), MNIST(data_dir, train=False)
    return Images(
        first.data[:NUM_TRAINED].flatten(1) / 255,
        first.targets[:NUM_TRAINED],
        last.data.flatten(1) / 255,
        last.targets,
    )


def trained(
    images: Images, targets: Tensor, lr: float, epochs: tuple[int, ...], seed: int
) -> Iterator[tuple[int, nn.Module]]:
    """Train a network, and yield it at some epochs."""
    torch.manual_seed(seed)
    sizes = (images.trained.shape[1], 500, 300, 100)
    layers = [
        layer
        for num_in, num_out in itertools.pairwise(sizes)
        for layer in (nn.Linear(num_in, num_out), nn.ReLU())
    ]
    model = nn.Sequential(*layers, nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(max(epochs) + 1):
        if epoch in epochs:
            yield epoch, model
        for rows in torch.randperm(len(targets)).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(images.trained[rows]), targets[rows]).backward()
            optimizer.step()


def probe_rows(targets: Tensor) -> Tensor:
    """Return the first rows of each class."""
    return torch.cat([(targets == label).nonzero()[:NUM_PROBED, 0] for label in range(10)])


def by_delta(outputs: Tensor, deltas: Tensor) -> Tensor:
    """Return a loss whose gradient with respect to the outputs is given."""
    return (outputs * deltas).sum()


def measured(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[list[float], ...]:
    """Return the stiffness with a float32 head, with sonde's, and the share of saturated examples.

    Each is cosine within and between classes, and sign within and between.
    """
    outputs = model(inputs).detach().requires_grad_()
    (deltas,) = torch.autograd.grad(F.cross_entropy(outputs, targets, reduction="sum"), outputs)
    narrow = sonde.example_gradients(model, by_delta, inputs, deltas)
    wide = sonde.example_gradients(model, F.cross_entropy, inputs, targets)
    assert wide.saturated is not None
    return (
        _stiffness(narrow, targets),
        _stiffness(wide, targets),
        [float(wide.saturated.double().mean())],
    )


def _stiffness(result: sonde.hooks.ExampleGradientResult, targets: Tensor) -> list[float]:
    assert result.total is not None
    sign, cosine = stiffness_matrices(result.total.numpy())
    found = [summarize(pairs, targets.numpy()) for pairs in (cosine, sign)]
    return [value for one in found for value in (one.within, one.between)]


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the share of examples that are classified as their targets say."""
    with torch.no_grad():
        return float((model(inputs).argmax(1) == targets).double().mean())


def measure_run(
    images: Images, lr: float, is_random: bool, epochs: tuple[int, ...], seed: int
) -> dict[int, list[float]]:
    """Return the numbers of a row of the table, by epoch."""
    generator = torch.Generator().manual_seed(seed)
    targets = images.trained_targets
    if is_random:
        targets = torch.randint(10, targets.shape, generator=generator)
    rows = probe_rows(targets)
    found = {}
    for epoch, model in trained(images, targets, lr, epochs, seed):
        narrow, wide, saturated = measured(model, images.trained[rows], targets[rows])
        both = [value for pair in zip(narrow, wide, strict=True) for value in pair]
        found[epoch] = [
            accuracy(model, images.trained, targets),
            accuracy(model, images.held_out, images.held_out_targets),
            *saturated,
            *both,
        ]
    return found


def main() -> None:
    """Train, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with MNIST; else scikit-learn's digits")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = load(arguments.data_dir)
    columns = [f"{name}, {head}" for name in COLUMNS for head in ("float32", "float64")]
    header = ["run", "epoch", "acc tr", "acc va", "saturated", *columns]
    print(f"| {' | '.join(header)} |", f"| {' | '.join(['---'] * len(header))} |", sep="\n")
    for name, lr, is_random, epochs in RUNS:
        seeds = [
            measure_run(images, lr, is_random, epochs, seed) for seed in range(arguments.seeds)
        ]
        for epoch in epochs:
            values = np.array([found[epoch] for found in seeds])
            spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
            cells = [
                f"{mean:.3f} ± {sd:.3f}" for mean, sd in zip(values.mean(0), spread, strict=True)
            ]
            print(f"| {' | '.join([name, str(epoch), *cells])} |", flush=True)


if __name__ == "__main__":
    main()
