"""CPU cost of recording: sonde's journal and seal against appending to HDF5 with h5py.

Each record holds several arrays; both sides write the same records, in turn, in one run. Sonde is
given arrays that it has to copy, except where they are called owned, as those of its own measures
are; arrays below 64 KiB are copied in either case. Printed
are medians of CPU milliseconds per record and ratios: the training thread's part against a plain
copy, and the whole process (all threads) plus the sealing process against h5py with a flush per
record. Starting the sealing process happens once per training and is stated separately.

Run `python benchmarks/log_append.py`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from sonde.log import LogArray, LogWriter
from sonde.log.format.files import write_run_file

CASES = {
    "50 × 32 KiB": (50, 8192, False),
    "1000 × 4 KiB": (1000, 1024, False),
    "4 × 4 MiB": (4, 1 << 20, False),
    "4 × 4 MiB, owned": (4, 1 << 20, True),
}
Arrays = list[npt.NDArray[np.float32]]


def cpu_seconds(who: int = resource.RUSAGE_SELF) -> float:
    """Return the CPU time of this process, or of its ended children."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def measure_sonde(
    arrays: Arrays, num_records: int, folder: Path, *, is_owned: bool = False
) -> dict[str, float]:
    """Record, and seal in another process; return CPU seconds by part, and the longest stall.

    The training thread's part is taken beside a plain copy of as many other arrays, each finding
    the caches as the writer's thread left them.
    """
    folder.mkdir()
    write_run_file(folder, {})
    records = [
        LogArray("gram", array, ("element",), f"layer{i}", is_owned=is_owned)
        for i, array in enumerate(arrays)
    ]
    others = [array.copy() for array in arrays]
    targets = [np.empty_like(array) for array in arrays]
    memcpy = thread = longest = 0.0
    start, children = cpu_seconds(), cpu_seconds(resource.RUSAGE_CHILDREN)
    writer = LogWriter(folder, block=True)
    for step in range(num_records):
        before = time.thread_time()
        for target, other in zip(targets, others, strict=True):
            np.copyto(target, other)
        between, began = time.thread_time(), time.perf_counter()
        writer.append("activations", "probe", step, records)
        longest = max(longest, time.perf_counter() - began)
        memcpy += between - before
        thread += time.thread_time() - between
        writer.flush()
    writer.close()
    return {
        "memcpy": memcpy,
        "thread": thread,
        "longest": longest,
        "append": cpu_seconds() - start - memcpy,
        "seal": cpu_seconds(resource.RUSAGE_CHILDREN) - children,
    }


def measure_h5py(arrays: Arrays, num_records: int, folder: Path) -> dict[str, float]:
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
    return {"h5py": cpu_seconds() - start}


def warm_memory() -> None:
    """Touch as much memory as a measurement takes for its files.

    A virtual machine is given pages when they are used first, and may give back those that are
    free; that costs more than what is measured, and would fall on whoever comes first.
    """
    np.ones(4 << 30, np.uint8)


def measure(arrays: Arrays, num_records: int, repeats: int, *, is_owned: bool) -> dict[str, float]:
    """Measure both in turn; return medians of CPU seconds, the first round left out."""
    rounds = []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as root:
            seconds = {"start": measure_sonde([], 0, Path(root) / "run")["seal"]}
        for one in (partial(measure_sonde, is_owned=is_owned), measure_h5py):
            warm_memory()
            with tempfile.TemporaryDirectory() as root:
                seconds |= one(arrays, num_records, Path(root) / "run")
        seconds["seal"] -= seconds["start"]
        rounds.append(seconds)
    return {part: statistics.median(r[part] for r in rounds[1:]) for part in rounds[0]}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=int, default=100)
    arguments = parser.parse_args()
    table = Table(title="CPU per record, ms (medians); longest stall of the training thread, ms")
    for column in (
        "arrays",
        "memcpy",
        "thread",
        "append",
        "seal",
        "h5py",
        "longest",
        "thread / memcpy",
    ):
        table.add_column(column, justify="right")
    table.add_column("h5py / append", justify="right")
    table.add_column("h5py / (append + seal)", justify="right")
    starting = []
    for name, (num_arrays, size, is_owned) in CASES.items():
        arrays = list(np.random.default_rng(0).normal(size=(num_arrays, size)).astype(np.float32))
        cost = measure(arrays, arguments.records, arguments.repeats, is_owned=is_owned)
        starting.append(cost["start"])
        parts = ("memcpy", "thread", "append", "seal", "h5py")
        milliseconds = [f"{1e3 * cost[part] / arguments.records:.2f}" for part in parts]
        milliseconds.append(f"{1e3 * cost['longest']:.1f}")
        ratios = [
            cost["thread"] / cost["memcpy"],
            cost["h5py"] / cost["append"],
            cost["h5py"] / (cost["append"] + cost["seal"]),
        ]
        table.add_row(name, *milliseconds, *(f"{ratio:.1f}×" for ratio in ratios))
    console = Console(width=130)
    console.print(table)
    start = statistics.median(starting)
    console.print(f"starting the sealing process, once per training: {start:.2f} s of CPU")


if __name__ == "__main__":
    main()
