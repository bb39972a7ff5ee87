"""What many small records cost: a scalar a step, as a long training logs it, on one thread.

Printed are CPU seconds: writing the records, opening the journal that a killed training leaves,
sealing it, then opening, verifying and exporting the run; what a record costs after a stall of the
disk while 30,000 waited, to one before it; and what `sonde show` counts of 1,000 layers × 10,000
records. With `--against` another checkout of sonde does the same, each part in a process of its
own, in turn.

Run `python benchmarks/log_small.py`; `--records 2000000` is the size for a release.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.export import export_run
from sonde.log.format.files import write_run_file
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run
from sonde.log.writing import appender

PARTS = ("write", "open the journal", "seal", "open", "verify", "export", "after a stall", "bytes")


def new_run(folder: Path) -> Path:
    """Return a run directory with nothing in it."""
    run = folder / "run"
    run.mkdir()
    write_run_file(run, {})
    return run


def scalars(writer: LogWriter, steps: range) -> None:
    """Append a scalar for each step."""
    for step in steps:
        writer.append("scalars", "training", step, [LogArray("loss", np.array(0.5), ())])


def cpu_of(act: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the CPU seconds of a function."""
    start = clock()
    act()
    return clock() - start


def long_run(folder: Path, num_records: int) -> dict[str, float]:
    """Write a run of small records and do with it what people do."""
    run = new_run(folder)
    # One journal, as of a process that was killed before it was full.
    journal_records = min(num_records, 100_000)
    writer = LogWriter(run, seal=False, block=True)
    costs = {"write": cpu_of(lambda: (scalars(writer, range(journal_records)), writer.flush()))}
    costs["open the journal"] = cpu_of(lambda: open_run(run))
    more = range(journal_records, num_records)
    costs["write"] += cpu_of(lambda: (scalars(writer, more), writer.close()))
    costs["seal"] = cpu_of(lambda: seal_run(run))
    costs["open"] = cpu_of(lambda: open_run(run))
    costs["verify"] = cpu_of(lambda: verify_run(run))
    costs["export"] = cpu_of(lambda: export_run(open_run(run), folder / "run.h5"))
    return costs


def stall(folder: Path) -> dict[str, float]:
    """Return what a record costs after the disk stood still while many waited, to one before."""
    (folder / "stall").mkdir()
    writer = LogWriter(new_run(folder / "stall"), seal=False, block=True)

    def record() -> float:
        seconds = cpu_of(lambda: scalars(writer, range(5_000)), time.thread_time)
        writer.flush()
        return seconds

    record()
    before = min(record(), record())
    is_over = threading.Event()
    append = appender.Appender._append_to

    def wait_and_append(self: appender.Appender, *args: Any) -> None:
        is_over.wait()
        append(self, *args)

    appender.Appender._append_to = wait_and_append  # type: ignore[method-assign] # the stall
    scalars(writer, range(30_000))
    is_over.set()
    writer.flush()
    appender.Appender._append_to = append  # type: ignore[method-assign] # it is over
    after = min(record(), record())
    writer.close()
    return {"after a stall": after / before}


def many_layers(folder: Path) -> dict[str, float]:
    """Return what counting the bytes of 1,000 layers × 10,000 records takes."""
    (folder / "wide").mkdir()
    run = new_run(folder / "wide")
    writer = LogWriter(run, block=True)
    values = np.zeros(4, np.float32)
    arrays = [LogArray("mean", values, ("feature",), f"layers.{i}") for i in range(1_000)]
    for step in range(10_000):
        writer.append("activations", "probe", step, arrays)
    writer.close()
    log = open_run(run).activations
    return {"bytes": cpu_of(lambda: log.num_bytes)}


def measure(num_records: int) -> dict[str, float]:
    """Return the cost of each part."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        return {**long_run(path, num_records), **stall(path), **many_layers(path)}


def measured_by(checkout: Path, num_records: int) -> dict[str, float]:
    """Return what another checkout measures with this script."""
    command = [sys.executable, __file__, "--records", str(num_records), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    costs: dict[str, float] = json.loads(printed)
    return costs


def main() -> None:
    """Print the costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--against", type=Path, help="another checkout of sonde")
    parser.add_argument("--json", action="store_true", help="print the numbers alone")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(measure(arguments.records)))
        return
    ours = Path(__file__).resolve().parents[1]
    columns = {"sonde": ours} | ({} if arguments.against is None else {"before": arguments.against})
    found = {name: measured_by(path, arguments.records) for name, path in columns.items()}
    table = Table("CPU, s", *columns)
    for part in PARTS:
        unit = "×" if part == "after a stall" else ""
        table.add_row(part, *(f"{costs[part]:.2f}{unit}" for costs in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
