"""Processes that write a run, and others that read it meanwhile.

`python -m tests.log.watching write RUN EVERY` records until its standard input ends. The number of
each record stands, once it is flushed, in the file `announced` of the run, which readers map; every
EVERYth is printed too. `python -m tests.log.watching READER RUN NUM SEED` reads until NUM records
are announced and something was read of each kind, and prints how often; whatever is wrong ends it
with an error.
"""

from __future__ import annotations

import itertools
import mmap
import random
import struct
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np

from sonde.log import LogWriter, Run, open_run
from sonde.log.format.files import segments
from sonde.log.verify import verify_run
from tests.limits import LIMIT_SECONDS

from .conftest import assert_holds, assert_identical
from .doomed import record_of

READERS = {
    "refresh": {"refreshed", "records"},
    "reopen": {"opened", "verified", "records"},
    "open_segments": {"segments"},
}
"""How a run is read, and what is counted of it."""

SEGMENT_BYTES = 8_300  # 16 records.
_RECORDS_PER_SECOND = 250
_NUMBER = struct.Struct("<q")


class Announced:
    """The number of the last record that is committed; processes share it."""

    def __init__(self, run: Path, *, create: bool = False) -> None:
        path = run / "announced"
        if create:
            path.write_bytes(_NUMBER.pack(-1))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @property
    def last(self) -> int:
        """The number, -1 before the first."""
        return int(_NUMBER.unpack_from(self._map, 0)[0])

    @last.setter
    def last(self, number: int) -> None:
        _NUMBER.pack_into(self._map, 0, number)


def write(run: Path, every: int) -> None:
    """Record until the standard input ends; announce what is committed."""
    announced = Announced(run, create=True)
    is_over = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        is_over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    writer = LogWriter(run, segment_bytes=SEGMENT_BYTES)
    for number in itertools.count():
        assert writer.append("activations", "probe", number, record_of(number))
        assert writer.flush(LIMIT_SECONDS)
        announced.last = number
        if number % every == 0:
            print(number, flush=True)
        # What is recorded faster than it is sealed says nothing about readers.
        if is_over.wait(1 / _RECORDS_PER_SECOND):
            break
    writer.close()
    assert writer.problem is None, writer.problem


class Watcher:
    """Reads a run that is being written, and checks each time what has to hold."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._rng = random.Random(seed)
        self._announced = Announced(path)
        self._run: Run | None = None
        self._newest = -1
        self.reads: Counter[str] = Counter()

    @property
    def num_announced(self) -> int:
        """How many records are committed."""
        return self._announced.last + 1

    def refresh(self) -> None:
        """Look again into a run that stays open."""
        committed = self._announced.last
        if self._run is None:
            self._run = open_run(self._path)
        self._run.refresh()
        self._check(self._run, committed)
        self.reads["refreshed"] += 1

    def reopen(self) -> None:
        """Open the run anew; every tenth time check every byte of it."""
        committed = self._announced.last
        run = open_run(self._path)
        self._check(run, committed)
        self.reads["opened"] += 1
        if self.reads["opened"] % 10 == 1:
            assert verify_run(self._path) == []
            self.reads["verified"] += 1

    def open_segments(self) -> None:
        """Read a segment, the last or any, with libhdf5 and with xarray."""
        import h5py
        import xarray

        (folder,) = self._path.glob("attempt*")
        sealed = segments(folder)
        if not sealed:
            return
        path = self._rng.choice([sealed[-1][2], self._rng.choice(sealed)[2]])
        name = "conv1:gram"
        with h5py.File(path, "r") as file:
            group = file["activations/probe"]
            steps, grams = group["step"][:].tolist(), group[name][:]
        with xarray.open_dataset(path, group="activations/probe", engine="h5netcdf") as dataset:
            assert dataset["step"].values.tolist() == steps
            assert_identical(dataset[name].values, grams)
        assert_identical(grams, np.stack([record_of(step)[0].values for step in steps]))
        self.reads["segments"] += 1

    def _check(self, run: Run, committed: int) -> None:
        assert (run.state, run.damage) == ("recording", [])
        steps = run.steps()
        assert steps == list(range(len(steps)))
        newest = len(steps) - 1
        # Steps neither go backwards nor stay behind what was announced before the look.
        assert newest >= max(committed, self._newest), (newest, committed, self._newest)
        self._newest = newest
        if newest < 0:
            return
        log = run.activations
        for step in (newest, self._rng.randrange(newest + 1)):
            read = {
                (layer, name): log.array(name, step, layer) for layer, name in log.describe(step)
            }
            assert_holds(record_of(step), read)
            self.reads["records"] += 1
        first = self._rng.randrange(newest + 1)
        some = range(first, min(first + 20, newest + 1))
        losses = np.stack([record_of(step)[3].values for step in some])
        assert_identical(log.stack("loss", some), losses)


def watch(watcher: Watcher, reader: str, num_records: int) -> None:
    """Read until enough was recorded meanwhile; say so once it was done the first time."""
    read = getattr(watcher, reader)
    read()
    print("reading", flush=True)
    while not (watcher.num_announced >= num_records and READERS[reader] <= set(watcher.reads)):
        read()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        watcher = Watcher(Path(sys.argv[2]), int(sys.argv[4]))
        watch(watcher, sys.argv[1], int(sys.argv[3]))
        print(" ".join(f"{what}={count}" for what, count in watcher.reads.items()))
