"""Damaged files: nothing wrong is read of them, nothing crashes or hangs, and all is reported.

Thousands of mutations of runs of many shapes, each read in a process of its own with limits of time
and memory (`damaged.py` says how); and what single kinds of damage cost, by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonde.exceptions import FormatError
from sonde.log import LogArray, LogWriter, open_run
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run

from .conftest import assert_intact, new_run, write_one, write_records
from .files import frame_bounds, frames_of, journal_of, journals_of, overwrite, segments_of

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
KINDS = [(suffix, family) for suffix in (".journal", ".h5") for family in ("flips", "splices")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0][1:]} {kind[1]}")
def outcomes(
    request: pytest.FixtureRequest, is_full: bool, counts: Counter[str]
) -> list[dict[str, Any]]:
    """Damage runs over and over; return what became of each."""
    suffix, family = request.param
    size, every = (1000, 1) if is_full else (150, 6)
    with tempfile.TemporaryDirectory(dir=MEMORY) as root:
        command = [
            sys.executable,
            "-m",
            "tests.log.damaged",
            root,
            suffix,
            family,
            str(size),
            str(every),
        ]
        printed = subprocess.run(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
    found = [json.loads(line) for line in printed.splitlines()]
    assert len(found) == size
    counts[f"damaged {'journals' if suffix == '.journal' else 'segments'}: {family}"] += size
    return found


def wrong(outcomes: list[dict[str, Any]], what: str) -> list[str]:
    return [f"{outcome['number']} {outcome['what']}: {outcome[what]}" for outcome in outcomes]


def test_nothing_wrong_is_read_and_nothing_crashes_or_hangs(outcomes: list[dict[str, Any]]) -> None:
    assert wrong([outcome for outcome in outcomes if outcome["faults"]], "faults") == []


def test_all_damage_is_reported(outcomes: list[dict[str, Any]]) -> None:
    # The files that are left are whole where the last one of an attempt is gone, or the last
    # journal was cut between two frames: so it looks where a process was killed.
    silent = [o for o in outcomes if not o["is_reported"] and not o["looks_killed"]]
    assert wrong(silent, "state") == []
    assert any(outcome["is_reported"] for outcome in outcomes)


def test_a_run_that_looks_killed_is_interrupted(outcomes: list[dict[str, Any]]) -> None:
    # An earlier attempt was killed and resumed anyway, for all one can tell.
    cut = [o for o in outcomes if o["looks_killed"] and o["is_last_attempt"]]
    assert {outcome["state"] for outcome in cut} <= {"interrupted"}
    assert wrong([outcome for outcome in cut if outcome["damage"]], "damage") == []


def test_damage_names_the_file_it_is_in(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        named = {damage["path"] for damage in outcome["damage"]}
        # A file that is gone, or cut between two frames, is missing before the next one.
        near = {*outcome["files"], *outcome["near_files"]}
        assert named <= near, outcome["what"]
        assert named & set(outcome["files"]) or len(named) <= 1, outcome["what"]


def test_a_flip_costs_no_more_than_the_record_it_is_in(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        is_in_journal = outcome["files"][0].endswith(".journal")
        if outcome["position"] is None or not (is_in_journal or outcome["unit"]):
            continue  # What lies around the arrays of a segment describes all of them.
        assert len(outcome["lost"]) + len(outcome["unread"]) <= 1, outcome["what"]
        (damage,) = outcome["damage"]
        end = damage["offset"] + damage["num_bytes"]
        assert damage["offset"] <= outcome["position"] < end, outcome["what"]
        for text in (damage["reason"], *outcome["unread"]):
            assert (outcome["unit"] or "record") in text, outcome["what"]


@pytest.mark.parametrize("suffix", [".journal", ".h5"])
def test_files_with_swapped_names_read_the_same_and_are_reported(
    run_path: Path, suffix: str
) -> None:
    write_records(run_path, range(9), segment_bytes=3000)
    if suffix == ".h5":
        seal_run(run_path)
    swap(*files_of(run_path)[:2])
    for _ in range(2):
        assert [damage.reason for damage in assert_intact(run_path, range(9)).damage] == [
            "it holds frames 7 to 13, others than its name states",
            "it holds frames 0 to 6, others than its name states",
        ]
        seal_run(run_path)


def test_order_of_swapped_files_does_not_decide_what_a_writer_said_last(run_path: Path) -> None:
    write_records(run_path, range(5))
    writer = LogWriter(run_path, attempt=1, segment_bytes=1, seal=False)
    for value in (1, 2):
        writer.resume_at(3 - value)
        writer.add_table("probe", [LogArray("id", np.full(5, value), ("example",))])
        writer.append("other", "probe", 9, [])
    writer.close()
    swap(*files_of(run_path)[1::2])
    for _ in range(2):
        run = open_run(run_path)
        assert run.attempts[1]["resume_step"] == 1
        assert run.steps() == [0, 9]
        assert run.other.table("id").tolist() == [2] * 5
        seal_run(run_path)


@pytest.mark.parametrize("is_sealed", [False, True])
def test_file_of_another_attempt_is_not_read(run_path: Path, is_sealed: bool) -> None:
    write_records(run_path, range(5))
    write_records(run_path, range(3, 7), resume_step=3)
    if is_sealed:
        seal_run(run_path)
    first, second = files_of(run_path)
    first.replace(run_path / "kept")
    second.replace(first)
    run = open_run(run_path)
    assert run.steps() == []
    (damage,) = run.damage
    assert damage.path == f"attempt0-rank0/{first.name}"
    assert damage.reason == "it belongs into another folder: it is of attempt 1, rank 0"


@pytest.mark.parametrize(("num_files", "num_refused"), [(3, 1), (2, 2)])
def test_file_of_another_process_is_not_read(
    run_path: Path, tmp_path: Path, num_files: int, num_refused: int
) -> None:
    other = new_run(tmp_path / "other")
    for path in (run_path, other):
        write_records(path, range(4 * num_files), segment_bytes=3000)
        for surplus in journals_of(path)[num_files:]:
            surplus.unlink()
    foreign = frames_of(journals_of(run_path)[1])
    lost = {frame.step for frame in foreign if frame.kind == "record"}
    everything = set(open_run(run_path).steps())
    for path in (run_path, other):
        seal_run(path, before=1)
    files_of(other)[1].replace(files_of(run_path)[1])
    # Of two files that are at odds nobody can tell which one is right.
    run = assert_intact(run_path, everything - lost if num_refused == 1 else [])
    assert {damage.reason for damage in run.damage} == {
        "it was written by another process than the other files of the folder"
    }
    assert len(run.damage) == num_refused


def test_damaged_table_is_not_sealed_as_a_whole_one(run_path: Path) -> None:
    write_records(run_path, range(3))
    journal = journal_of(run_path)
    content = bytearray(journal.read_bytes())
    content[frame_bounds(journal)[1][1] - 8] ^= 1
    journal.write_bytes(content)
    # As the sealer of a writer that lives does it.
    seal_run(run_path, before=99)
    (damage,) = assert_intact(run_path, range(3)).damage
    assert damage.reason == "the payload of table 1 (probe) does not match its checksum"
    assert open_run(run_path).activations.ids is None


def test_intact_records_behind_a_misplaced_one_are_sealed(run_path: Path) -> None:
    write_records(run_path, range(5))
    journal = journal_of(run_path)
    content = journal.read_bytes()
    bounds = frame_bounds(journal)
    # A later record, without its end, stands before all others.
    start, end = bounds[-2]
    journal.write_bytes(content[:40] + content[start : end - 40] + content[40:])
    before = assert_intact(run_path, range(5))
    seal_run(run_path, before=99)
    assert assert_intact(run_path, range(5)).damage == before.damage


def test_table_of_a_journal_that_cannot_be_sealed_does_not_replace_a_newer_one(
    run_path: Path,
) -> None:
    writer = LogWriter(run_path, segment_bytes=2000, seal=False)
    for value, dtypes in ((1, ("f2", "f4")), (2, ("f4", "f4"))):
        writer.add_table("s", [LogArray("id", np.full(3, value), ("example",))])
        for step, dtype in enumerate(dtypes):
            array = LogArray("a", np.zeros(300, dtype), ("n",))
            writer.append("m", "s", 2 * value + step, [array])
    writer.close()
    with pytest.raises(FormatError, match="is stored with dtypes float16, float32"):
        seal_run(run_path)
    assert [path.suffix for path in files_of(run_path)] == [".journal", ".h5", ".h5"]
    assert open_run(run_path).m.table("id").tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (2, "a record header does not match its checksum, before record 3 (activations, step 1)"),
        (1, "a record header does not match its checksum, before record 2 (activations, step 0)"),
        (-1, "a record header does not match its checksum, after record 4 (activations, step 2)"),
    ],
)
def test_damaged_header_is_placed_by_the_records_around_it(
    run_path: Path, frame: int, reason: str
) -> None:
    write_records(run_path, range(3))
    journal = journal_of(run_path)
    content = bytearray(journal.read_bytes())
    content[frame_bounds(journal)[frame][0] + 60] ^= 1
    journal.write_bytes(content)
    assert [damage.reason for damage in verify_run(run_path)] == [reason]


@pytest.mark.parametrize("offset", [8, 12, 24, 28])
@pytest.mark.parametrize("value", [1, 2**16, 2**31, 2**32 - 8])
def test_no_more_is_read_than_there_is_whatever_a_length_says(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, value: int
) -> None:
    write_records(run_path, range(4))
    journal = journal_of(run_path)
    content = bytearray(journal.read_bytes())
    struct.pack_into("<I", content, frame_bounds(journal)[3][0] + offset, value)
    journal.write_bytes(content)
    pread = os.pread

    def read_little(fd: int, count: int, position: int) -> bytes:
        # A search takes pieces of this size.
        assert count <= max(len(content), 4 << 20)
        return pread(fd, count, position)

    monkeypatch.setattr(os, "pread", read_little)
    assert_intact(run_path, [0, 2, 3])


def test_damaged_description_of_a_run_is_refused(run_path: Path) -> None:
    write_one(run_path, [])
    path = run_path / "run.json"
    content = path.read_bytes()
    info = open_run(run_path).info
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            overwrite(path, bytes(flipped), 8 * position + bit)
            with contextlib.suppress(FormatError):
                assert open_run(run_path).info == info


def files_of(path: Path) -> list[Path]:
    """Return the segments and journals of a run, in order."""
    return sorted(segments_of(path) + journals_of(path))


def swap(a: Path, b: Path) -> None:
    """Exchange two files of a folder, names of segments aside."""
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
