"""Processes that record, seal and read one array of gigabytes, and print the memory they took.

`python -m tests.log.gigabytes write|seal|read RUN DTYPE NUM`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run

from .conftest import Array

_CHUNK = 16 << 20


def chunks_of(dtype: str, num: int) -> Iterator[tuple[slice, Array]]:
    """Yield what stands where in an array of random bits, a piece at a time."""
    for start in range(0, num, _CHUNK):
        size = min(_CHUNK, num - start) * np.dtype(dtype).itemsize
        bits = np.random.default_rng(start).integers(0, 256, size, np.uint8)
        yield slice(start, min(start + _CHUNK, num)), bits.view(dtype)


def write(run: Path, dtype: str, num: int) -> None:
    values = np.empty(num, dtype)
    for where, chunk in chunks_of(dtype, num):
        values[where] = chunk
    writer = LogWriter(run, seal=False, block=True)
    assert writer.append("activations", "probe", 0, [LogArray("full", values, ("n",), "fc")])
    assert writer.append("activations", "probe", 1, [LogArray("loss", np.array(0.5), ())])
    writer.close()
    assert writer.problem is None, writer.problem


def read(run: Path, dtype: str, num: int) -> None:
    assert verify_run(run) == []
    log = open_run(run).activations
    values = log.array("full", 0, "fc")
    assert (values.dtype, values.shape) == (np.dtype(dtype), (num,))
    for where, chunk in chunks_of(dtype, num):
        assert values[where].tobytes() == chunk.tobytes(), where
    assert log.array("loss", 1) == 0.5


if __name__ == "__main__":
    action, path, name, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if action == "seal":
        assert seal_run(path)
    else:
        {"write": write, "read": read}[action](path, name, count)
    # Not ru_maxrss, which a process takes over from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")))
