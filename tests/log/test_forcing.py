"""Forcing to the disk: when it is done, and what is said when it cannot be."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sonde.log import LogWriter

from .conftest import assert_intact
from .doomed import PWritev, append_record
from .files import journals_of


@pytest.mark.parametrize("sync", ["seal", "record"])
def test_sync_forces_every_journal_to_the_disk(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, sync: Any
) -> None:
    unforced: set[int] = set()
    write: PWritev = os.pwritev
    force = os.fsync

    def pwritev(fd: int, buffers: Sequence[Any], offset: int) -> int:
        unforced.add(os.fstat(fd).st_ino)
        return write(fd, buffers, offset)

    def fsync(fd: int) -> None:
        unforced.discard(os.fstat(fd).st_ino)
        force(fd)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fsync", fsync)
    writer = LogWriter(run_path, sync=sync, segment_bytes=2000, seal=False)
    for number in range(10):
        append_record(writer, number)
    writer.sync()
    assert len(journals_of(run_path)) > 2
    assert unforced == set()
    writer.close()


def test_the_step_an_attempt_resumes_at_is_forced_to_the_disk(
    writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert append_record(writer, 0)
    writer.flush()
    assert synced == []
    writer.resume_at(5)
    assert synced != []


def test_sync_of_a_run_that_was_moved_does_not_pretend(
    run_path: Path, writer: LogWriter, tmp_path: Path
) -> None:
    append_record(writer, 0)
    run_path.rename(tmp_path / "moved")
    writer.sync()
    assert writer.problem is not None
    assert "was moved or deleted: what is recorded is safe from the end of the" in writer.problem


def test_sync_none_never_forces_anything(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    writer = LogWriter(run_path, sync="none", segment_bytes=2000, seal=False)
    for number in range(10):
        append_record(writer, number)
    writer.close()
    assert calls == []


def test_failed_fsync_is_a_problem_not_an_exception(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    append_record(writer, 0)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        writer.sync()
    assert writer.problem is not None
    assert "could not be forced to the disk: [Errno 5] Input/output error" in writer.problem
    assert_intact(run_path, [0])
