"""Helpers of the log's tests: run directories, records to write, and bit-exact comparison."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.format.files import write_run_file, writer_folders
from sonde.log.reading.index import read_index
from sonde.log.sealing.seal import seal_run

from .doomed import record_of
from .example_run import write_example_run
from .files import journals_of, segments_of

Array = npt.NDArray[Any]
StreamKey = tuple[str | None, str]
Open = Callable[[Path], Run]


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    """Return an empty run directory."""
    return new_run(tmp_path / "seed0")


@pytest.fixture
def writer(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LogWriter]:
    """Write into `run_path`, without pauses between tries and without sealing."""
    monkeypatch.setattr("sonde.log.writing.appender._RETRIES_SECONDS", (0.0, 0.0, 0.0))
    writer = LogWriter(run_path, seal=False)
    yield writer
    monkeypatch.undo()
    writer.close()


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """Return an empty folder, in memory where the system has one, for thousands of files."""
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=home) as folder:
        yield Path(folder)


@pytest.fixture(params=["journal", "segment"])
def opened(request: pytest.FixtureRequest) -> Open:
    """Open a written run, once from its journals and once from its segments."""

    def seal_and_open(path: Path) -> Run:
        assert seal_run(path)
        return open_run(path)

    return open_run if request.param == "journal" else seal_and_open


@pytest.fixture(params=["journal", "segments", "both"])
def run(request: pytest.FixtureRequest, run_path: Path) -> Run:
    """Open the example run from one journal, from segments, and from segments and a journal."""
    write_example_run(run_path, segment_bytes=64 << 20 if request.param == "journal" else 1500)
    if request.param == "segments":
        seal_run(run_path)
        assert len(segments_of(run_path)) > 1
        assert journals_of(run_path) == []
    if request.param == "both":
        seal_run(run_path, before=int(journals_of(run_path)[-2].stem))
        assert segments_of(run_path)
        assert journals_of(run_path)
    return open_run(run_path)


def new_run(path: Path) -> Path:
    """Make an empty run directory."""
    path.mkdir()
    write_run_file(path, {"name": path.name})
    return path


def write_records(
    path: Path, numbers: Iterable[int], *, segment_bytes: int = 64 << 20, **about: object
) -> None:
    """Write `record_of` each number at the step of that number, without sealing, and close."""
    attempt = len(writer_folders(path))
    writer = LogWriter(path, attempt=attempt, about=about, seal=False, segment_bytes=segment_bytes)
    writer.add_table("probe", [LogArray("id", 100 + np.arange(5), ("example",))])
    for number in numbers:
        assert writer.append("activations", "probe", number, record_of(number), {"n": number})
    writer.close()


def write_one(path: Path, arrays: Sequence[LogArray]) -> None:
    """Write one record of `activations` at step 0, without sealing, and close."""
    writer = LogWriter(path, seal=False)
    assert writer.append("activations", "probe", 0, arrays)
    writer.close()


def as_read(array: LogArray) -> Array:
    """Return what a reader must give back for an array."""
    values = np.asarray(array.values)
    if array.dtype != "bfloat16":
        return values
    # A bfloat16 is the upper half of a float32.
    halves = np.zeros((*values.shape, 2), "<u2")
    halves[..., 1] = values
    return halves.view("<f4").reshape(values.shape)


def assert_identical(actual: object, expected: Array) -> None:
    """Compare type, shape and every bit, so that NaN payloads and negative zeros count."""
    assert isinstance(actual, np.ndarray)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


def assert_holds(log_arrays: Sequence[LogArray], read: Mapping[StreamKey, Array]) -> None:
    """Compare a record with what was read of it."""
    assert set(read) == {(array.layer, array.field) for array in log_arrays}
    for array in log_arrays:
        assert_identical(read[array.layer, array.field], as_read(array))


def read_records(run: Run) -> dict[int, dict[StreamKey, Array]]:
    """Return every array of every record of `activations`, by step."""
    if "activations" not in run.measures:
        return {}
    log = run["activations"]
    return {
        step: {
            (layer, field): log.array(field, step, layer, as_stored=True)
            for layer, field in log.describe(step)
        }
        for step in log.steps
    }


def copies(path: Path) -> Counter[tuple[int, int, str, str, int]]:
    """Count how often each record of a run is found, before a reader chooses."""
    return Counter(
        (writer.attempt, writer.rank, *key, record.step)
        for writer in read_index(path)
        for key, parts in writer.parts.items()
        for part in parts
        for record in part.records
    )


def assert_intact(path: Path, numbers: Iterable[int], *, may_hold_more: bool = False) -> Run:
    """Check that a run holds `record_of` each of these numbers, bit for bit and once, and no other.

    Args:
        path: The run directory.
        numbers: What was written.
        may_hold_more: Records that were written but not announced may be there too.
    """
    run = open_run(path)
    read = read_records(run)
    wanted = set(numbers)
    assert wanted <= set(read) if may_hold_more else wanted == set(read)
    for number, arrays in read.items():
        assert_holds(record_of(number), arrays)
    assert set(copies(path).values()) <= {1}
    return run
