"""Writes that fail: the disk is full, or breaks, or the journal is gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.writing.journal import Journal

from .conftest import assert_intact
from .doomed import PWritev, append_record, record_of
from .files import journal_of, journals_of


def break_writes(
    monkeypatch: pytest.MonkeyPatch, failures: Iterator[bool], error: int, torn_bytes: int = 0
) -> None:
    """Let `os.pwritev` fail wherever `failures` says so, after writing `torn_bytes`."""
    write: PWritev = os.pwritev

    def pwritev(fd: int, buffers: Sequence[Any], offset: int) -> int:
        if next(failures, False):
            write(fd, [b"".join(buffers)[:torn_bytes]], offset)
            raise OSError(error, os.strerror(error))
        return write(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_write_that_fails_once_is_repeated(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    break_writes(monkeypatch, iter([False, True, False]), error, torn_bytes=100)
    for number in range(3):
        assert append_record(writer, number)
    writer.close()
    assert writer.problem is None
    assert assert_intact(run_path, range(3)).notes == []


def test_disk_that_stays_full_drops_records_and_keeps_the_earlier_ones(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_record(writer, 0)
    writer.flush()
    break_writes(monkeypatch, iter(lambda: True, False), errno.ENOSPC, torn_bytes=100)
    for number in range(1, 6):
        assert append_record(writer, number)
    writer.close()
    assert writer.problem is not None
    assert "000000000000.journal: [Errno 28] No space left on device" in writer.problem
    assert "records are dropped until it can, what was recorded before is intact" in writer.problem
    assert assert_intact(run_path, [0]).damage == []


def test_records_are_stored_again_once_the_disk_has_room(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_record(writer, 0)
    writer.flush()
    # Record 1 is tried three times; while nothing works, the others once each.
    break_writes(monkeypatch, iter([True] * 5), errno.ENOSPC, torn_bytes=300)
    for number in range(1, 6):
        append_record(writer, number)
    writer.close()
    run = assert_intact(run_path, [0, 4, 5])
    dropped = sum(array.values.nbytes for n in (1, 2, 3) for array in record_of(n))
    (note,) = run.notes
    reason = f"{journal_of(run_path)}: [Errno 28] No space left on device"
    assert {**note, "num_bytes": 0} == {
        "event": "gap", "rank": 0,
        "step": 1, "last_step": 3, "num_records": 3, "num_notes": 0, "num_bytes": 0,
        "reasons": [reason],
    }  # fmt: skip
    # Each array may have been padded to 8 bytes.
    assert 0 <= note["num_bytes"] - dropped < 8 * 3 * 5
    assert run.damage == []


@pytest.mark.parametrize("seed", range(10))
def test_disk_that_fails_now_and_then_loses_only_what_it_counts(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # Each record takes at least one try, so the disk works again before the last one.
    failures = np.random.default_rng(seed).random(29) < 0.7
    break_writes(monkeypatch, iter(failures.tolist()), errno.EIO, torn_bytes=200)
    for number in range(30):
        append_record(writer, number)
    writer.close()
    run = open_run(run_path)
    stored = run.steps()
    assert_intact(run_path, stored)
    assert len(stored) + sum(note["num_records"] for note in run.notes) == 30
    assert run.damage == []
    assert run.state == "finished"


def test_torn_record_that_cannot_be_cut_off_is_overwritten(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, length: int) -> None:
        raise OSError(errno.EIO, "no truncation either")

    monkeypatch.setattr(os, "ftruncate", refuse)
    break_writes(monkeypatch, iter([False, True, True, False]), errno.ENOSPC, torn_bytes=700)
    for number in range(3):
        append_record(writer, number)
    writer.close()
    assert assert_intact(run_path, range(3)).damage == []


@pytest.mark.parametrize("num_bytes", [1, 7, 64])
def test_short_writes_are_continued(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    write: PWritev = os.pwritev

    def pwritev(fd: int, buffers: Sequence[Any], offset: int) -> int:
        return write(fd, [b"".join(buffers)[:num_bytes]], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    for number in range(3):
        append_record(writer, number)
    writer.close()
    assert writer.problem is None
    assert assert_intact(run_path, range(3)).damage == []


def test_deleted_journal_is_noticed(run_path: Path, writer: LogWriter) -> None:
    append_record(writer, 0)
    writer.flush()
    journal = journal_of(run_path)
    journal.unlink()
    assert append_record(writer, 1)
    writer.flush()
    assert writer.problem is not None
    assert f"{journal} was deleted; its records are lost, a new journal" in writer.problem


def test_records_are_stored_again_after_the_journal_was_deleted(
    run_path: Path, writer: LogWriter
) -> None:
    writer.add_table("probe", [LogArray("id", np.arange(3), ("example",))])
    append_record(writer, 0)
    writer.flush()
    journal_of(run_path).unlink()
    for number in (1, 2):
        append_record(writer, number)
    writer.close()
    run = assert_intact(run_path, [1, 2])
    assert run.activations.table("id").tolist() == [0, 1, 2]
    assert run.state == "finished"


def test_folder_that_takes_no_new_file_keeps_the_journal_growing(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(run_path, segment_bytes=1, seal=False)
    opening = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777) -> int:  # any path os.open takes
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "read-only", str(path))
        return opening(path, flags, mode)

    with monkeypatch.context() as read_only:
        read_only.setattr(os, "open", refuse)
        for number in range(3):
            append_record(writer, number)
        writer.flush()
        assert len(journals_of(run_path)) == 1
    append_record(writer, 3)
    writer.close()
    assert len(journals_of(run_path)) == 2
    assert_intact(run_path, range(4))


def test_failed_start_leaves_nothing_that_blocks_the_next(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        break_writes(full, iter(lambda: True, False), errno.ENOSPC)
        with pytest.raises(OSError, match="No space left on device"):
            LogWriter(run_path, seal=False)
    LogWriter(run_path, seal=False).close()
    assert open_run(run_path).state == "finished"


def test_lost_table_is_written_again(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_writes(monkeypatch, iter([True] * 3), errno.ENOSPC)
    writer.add_table("probe", [LogArray("id", np.arange(3), ("example",))])
    append_record(writer, 0)
    writer.close()
    assert open_run(run_path).activations.table("id").tolist() == [0, 1, 2]


def test_an_unexpected_failure_costs_one_record_and_no_hang(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(run_path, seal=False)
    writer.flush()
    with monkeypatch.context() as broken:
        broken.setattr(Journal, "append", lambda *_: (_ for _ in ()).throw(ValueError("broken")))
        assert append_record(writer, 0)
        assert writer.flush(30)
    assert "ValueError: broken" in (writer.problem or "")
    assert append_record(writer, 1)
    writer.close()
    run = assert_intact(run_path, [1])
    assert [note["num_records"] for note in run.notes if note["event"] == "gap"] == [1]
