"""The queue before the journal: what happens where room, memory or time is short."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonde.log import LogArray, LogWriter, open_run
from tests.limits import LIMIT_SECONDS

from .conftest import assert_intact
from .doomed import PWritev, append_record


class Gate:
    """Holds the appender back in `os.pwritev` until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write: PWritev = os.pwritev
        self._opening = threading.Event()
        self.reached = threading.Event()
        monkeypatch.setattr(os, "pwritev", self._pwritev)

    def _pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self.reached.set()
        assert self._opening.wait(LIMIT_SECONDS)
        return self._write(fd, buffers, offset)

    def open(self) -> None:
        self._opening.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Gate]]:
    gates: list[Gate] = []

    def close() -> Gate:
        gates.append(Gate(monkeypatch))
        return gates[-1]

    yield close
    for made in gates:
        made.open()


def test_array_may_change_as_soon_as_append_returns(
    run_path: Path, writer: LogWriter, gate: Callable[[], Gate]
) -> None:
    held = gate()
    values = np.arange(4)
    writer.append("activations", "probe", 0, [LogArray("a", values, ("n",))])
    values[:] = -1
    held.open()
    writer.close()
    assert open_run(run_path).activations.array("a").tolist() == [0, 1, 2, 3]


def test_record_that_finds_no_room_is_dropped_and_counted(
    run_path: Path, gate: Callable[[], Gate]
) -> None:
    writer = LogWriter(run_path, queue_bytes=1000, wait_seconds=0.01, seal=False)
    held = gate()
    array = [LogArray("a", np.zeros(75), ("n",))]
    assert writer.append("m", "s", 10, array)
    assert not writer.append("m", "s", 20, array)
    assert not writer.append("m", "s", 30, array)
    assert writer.problem is not None
    assert "the disk did not keep up for 0.01 seconds; raise `queue_bytes`" in writer.problem
    held.open()
    writer.flush()
    assert writer.append("m", "s", 40, array)
    writer.close()
    run = open_run(run_path)
    assert run.steps() == [10, 40]
    assert run.notes == [
        {
            "event": "gap", "rank": 0,
            "step": 20, "last_step": 30, "num_records": 2, "num_notes": 0,
            "num_bytes": 1200, "reasons": ["the queue was full"],
        }
    ]  # fmt: skip


def test_record_that_finds_no_memory_is_dropped_and_counted(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LogWriter, num_bytes: int) -> None:
        raise MemoryError

    with monkeypatch.context() as full:
        full.setattr(LogWriter, "_take_buffer", refuse)
        assert not writer.append("m", "s", 5, [LogArray("a", np.zeros(75), ("n",))])
    assert writer.problem == "records are dropped: there is no memory for 600 bytes"
    append_record(writer, 6)
    writer.close()
    (note,) = assert_intact(run_path, [6]).notes
    assert (note["num_records"], note["reasons"]) == (1, ["the memory was full"])


@pytest.mark.parametrize("place", ["lay_out", "encode_index", "fill_payload"])
def test_lack_of_memory_does_not_reach_the_training(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"sonde.log.writing.writer.{place}", fail)
        assert not append_record(writer, 0)
    assert append_record(writer, 1)
    writer.close()
    (note,) = assert_intact(run_path, [1]).notes
    assert (note["num_records"], note["reasons"]) == (1, ["the memory was full"])


def test_blocking_append_waits_for_room(run_path: Path, gate: Callable[[], Gate]) -> None:
    writer = LogWriter(run_path, queue_bytes=1, wait_seconds=0.01, block=True, seal=False)
    held = gate()
    append_record(writer, 0)
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(append_record(writer, 1)))
    thread.start()
    thread.join(0.1)
    assert results == []
    held.open()
    thread.join(LIMIT_SECONDS)
    assert results == [True]
    writer.close()
    assert_intact(run_path, range(2))


def test_empty_queue_takes_a_record_larger_than_its_bound(run_path: Path) -> None:
    writer = LogWriter(run_path, queue_bytes=1, wait_seconds=0.01, seal=False)
    for number in range(3):
        assert append_record(writer, number)
        writer.flush()
    writer.close()
    assert_intact(run_path, range(3))


def test_flush_gives_up_after_its_timeout(writer: LogWriter, gate: Callable[[], Gate]) -> None:
    held = gate()
    append_record(writer, 0)
    assert not writer.flush(timeout=0.01)
    held.open()
    assert writer.flush(timeout=LIMIT_SECONDS)


def test_close_gives_up_after_its_timeout(run_path: Path, gate: Callable[[], Gate]) -> None:
    writer = LogWriter(run_path, seal=False)
    held = gate()
    append_record(writer, 0)
    writer.close(timeout=0.01)
    held.open()
    assert writer.flush(timeout=LIMIT_SECONDS)
    assert_intact(run_path, [0])


def test_append_that_waited_while_the_writer_closed_is_refused(
    run_path: Path, gate: Callable[[], Gate]
) -> None:
    writer = LogWriter(run_path, queue_bytes=1, block=True, seal=False)
    held = gate()
    append_record(writer, 0)
    results: list[bool] = []
    waiting = threading.Thread(target=lambda: results.append(append_record(writer, 1)))
    waiting.start()
    held.reached.wait(LIMIT_SECONDS)
    writer.close(timeout=0)
    held.open()
    waiting.join(LIMIT_SECONDS)
    assert results == [False]
    assert writer.flush(timeout=LIMIT_SECONDS)


def test_buffers_that_a_stall_has_left_are_found_by_their_size(
    run_path: Path, gate: Callable[[], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(run_path, seal=False)
    held = gate()
    sizes = [8 * (1 + number % 7) for number in range(700)]
    for size in sizes:
        writer.append("m", "s", 0, [LogArray("a", np.zeros(size), ("n",))])
    held.open()
    assert writer.flush()
    made: list[int] = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda n, dtype: made.append(n) or empty(n, dtype))  # type: ignore[func-returns-value] # append
    for size in sizes[:100]:
        writer.append("m", "s", 1, [LogArray("a", np.zeros(size), ("n",))])
    writer.close()
    assert made == []  # Each record found one, of its own size or little larger.
    assert open_run(run_path).steps() == [0, 1]
