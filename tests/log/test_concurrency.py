"""Reading while a training writes: all that is committed is seen, and nobody waits for readers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sonde.log import LogWriter, open_run
from sonde.log.format.files import journals, segments
from sonde.log.reading import index as reader_module
from sonde.log.reading.segment import Segment
from sonde.log.reading.segment_file import SegmentFile
from sonde.log.sealing.seal import seal_journal, seal_run
from sonde.log.verify import verify_run
from tests.limits import LIMIT_SECONDS

from .conftest import assert_intact, write_records
from .doomed import record_of, time_limit
from .files import frame_bounds, journals_of, segments_of
from .watching import READERS, Announced

NEVER = 10**9
"""So many records are never written."""


@contextmanager
def spawn(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start a process of `watching.py`; it is killed at the end if it has not ended."""
    command = [sys.executable, "-m", "tests.log.watching", *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def drain(process: subprocess.Popen[str]) -> list[str]:
    """Let a process end; return what it printed last."""
    printed, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0
    return printed.split()


def test_three_readers_see_all_that_is_committed_and_nothing_else(
    run_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    num_records = 15_000 if is_full else 500
    with spawn("write", run_path, NEVER) as writer:
        assert next_line(writer) == "0"
        with (
            spawn("refresh", run_path, num_records, 0) as first,
            spawn("reopen", run_path, num_records, 1) as second,
            spawn("open_segments", run_path, num_records, 2) as third,
        ):
            printed = [drain(reader) for reader in (first, second, third)]
        drain(writer)
    assert Announced(run_path).last + 1 >= num_records
    num_records = Announced(run_path).last + 1
    run = assert_intact(run_path, range(num_records))
    assert (run.state, run.damage, journals_of(run_path)) == ("finished", [], [])
    assert 14 < num_records / len(segments_of(run_path)) < 18
    for (state, *reads), kinds in zip(printed, READERS.values(), strict=True):
        assert state == "reading"
        num_reads = {what: int(count) for what, count in (read.split("=") for read in reads)}
        assert set(num_reads) == kinds
        for what, number in num_reads.items():
            counts[f"reads while a training writes: {what}"] += number


def test_a_reader_that_stops_does_not_hold_the_writer_up(
    run_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    rng = random.Random(0)
    with spawn("write", run_path, 1) as writer:
        assert next_line(writer) == "0"
        for reader_kind in READERS:
            with spawn(reader_kind, run_path, NEVER, 0) as reader:
                assert next_line(reader) == "reading"
                for _ in range(40 if is_full else 2):
                    # Wherever it is, with whatever locks and files it has.
                    os.kill(reader.pid, signal.SIGSTOP)
                    before = len(segments_of(run_path))
                    with time_limit(LIMIT_SECONDS):
                        while len(segments_of(run_path)) < before + 2:
                            assert next_line(writer).isdecimal()
                    os.kill(reader.pid, signal.SIGCONT)
                    for _ in range(rng.randrange(1, 30)):
                        assert next_line(writer).isdecimal()
                    assert reader.poll() is None
                    counts["readers stopped while a training writes"] += 1
        drain(writer)
    assert open_run(run_path).damage == []


def test_a_reader_holds_no_lock_of_a_journal_at_any_of_its_calls(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    writer = LogWriter(run_path, seal=False, segment_bytes=3000)
    for number in range(12):
        writer.append("activations", "probe", number, record_of(number))
    writer.flush()
    seal_run(run_path, before=1)
    listed = journals_of(run_path)
    looks = []
    os_open, os_pread = os.open, os.pread

    def look() -> None:
        for journal in listed:
            fd = os_open(journal, os.O_RDONLY)
            # As a sealer does it, but without waiting.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(fd)
        looks.append(len(listed))

    def open_and_look(path: Any, flags: int, mode: int = 0o777) -> int:  # any path os.open takes
        fd = os_open(path, flags, mode)
        look()
        return fd

    def read_and_look(fd: int, count: int, offset: int) -> bytes:
        data = os_pread(fd, count, offset)
        look()
        return data

    with monkeypatch.context() as looking:
        looking.setattr(os, "open", open_and_look)
        looking.setattr(os, "pread", read_and_look)
        run = assert_intact(run_path, range(12))
        run.refresh()
        assert verify_run(run_path) == []
    writer.close()
    assert len(looks) > 100
    assert len(listed) > 1


def test_a_sealer_that_stays_ahead_does_not_keep_a_reader_from_ending(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(run_path, range(40), segment_bytes=2000)
    seal_run(run_path, before=40)
    opened: list[SegmentFile] = []

    def list_then_seal(folder: Path) -> object:
        listed = journals(folder)
        for journal in journals_of(run_path)[:1]:
            seal_journal(journal)
        return listed

    def open_segment(file: SegmentFile) -> Segment:
        opened.append(file)
        return Segment(file)

    monkeypatch.setattr(reader_module, "journals", list_then_seal)
    monkeypatch.setattr(reader_module, "Segment", open_segment)
    assert open_run(run_path).steps() == list(range(40))
    # However often the folder is listed again, what was opened is kept.
    assert len(opened) == len(segments_of(run_path)) > 5


def test_an_earlier_file_that_a_list_lacks_is_not_taken_for_lost(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(run_path, seal=False, segment_bytes=2000)
    for number in range(12):
        writer.append("activations", "probe", number, record_of(number))
    writer.flush()
    seal_run(run_path, before=int(journals_of(run_path)[-1].stem))
    lists = [lambda found: found[:1] + found[2:]]

    def list_without_one(folder: Path) -> object:
        # A folder that changes while it is listed may show a later name and not an earlier one.
        found = segments(folder)
        return lists.pop()(found) if lists else found

    with monkeypatch.context() as changing:
        changing.setattr(reader_module, "segments", list_without_one)
        assert assert_intact(run_path, range(12)).damage == []
    segments_of(run_path)[1].unlink()
    (damage,) = open_run(run_path).damage
    assert damage.reason.endswith("are missing: a file was lost before this one")
    writer.close()


def test_record_whose_header_is_there_first_is_on_its_way(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for number in range(2):
        writer.append("activations", "probe", number, record_of(number))
    writer.flush()
    (journal,) = journals_of(run_path)
    whole = journal.read_bytes()
    _, end = frame_bounds(journal)[-1]
    with journal.open("r+b") as file:
        file.seek(end - 16)
        file.write(bytes(16))
    run = open_run(run_path)
    assert (run.steps(), run.damage) == ([0], [])
    with journal.open("r+b") as file:
        file.write(whole)
    run.refresh()
    assert (run.steps(), run.damage) == ([0, 1], [])
    assert_intact(run_path, range(2))
    writer.close()
