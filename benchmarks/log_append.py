"""CPU cost of recording: sonde's journal and seal against appending to HDF5 with h5py.

Each record holds several arrays; both sides write the same records, in turn, in one run. Printed
are medians of CPU milliseconds per record and ratios: the training thread's part against a plain
copy, and the whole process (all threads) plus the sealing process against h5py with a flush per
record. Starting the sealing process happens once per training and is stated separately.

Run `python benchmarks/log_append.py`.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from sonde.log import LogArray, LogWriter
from sonde.log.layout import write_run_file

CASES = {"50 × 32 KiB": (50, 8192), "1000 × 4 KiB": (1000, 1024), "4 × 4 MiB": (4, 1 << 20)}
Arrays = list[npt.NDArray[np.float32]]


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """Return the CPU time of this process, or of its ended children."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def measure_memcpy(arrays: Arrays, num_records: int, _: Path) -> float:
    """Copy each array into a buffer that is there already."""
    targets = [np.empty_like(array) for array in arrays]
    start = time.thread_time()
    for _ in range(num_records):
        for target, array in zip(targets, arrays, strict=True):
            np.copyto(target, array)
    return (time.thread_time() - start) / num_records


def measure_sonde(arrays: Arrays, num_records: int, folder: Path) -> tuple[float, float, float]:
    """Return CPU seconds: training thread, all threads, sealing process."""
    folder.mkdir()
    write_run_file(folder, {})
    records = [LogArray("gram", array, ("element",), f"layer{i}") for i, array in enumerate(arrays)]
    start, children = cpu_seconds(), cpu_seconds(resource.RUSAGE_CHILDREN)
    writer = LogWriter(folder, block=True)
    thread = 0.0
    for step in range(num_records):
        before = time.thread_time()
        writer.append("activations", "probe", step, records)
        thread += time.thread_time() - before
        writer.flush()
    writer.close()
    return (
        thread,
        cpu_seconds() - start,
        cpu_seconds(resource.RUSAGE_CHILDREN) - children,
    )


def measure_h5py(arrays: Arrays, num_records: int, folder: Path) -> float:
    """Append each array to a resizable dataset of its own, and flush after each record."""
    folder.mkdir()
    start = cpu_seconds()
    with h5py.File(folder / "log.h5", "w") as file:
        datasets: list[Any] = [  # h5py ships no types.
            file.create_dataset(
                f"layer{i}",
                (0, array.size),
                "float32",
                maxshape=(None, array.size),
                chunks=(1, array.size),
            )
            for i, array in enumerate(arrays)
        ]
        for step in range(num_records):
            for dataset, array in zip(datasets, arrays, strict=True):
                dataset.resize(step + 1, axis=0)
                dataset[step] = array
            file.flush()
    return (cpu_seconds() - start) / num_records


def repeated(measure: Callable[[Path], Any], root: Path, repeats: int) -> list[Any]:
    """Measure several times, each in a new folder."""
    results = []
    for repeat in range(repeats):
        folder = root / f"{repeat}"
        results.append(measure(folder))
        shutil.rmtree(folder, ignore_errors=True)
    return results


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=int, default=100)
    arguments = parser.parse_args()
    table = Table(title="CPU per record, ms (medians)")
    for column in ("arrays", "memcpy", "thread", "append", "seal", "h5py", "thread / memcpy"):
        table.add_column(column, justify="right")
    table.add_column("h5py / append", justify="right")
    table.add_column("h5py / (append + seal)", justify="right")
    with tempfile.TemporaryDirectory() as root:
        empty = repeated(partial(measure_sonde, [], 0), Path(root), arguments.repeats)
    start = statistics.median(sealing for _, _, sealing in empty)
    for name, (num_arrays, size) in CASES.items():
        arrays = list(np.random.default_rng(0).normal(size=(num_arrays, size)).astype(np.float32))
        with tempfile.TemporaryDirectory() as root:
            repeat = partial(repeated, root=Path(root), repeats=arguments.repeats)
            copies = repeat(partial(measure_memcpy, arrays, arguments.records))
            ours = repeat(partial(measure_sonde, arrays, arguments.records))
            theirs = repeat(partial(measure_h5py, arrays, arguments.records))
        copy, h5 = statistics.median(copies), statistics.median(theirs)
        thread, append, whole_seal = (
            statistics.median(column) / arguments.records for column in zip(*ours, strict=True)
        )
        seal = whole_seal - start / arguments.records
        milliseconds = [f"{1e3 * value:.2f}" for value in (copy, thread, append, seal, h5)]
        ratios = [thread / copy, h5 / append, h5 / (append + seal)]
        table.add_row(name, *milliseconds, *(f"{ratio:.1f}×" for ratio in ratios))
    console = Console(width=120)
    console.print(table)
    console.print(f"starting the sealing process, once per training: {start:.2f} s")


if __name__ == "__main__":
    main()
