"""What reading a long run costs: 1,000 layers × 10,000 records, sealed, on one thread.

Printed are CPU seconds: listing the run (every layer and step), one layer across all steps, all
layers at one step, and the program `sonde ls`, which starts Python first. A run of the same records
in one HDF5 file, a dataset per layer, is read by h5py beside it, where that can answer.

Run `python benchmarks/log_read.py`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.format.files import write_run_file

SIZE = 4  # Elements of an array: what is measured is finding arrays, not loading them.


def values_of(step: int, num_layers: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return what the layers hold at a step, float32 [layers, elements]."""
    return (step + np.arange(num_layers * SIZE, dtype=np.float32)).reshape(num_layers, SIZE)


def write_run(run: Path, num_layers: int, num_records: int, segment_bytes: int) -> None:
    """Record a run, as a training does, and seal it."""
    run.mkdir()
    write_run_file(run, {})
    writer = LogWriter(run, block=True, segment_bytes=segment_bytes)
    for step in range(num_records):
        values = values_of(step, num_layers)
        arrays = [
            LogArray("mean", row, ("feature",), f"layers.{i}.attention.output")
            for i, row in enumerate(values)
        ]
        writer.append("activations", "probe", step, arrays)
    writer.close()


def write_h5py(path: Path, num_layers: int, num_records: int) -> None:
    """Write the same arrays into one HDF5 file, a contiguous dataset per layer."""
    with h5py.File(path, "w") as file:
        steps = np.arange(num_records, dtype=np.float32)[:, None]
        for layer, first in enumerate(values_of(0, num_layers)):
            file[f"layers.{layer}.attention.output"] = first + steps


def list_run(path: Path) -> None:
    """Open a run and list what it holds."""
    run = open_run(path)
    assert run.layers
    assert run.steps()


def cpu_of(act: Callable[[], object], repeats: int) -> float:
    """Return the median of the CPU seconds of a function."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        act()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def cpu_of_ls(run: Path) -> float:
    """Return the CPU seconds of the program `sonde ls`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "sonde", "ls", run], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read_step(path: Path, step: int) -> None:
    """Read all datasets at one record."""
    with h5py.File(path) as file:
        for dataset in file.values():
            dataset[step]


def read_layer(path: Path, layer: str) -> None:
    """Read one dataset at all records."""
    with h5py.File(path) as file:
        file[layer][:]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--segment-mib", type=int, default=5, help="a training's own are 64 MiB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        run_path, h5_path = Path(root) / "run", Path(root) / "one.h5"
        write_run(run_path, arguments.layers, arguments.records, arguments.segment_mib << 20)
        write_h5py(h5_path, arguments.layers, arguments.records)
        num_segments = len(list(run_path.rglob("*.h5")))
        run = open_run(run_path)
        log, layer, step = run.activations, run.layers[-1], arguments.records // 2
        assert log.steps == list(range(arguments.records))
        assert np.array_equal(log.array("mean", step, layer), values_of(step, len(run.layers))[-1])
        repeats = arguments.repeats
        rows = {
            "list layers and steps": (cpu_of(lambda: list_run(run_path), repeats), None),
            "sonde ls": (statistics.median(cpu_of_ls(run_path) for _ in range(repeats)), None),
            "one layer, all steps": (
                cpu_of(lambda: log.stack("mean", layer=layer), repeats),
                cpu_of(lambda: read_layer(h5_path, layer), repeats),
            ),
            "all layers, one step": (
                cpu_of(lambda: [log.array("mean", step, name) for name in run.layers], repeats),
                cpu_of(lambda: read_step(h5_path, step), repeats),
            ),
        }
    size = f"{arguments.layers:,} layers × {arguments.records:,} records, {num_segments} segments"
    table = Table(title=f"CPU seconds, {size}")
    for column in ("", "sonde", "h5py, one closed file"):
        table.add_column(column, justify="right" if column else "left")
    for what, (ours, theirs) in rows.items():
        table.add_row(what, f"{ours:.3f}", "–" if theirs is None else f"{theirs:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
