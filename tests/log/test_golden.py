"""The format as files: a small run of version 1 that every later sonde has to read and write alike.

Where datasets lie in a segment is up to libhdf5 and to how it is given the file, so one version of
the format has several folders. After such a change, or after a new version of the format, add a
name to `LAYOUTS` and run `python -m pytest tests/log/test_golden.py --write-golden`; the earlier
folders stay as they are.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.format.files import write_run_file
from sonde.log.format.frames import FORMAT_VERSION
from sonde.log.sealing.seal import seal_journal
from sonde.log.verify import verify_run

from .conftest import assert_holds, read_records
from .files import journals_of

GOLDEN = Path(__file__).parent / "golden"
# The last one is what is written today: libhdf5 writes by a file object since 1b.
LAYOUTS = ("version1", "version1b")
HDF5_VERSION = "2.0.0"  # Which wrote the segment; another one may lay it out in another way.


def arrays_of(step: int) -> list[LogArray]:
    """Return arrays of every kind, without a random generator that may change."""
    ramp = np.arange(6).reshape(2, 3) + step
    dims = ("example", "feature")
    arrays = [
        LogArray("full", (ramp * 0.5).astype(dtype), dims, f"fc.{dtype}")
        for dtype in ("float16", "float32", "float64")
    ]
    arrays += [
        LogArray("full", (ramp + 0x3F80).astype(np.uint16), dims, "fc.bfloat16", "bfloat16"),
        LogArray("gram", (ramp[:, :2] * 2.0), ("example", "other_example"), "a/b:c%d é"),
        LogArray("ok", ramp[0] % 2 == 0, ("flag",)),
        LogArray("ragged", np.arange(step, dtype=np.int8), ("element",)),
        LogArray("loss", np.array(1 / (1 + step)), ()),
        LogArray("empty", np.zeros((2, 0), np.int64), ("example", "none")),
    ]
    if step != 1:
        arrays.append(LogArray("sometimes", np.array([step], np.uint32), ("element",)))
    return arrays


def write_run(path: Path) -> None:
    """Write two records into a segment and one into a journal."""
    path.mkdir()
    write_run_file(path, {"name": "golden", "config": {"seed": 0}})
    about = {"world_size": 1, "resume_step": 0}
    writer = LogWriter(path, about=about, seal=False, segment_bytes=2000)
    table = [
        LogArray("id", np.array([10, 20]), ("example",)),
        LogArray("target", np.array([1, 0], np.int8), ("example",)),
    ]
    writer.add_table("probe", table, {"num_examples": 2})
    writer.note("coverage", 0, measure="m", parameters={"fc.weight": "exact"})
    for step in range(3):
        assert writer.append("activations", "probe", step, arrays_of(step), {"epoch": step})
    writer.close()
    first, *_ = journals_of(path)
    assert seal_journal(first) is not None


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fix what differs from run to run: the token, the time and the process."""
    monkeypatch.setattr(secrets, "randbits", lambda bits: 0x0123456789ABCDEF)
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    monkeypatch.setattr(os, "getpid", lambda: 4321)


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


@pytest.mark.usefixtures("fixed")
def test_the_same_run_is_written_as_the_same_bytes(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    golden = GOLDEN / LAYOUTS[-1]
    if request.config.getoption("--write-golden"):
        golden.parent.mkdir(exist_ok=True)
        write_run(golden)
    write_run(tmp_path / "run")
    expected, written = contents(golden), contents(tmp_path / "run")
    assert list(written) == list(expected)
    for name in written:
        if not name.endswith(".h5") or h5py.version.hdf5_version == HDF5_VERSION:
            assert written[name] == expected[name], name


def test_the_last_layout_is_of_the_present_version() -> None:
    assert LAYOUTS[-1].startswith(f"version{FORMAT_VERSION}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_of_every_layout_are_read(layout: str) -> None:
    path = GOLDEN / layout
    assert verify_run(path) == []
    run = open_run(path)
    assert (run.state, run.steps()) == ("finished", [0, 1, 2])
    assert len(list(path.rglob("*.h5"))) == len(list(path.rglob("*.journal"))) == 1
    for step, read in read_records(run).items():
        assert_holds(arrays_of(step), read)
        assert run.activations.attributes(step) == {"epoch": step}
    assert run.activations.table("id").tolist() == [10, 20]
    assert run.activations.targets is not None
    assert run.activations.targets.tolist() == [1, 0]
    assert [note["event"] for note in run.notes] == ["coverage"]
    assert run.info["config"] == {"seed": 0}
