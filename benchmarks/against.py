"""CPU time of due and idle steps, beside another checkout of sonde.

Due: per-example gradients (`Gram()`) of each model of `gradient_subjects`, and the activations of a
ResNet-18 (`Gram()`), recorded on a probe and forced to the disk. Idle: training steps with a
recorder attached that is never due.

Each checkout has a process of its own for each row, with torch on one thread. The two work in turn,
a few tenths of a second each, in an order that alternates, so that whatever else the machine does
slows both alike. CPU time (user and system) is of all threads of the process. Printed are the
medians, the median of the ratios within a round, and the time of each one's first call, when
sonde checks every parameter of a model; that one is measured once, and so is no more than a hint.

Run `python benchmarks/against.py OTHER_CHECKOUT` (Linux).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from capture import NEVER, Training, make_probe, make_training, measured, recorded
from gradient_subjects import MODELS, make_subject
from rich.console import Console
from rich.table import Table
from turns import Case, Work, cpu_seconds, keep_freed_memory

import sonde

HERE = Path(__file__).resolve()
NUM_WARM = 3


@contextmanager
def gradients(name: str) -> Iterator[Work]:
    """Record the per-example gradients of a model."""
    subject = make_subject(name)
    probe = sonde.Probe(subject.inputs, subject.targets)
    measures = [sonde.ExampleGradients(probe, F.cross_entropy)]
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "run"
        with sonde.Recorder(
            path, subject.model, measures, when=sonde.at(NEVER), on_error="raise", block=True
        ) as recorder:

            def work() -> None:
                recorder.step()  # A step is recorded once.
                recorder.measure()
                recorder.sync()

            yield work


def activations() -> AbstractContextManager[Work]:
    """Record the activations of a ResNet-18."""
    return measured(*make_probe(32, torch.device("cpu")), sonde.Gram())


@contextmanager
def repeated(number: int, make: Callable[[], Training]) -> Iterator[Work]:
    """Train so many steps with a recorder that is never due."""
    with recorded(make()) as step:

        def work() -> None:
            for _ in range(number):
                step()

        yield work


def train_mlp() -> Training:
    """Return the training of an MLP."""
    subject = make_subject("MLP 784-512⁴-10")
    optimizer = torch.optim.SGD(subject.model.parameters(), lr=1e-3, momentum=0.9)
    return Training(subject.model, optimizer, subject.inputs, subject.targets)


CASES: dict[str, Case] = {
    **{f"due: gradients, {name}": partial(gradients, name) for name in MODELS},
    "due: activations, ResNet-18": activations,
    "idle: ResNet-18, 32 images": partial(
        repeated, 1, partial(make_training, 32, torch.device("cpu"))
    ),
    "idle: MLP, 20 steps": partial(repeated, 20, train_mlp),
}


def serve(name: str, checkout: Path) -> None:
    """Work once for each line of the input, and print how many seconds that took.

    Raises:
        ImportError: If sonde was imported from elsewhere.
    """
    if not Path(sonde.__file__).is_relative_to(checkout):
        raise ImportError(f"sonde is imported from {sonde.__file__}, not from {checkout}")
    torch.set_num_threads(1)
    keep_freed_memory()
    with CASES[name]() as work:
        # Whether it is the first call in which Python looks through all of torch's objects for
        # garbage, which takes longer than that call, depends on how many were made before.
        gc.collect()
        gc.freeze()
        for _ in sys.stdin:
            print(cpu_seconds(work), flush=True)


class Checkout:
    """A process that works with a checkout's code.

    Args:
        path: The checkout.
        name: The row.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), str(path), "--serve", name],
            env=os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self) -> float:
        """Let it work once; return the CPU time."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def row(name: str, other: Path, rounds: int) -> list[str]:
    """Measure a row in both checkouts."""
    checkouts = [Checkout(other, name), Checkout(HERE.parents[1], name)]
    first = [checkout.seconds() for checkout in checkouts]
    seconds: list[list[float]] = [[], []]
    for number in range(NUM_WARM + rounds):
        for at in (0, 1) if number % 2 else (1, 0):
            taken = checkouts[at].seconds()
            if number >= NUM_WARM:
                seconds[at].append(taken)
    for checkout in checkouts:
        checkout.close()
    ratio = statistics.median(new / old for old, new in zip(*seconds, strict=True))
    old, new = (1e3 * statistics.median(of_one) for of_one in seconds)
    return [name, f"{old:.1f}", f"{new:.1f}", f"{ratio:.3f}×", *(f"{s:.2f}" for s in first)]


def main() -> None:
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the checkout that this one is compared with")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--only", default="", help="a part of the names of rows")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.other)
        return
    table = Table("step", "other, ms", "this, ms", "this / other", "first, s: other", "this")
    for name in CASES:
        if options.only in name:
            cells = row(name, options.other.resolve(), options.rounds)
            print(cells, file=sys.stderr, flush=True)
            table.add_row(*cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
