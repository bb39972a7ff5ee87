"""Errors at every call that reaches the disk: they cost what is counted, and nothing else.

A short training is recorded over several journals while calls fail, each in turn: once, several
times or for ever. `faults` has the disk that fails.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.format.files import writer_folder
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run
from sonde.log.writing.appender import Sync
from tests.limits import LIMIT_SECONDS

from .conftest import assert_intact, new_run, write_records
from .doomed import record_of, time_limit
from .faults import Disk, Fault, each_fault
from .files import frames_of, journals_of, segments_of

SYNCS: tuple[Sync, ...] = get_args(Sync)
NUM_RECORDS = 10
REPAIRED_AT = 8
IDS = np.arange(5)

known_record = cache(record_of)


@dataclass
class Recorded:
    """What happened while a training was recorded.

    Attributes:
        committed: The records that were announced as committed.
        problem: What the writer said in the end.
        worked_again: Whether nothing failed any more when the last record was appended.
        complaints: What should not have happened.
    """

    committed: set[int] = field(default_factory=set)
    problem: str | None = None
    worked_again: bool = False
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sonde.log.writing.appender._RETRIES_SECONDS", (0.0, 0.0, 0.0))


def stored(run_path: Path) -> set[int]:
    frames = itertools.chain.from_iterable(map(frames_of, journals_of(run_path)))
    return {frame.step for frame in frames if frame.kind == "record"}


def record(run_path: Path, sync: Sync, disk: Disk, *, is_repaired: bool = False) -> Recorded:
    """Record a training; where it is repaired, the disk works again from a late record on.

    Raises:
        OSError: If the writer cannot start.
    """
    writer = LogWriter(run_path, sync=sync, segment_bytes=2_000, seal=False)
    done = Recorded()
    writer.add_table("probe", [LogArray("id", IDS, ("example",))])
    for number in range(NUM_RECORDS):
        if number == REPAIRED_AT and is_repaired:
            disk.repair()
        if number == 3:
            writer.note("odd", number, value=1)
        works, num_failed = disk.works, disk.failed.total()
        if not writer.append("activations", "probe", number, known_record(number)):
            done.complaints.append(f"record {number} was refused")
        if not writer.flush(LIMIT_SECONDS):
            done.complaints.append(f"record {number} was not flushed")
        with disk.unwatched():
            is_stored = number in stored(run_path)
        is_announced = writer.problem is None or num_failed == disk.failed.total()
        if is_announced and is_stored:
            done.committed.add(number)
        elif works or writer.problem is None:
            done.complaints.append(f"record {number} is not there: {writer.problem}")
        if number % 4 == 3 and sync != "none":
            writer.sync()
    done.worked_again = disk.works
    writer.close()
    done.problem = writer.problem
    return done


def complaints(run_path: Path, disk: Disk, done: Recorded) -> Iterator[str]:
    """Yield what is wrong with the log of a training."""
    yield from done.complaints
    run = open_run(run_path)
    found = stored(run_path)
    assert_intact(run_path, found)
    yield from (f"committed record {number} is gone" for number in sorted(done.committed - found))
    gaps = [note for note in run.notes if note["event"] == "gap"]
    num_lost = NUM_RECORDS - len(found)
    is_whole = num_lost == 0 and run.state == "finished" and not gaps and has_notes(run)
    # A write that did all but failed counts as lost; an unforced or late file may lack something.
    may_be_whole = is_whole and not any(disk.failed[call] for call in ("pwritev", "fsync", "close"))
    if done.problem is None and (not is_whole or disk.failed["fsync"]):
        yield f"no problem, but {num_lost} records are lost, {run.notes}, {run.state}"
    if done.problem is not None and may_be_whole:
        yield f"nothing is lost, but: {done.problem}"
    if num_lost and disk.failed.total() == 1:
        yield "one error cost records, though a second try would have stored them"
    if any(not damage.is_tail for damage in run.damage):
        yield f"damage: {run.damage}"
    if not done.worked_again:
        return
    if sum(gap["num_records"] for gap in gaps) != num_lost:
        yield f"{num_lost} records are lost, but the gaps are {gaps}"
    if run.state != "finished" or run.activations.table("id").tolist() != IDS.tolist():
        yield f"the run is {run.state}, or its table is not what it was"
    # Where neither the write nor the cutting back succeeds, the torn frame may stay behind.
    if run.damage and not disk.failed["ftruncate"]:
        yield f"damage: {run.damage}"


def has_notes(run: Run) -> bool:
    return [note["event"] for note in run.notes] == ["odd"]


def recorded_at(
    root: Path, sync: Sync, fault: Fault | None, *, is_repaired: bool = False
) -> tuple[Disk, list[str]]:
    """Record a training on a disk that fails; return it, and what is wrong with the log."""
    run_path = new_run(root / f"seed{len(list(root.iterdir()))}")
    with pytest.MonkeyPatch.context() as monkeypatch, time_limit(LIMIT_SECONDS):
        disk = Disk(fault, monkeypatch)
        try:
            done = record(run_path, sync, disk, is_repaired=is_repaired)
        except OSError:
            # Here the caller wants to know, and to try again; all may fail but what cleans up.
            cleaned = not disk.failed["unlink"] and not disk.failed["close"]
            is_left = writer_folder(run_path, 0, 0).exists()
            return disk, ["the writer that failed left its folder"] if is_left and cleaned else []
    return disk, list(complaints(run_path, disk, done))


def num_calls(root: Path, sync: Sync) -> int:
    disk, wrong = recorded_at(root, sync, None)
    assert wrong == []
    expected = {"pwritev", "fsync", "fstat", "open", "close", "mkdir"} - (
        {"fsync"} if sync == "none" else set()
    )
    assert set(disk.made) == expected
    return disk.made.total()


def drawn(faults: Iterable[Fault], number: int, *, is_full: bool) -> list[Fault]:
    """Return all faults, or some drawn every day alike."""
    every = list(faults)
    return every if is_full else random.Random(repr(every[0])).sample(every, number)


@pytest.mark.parametrize("times", [1, 7, None])
@pytest.mark.parametrize("sync", SYNCS)
def test_errors_cost_only_what_is_counted(
    memory_path: Path, sync: Sync, times: int | None, is_full: bool, counts: Counter[str]
) -> None:
    faults = each_fault(num_calls(memory_path, sync), times)
    tried = drawn(faults, 30, is_full=is_full)
    num_failed = 0
    for fault in tried:
        disk, wrong = recorded_at(memory_path, sync, fault)
        assert wrong == [], fault
        # What is forced together, and so how many calls are made, depends on how quick the disk is.
        assert bool(disk.failed) == (fault.number < disk.made.total())
        num_failed += bool(disk.failed)
    assert num_failed
    counts[f"errors: {times or 'all'} from one call on"] += num_failed


@pytest.mark.parametrize("sync", SYNCS)
def test_records_are_stored_again_once_a_long_trouble_is_over(
    memory_path: Path, sync: Sync, is_full: bool, counts: Counter[str]
) -> None:
    faults = each_fault(num_calls(memory_path, sync) * 2 // 3, None)
    for fault in drawn(faults, 20, is_full=is_full):
        _, wrong = recorded_at(memory_path, sync, fault, is_repaired=True)
        assert wrong == [], fault
        counts["errors: all from one call on, until it is repaired"] += 1


@pytest.mark.parametrize("call", ["pwritev", "fsync", "fstat", "open", "close"])
def test_calls_of_one_kind_may_fail_while_the_others_work(
    memory_path: Path, call: str, is_full: bool, counts: Counter[str]
) -> None:
    made = recorded_at(memory_path, "record", None)[0].made[call]
    kinds = itertools.product(range(made), (1, 7, None), (0.0, 0.5, 1.0), (False, True))
    drawn_kinds = list(kinds) if is_full else random.Random(call).sample(list(kinds), 10)
    for number, times, written, is_repaired in drawn_kinds:
        fault = Fault(number, times, written=written, only=call)
        _, wrong = recorded_at(memory_path, "record", fault, is_repaired=is_repaired)
        assert wrong == [], fault
        counts["errors: at one kind of call"] += 1


@pytest.mark.parametrize("fraction", [0.0, 0.5], ids=["one byte", "half"])
def test_short_writes_cost_nothing(
    memory_path: Path, fraction: float, is_full: bool, counts: Counter[str]
) -> None:
    made = recorded_at(memory_path, "seal", None)[0].made["pwritev"]
    faults = [
        Fault(number, times, None, fraction, "pwritev")
        for number, times in itertools.product(range(made), (1, 7, 100))
    ]
    for fault in drawn(faults, 15, is_full=is_full):
        disk, wrong = recorded_at(memory_path, "seal", fault)
        assert wrong == [], fault
        assert disk.made["pwritev"] > made, fault
        counts["errors: short writes"] += 1


MEMORY = ["journal.encode_header", "journal.write_at", "writer.np.empty"]


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, place: str, turn: int) -> None:
    """Let one call of a function raise MemoryError."""
    turns = itertools.count()
    module, *names = place.split(".")
    home: Any = import_module(f"sonde.log.writing.{module}")  # a module
    original = getattr(np if names[0] == "np" else home, names[-1])

    def call(*args: Any, **kwargs: Any) -> Any:  # whatever the original takes and returns
        if next(turns) == turn:
            raise MemoryError
        return original(*args, **kwargs)

    if names[0] == "np":
        monkeypatch.setattr(home, "np", SimpleNamespace(**{**vars(np), names[-1]: call}))
    else:
        monkeypatch.setattr(home, names[-1], call)


@pytest.mark.parametrize("place", MEMORY)
def test_lack_of_memory_costs_only_what_is_counted(
    memory_path: Path, place: str, is_full: bool, counts: Counter[str]
) -> None:
    num_lost = []
    # The first calls in any case: buffers are used again, so that there may be few.
    for turn in range(20) if is_full else {0, 1, *random.Random(place).sample(range(20), 6)}:
        run_path = new_run(memory_path / f"seed{turn}")
        writer = LogWriter(run_path, segment_bytes=2_000, seal=False)
        writer.add_table("probe", [LogArray("id", IDS, ("example",))])
        writer.flush()
        with pytest.MonkeyPatch.context() as monkeypatch, time_limit(LIMIT_SECONDS):
            run_out_of_memory(monkeypatch, place, turn)
            run_out_of_memory(monkeypatch, "appender.pack", 0)  # That is the first gap.
            for number in range(NUM_RECORDS):
                writer.append("activations", "probe", number, known_record(number))
                assert writer.flush(LIMIT_SECONDS)
        assert writer.append("activations", "probe", NUM_RECORDS, known_record(NUM_RECORDS))
        writer.close()
        found = stored(run_path)
        run = assert_intact(run_path, found)
        num_lost.append(NUM_RECORDS + 1 - len(found))
        gaps = [note for note in run.notes if note["event"] == "gap"]
        assert sum(gap["num_records"] for gap in gaps) == num_lost[-1], turn
        assert (writer.problem is not None) == bool(num_lost[-1]), turn
        assert (run.state, run.damage) == ("finished", [])
    assert set(num_lost) >= {0, 2}  # What found no memory, and what was to follow its gap.
    counts["errors: no memory"] += sum(map(bool, num_lost))


def sealed_at(root: Path, whole: Path, fault: Fault | None) -> Disk:
    """Seal a copy of a run on a disk that fails, and again once it works; check both."""
    run_path = root / f"seed{len(list(root.iterdir()))}"
    shutil.copytree(whole, run_path)
    with pytest.MonkeyPatch.context() as monkeypatch, time_limit(LIMIT_SECONDS):
        disk = Disk(fault, monkeypatch)
        with suppress(OSError):
            seal_run(run_path)
    run = assert_intact(run_path, range(4))
    assert (run.state, run.damage) == ("finished", [])
    seal_run(run_path)
    assert journals_of(run_path) == []
    assert len(segments_of(run_path)) == 3
    assert list(run_path.rglob("*.tmp")) == []
    assert_intact(run_path, range(4))
    return disk


@pytest.mark.parametrize("times", [1, 7, None])
def test_errors_while_sealing_cost_nothing(
    memory_path: Path, times: int | None, is_full: bool, counts: Counter[str]
) -> None:
    whole = new_run(memory_path / "whole")
    write_records(whole, range(4), segment_bytes=1300)
    made = sealed_at(memory_path, whole, None).made
    assert set(made) >= {"pwritev", "fsync", "replace", "unlink", "h5py __init__", "h5py close"}
    for fault in drawn(each_fault(made.total(), times), 20, is_full=is_full):
        assert sealed_at(memory_path, whole, fault).failed, fault
        counts["errors: while sealing"] += 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_one_error_at_any_call_of_the_sealer_costs_nothing(
    memory_path: Path, error: int, counts: Counter[str]
) -> None:
    whole = new_run(memory_path / "whole")
    write_records(whole, range(4), segment_bytes=1300)
    num_calls = sealed_at(memory_path, whole, None).made.total()
    for number in range(0, num_calls, 1 + num_calls // 150):
        assert sealed_at(memory_path, whole, Fault(number, 1, error)).failed
        counts["errors: one call of the sealer"] += 1


def test_a_write_that_is_lost_without_an_error_costs_no_record(
    memory_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    whole = new_run(memory_path / "whole")
    write_records(whole, range(4), segment_bytes=1300)
    num_writes = sealed_at(memory_path, whole, None).made["pwritev"]
    num_found = 0
    for number in range(0, num_writes, 1 if is_full else 3):
        run_path = memory_path / f"lost{number}"
        shutil.copytree(whole, run_path)
        with pytest.MonkeyPatch.context() as monkeypatch:
            lose_write(monkeypatch, number)
            with suppress(OSError, RuntimeError):
                seal_run(run_path)
        num_found += bool(journals_of(run_path))
        assert_intact(run_path, range(4))
        assert verify_run(run_path) == []
        counts["writes of the sealer that were lost"] += 1
    assert num_found  # Those that held records, or what is said of them.


def lose_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let one write report success and do nothing but set the file's size."""
    numbers = itertools.count()
    write = os.pwritev

    def lossy(fd: int, buffers: list[memoryview], offset: int) -> int:
        if next(numbers) != number:
            return write(fd, buffers, offset)
        num_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        os.truncate(fd, max(os.fstat(fd).st_size, offset + num_bytes))
        return num_bytes

    monkeypatch.setattr(os, "pwritev", lossy)
