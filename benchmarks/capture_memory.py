"""Peak memory of recording all layers of a ResNet-50 on a probe that takes several batches.

Each row is a process of its own: it imports everything, builds the model and the probe, and then
runs the probe forward once, in eval mode and without hooks of sonde's, or records it and forces the
record to the disk. Printed is how much the peak of its resident memory (VmHWM) grew meanwhile, and
how much more it grew than in a plain forward pass; what is recorded, which the recorder holds
besides the features of its memory budget (1 GiB, the default of `Activations`); and passes: the
number of images that the model saw, divided by those in the probe. CPU time is of the recording
process.

Peaks differ between runs by what glibc's malloc does not give back: memory freed below small blocks
that are still in use. `MALLOC_MMAP_THRESHOLD_=1048576` in the environment takes that out.

Run `python benchmarks/capture_memory.py` (Linux). It takes minutes; `--images 256 --batch-size 64`
takes less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from peak_memory import MIB, peak_bytes
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sonde

STORES: dict[str, Callable[[], sonde.Gram | sonde.Sketch]] = {
    "sonde, Gram()": sonde.Gram,
    "sonde, Sketch(64)": partial(sonde.Sketch, 64),
    "sonde, Gram(block=256)": partial(sonde.Gram, block=256),
}
PLAIN = "plain"
Facts = dict[str, float]


def run_forward(model: nn.Module, probe: sonde.Probe) -> None:
    """Run the probe forward, batch by batch."""
    with torch.no_grad():
        for inputs, _ in probe.batches(torch.device("cpu")):
            model(inputs)


def record(
    model: nn.Module, probe: sonde.Probe, store: sonde.Gram | sonde.Sketch, path: Path
) -> None:
    """Record all layers of the probe, and force the record to the disk."""
    measures = [sonde.Activations(probe, store=store)]
    with sonde.Recorder(
        path, model, measures, when=sonde.at(0), on_error="raise", block=True
    ) as recorder:
        recorder.measure()
        recorder.sync()


def run_row(name: str, num_images: int, batch_size: int) -> Facts:
    """Do what a row of the table is about, and return what it took."""
    images = torch.randn(num_images, 3, 64, 64, generator=torch.manual_seed(0))
    probe = sonde.Probe(images, batch_size=batch_size)
    model = torchvision.models.resnet50(num_classes=10).eval()
    num_seen = 0

    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal num_seen
        num_seen += len(inputs[0])

    model.register_forward_pre_hook(count)
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "run"
        before, start, cpu = peak_bytes(), time.perf_counter(), time.process_time()
        if name == PLAIN:
            run_forward(model, probe)
        else:
            record(model, probe, STORES[name](), path)
        facts: Facts = {
            "peak": (peak_bytes() - before) / MIB,
            "cpu": time.process_time() - cpu,
            "seconds": time.perf_counter() - start,
            "passes": num_seen / num_images,
        }
        if name != PLAIN:  # Reading takes memory, too.
            log = sonde.open_run(path).activations
            facts |= {"recorded": log.num_bytes / MIB, "layers": len(log.layers)}
    return facts


def run_apart(name: str, num_images: int, batch_size: int) -> Facts:
    """Run a row in a process of its own."""
    command = [sys.executable, __file__, "--row", name]
    command += ["--images", str(num_images), "--batch-size", str(batch_size)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    facts: Facts = json.loads(result.stdout)
    return facts


def main() -> None:
    """Run each row in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024, help="in the probe")
    parser.add_argument("--batch-size", type=int, default=256, help="of the probe")
    parser.add_argument("--row", choices=[PLAIN, *STORES], help="only one, printed as JSON")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(run_row(arguments.row, arguments.images, arguments.batch_size)))
        return
    title = f"ResNet-50, {arguments.images} images of 64 × 64 in batches of {arguments.batch_size}"
    table = Table("", title=title)
    for column in ("peak, MiB", "over plain, MiB", "recorded, MiB", "layers", "passes"):
        table.add_column(column, justify="right")
    table.add_column("seconds", justify="right")
    table.add_column("CPU, s", justify="right")
    plain = 0.0
    for name in (PLAIN, *STORES):
        print(f"{name} …", file=sys.stderr, flush=True)
        facts = run_apart(name, arguments.images, arguments.batch_size)
        if name == PLAIN:
            plain = facts["peak"]
        table.add_row(
            name,
            f"{facts['peak']:.0f}",
            f"{facts['peak'] - plain:.0f}",
            f"{facts.get('recorded', 0):.0f}",
            f"{facts.get('layers', 0):.0f}",
            f"{facts['passes']:.2f}",
            f"{facts['seconds']:.0f}",
            f"{facts['cpu']:.0f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
