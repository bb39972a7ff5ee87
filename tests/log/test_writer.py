"""The writer: what reaches the journal when the disk, the queue or the process is in trouble."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonde.exceptions import InvalidInputError, RunExistsError
from sonde.log import LogArray, LogWriter, open_run
from sonde.log.journal import Journal
from sonde.log.layout import is_being_written, lock_path, unlock

from .conftest import assert_intact, frames_of, journal_of, journals_of
from .doomed import record_of

PWritev = Callable[[int, Sequence[Any], int], int]
GAP = {"event": "gap", "rank": 0}


@pytest.fixture
def writer(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LogWriter]:
    """Write into `run_path`, without pauses between tries and without sealing."""
    monkeypatch.setattr("sonde.log.appender._RETRIES_SECONDS", (0.0, 0.0, 0.0))
    writer = LogWriter(run_path, seal=False)
    yield writer
    monkeypatch.undo()
    writer.close()


class Gate:
    """Holds the appender back in `os.pwritev` until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write: PWritev = os.pwritev
        self._opening = threading.Event()
        self.reached = threading.Event()
        monkeypatch.setattr(os, "pwritev", self._pwritev)

    def _pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self.reached.set()
        assert self._opening.wait(60)
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


def append(writer: LogWriter, number: int) -> bool:
    return writer.append("activations", "probe", number, record_of(number))


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


def test_closed_run_holds_every_record(run_path: Path, writer: LogWriter) -> None:
    for number in range(20):
        assert append(writer, number)
    writer.close()
    assert writer.problem is None
    assert_intact(run_path, range(20))


def test_record_is_readable_once_flushed(run_path: Path, writer: LogWriter) -> None:
    for number in range(5):
        append(writer, number)
        assert writer.flush(60)
        assert_intact(run_path, range(number + 1))


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


@pytest.mark.parametrize(
    "values",
    [
        np.arange(1 << 16, dtype=np.float32).reshape(64, 1024),
        np.arange(1 << 16, dtype=np.float32).reshape(64, 1024).T,
        np.arange((1 << 18) + 1, dtype=np.uint8),
        np.arange(1 << 16, dtype=">f8"),
        np.ones((), np.float64),
        np.empty((0, 3), np.float32),
    ],
    ids=["contiguous", "transposed", "odd", "big-endian", "scalar", "empty"],
)
def test_owned_arrays_are_stored_like_others(
    run_path: Path, writer: LogWriter, values: npt.NDArray[Any]
) -> None:
    for step, is_owned in enumerate((True, False)):
        arrays = [
            LogArray("a", values, ("n",) * values.ndim, f"layer{i}", is_owned=is_owned)
            for i in range(2)
        ]
        assert writer.append("activations", "probe", step, arrays)
    writer.close()
    content = journal_of(run_path).read_bytes()
    owned, copied = [frame for frame in frames_of(journal_of(run_path)) if frame.kind == "record"]
    np.testing.assert_array_equal(owned.checksums, copied.checksums)
    places = [
        slice(f.payload_offset, f.payload_offset + f.layout.num_bytes) for f in (owned, copied)
    ]
    assert content[places[0]] == content[places[1]]
    run = open_run(run_path)
    for layer in ("layer0", "layer1"):
        for step in range(2):
            found = run.activations[layer].array("a", step)
            np.testing.assert_array_equal(found, values)


def test_owned_arrays_are_not_copied(writer: LogWriter) -> None:
    values = np.ones(8 << 20, np.uint8)
    peaks = []
    for is_owned in (True, False):
        tracemalloc.start()
        array = LogArray("a", values, ("n",), is_owned=is_owned)
        writer.append("activations", "probe", int(is_owned), [array])
        writer.flush()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 1 << 20 < values.nbytes < peaks[1]


def test_reused_buffers_do_not_mix_records(run_path: Path, writer: LogWriter) -> None:
    for step, size in enumerate([1000, 600, 1000, 400, 999, 1001]):
        writer.append("m", "s", step, [LogArray("a", np.full(size, step), ("n",))])
        writer.flush()
    log = open_run(run_path).m
    assert [np.unique(log.array("a", step)).tolist() for step in log.steps] == [
        [step] for step in range(6)
    ]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_write_that_fails_once_is_repeated(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    break_writes(monkeypatch, iter([False, True, False]), error, torn_bytes=100)
    for number in range(3):
        assert append(writer, number)
    writer.close()
    assert writer.problem is None
    assert assert_intact(run_path, range(3)).notes == []


def test_disk_that_stays_full_drops_records_and_keeps_the_earlier_ones(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(writer, 0)
    writer.flush()
    break_writes(monkeypatch, iter(lambda: True, False), errno.ENOSPC, torn_bytes=100)
    for number in range(1, 6):
        assert append(writer, number)
    writer.close()
    assert writer.problem is not None
    assert "000000000000.journal: [Errno 28] No space left on device" in writer.problem
    assert "records are dropped until it can, what was recorded before is intact" in writer.problem
    assert assert_intact(run_path, [0]).damage == []


def test_records_are_stored_again_once_the_disk_has_room(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(writer, 0)
    writer.flush()
    # Record 1 is tried three times; while nothing works, the others once each.
    break_writes(monkeypatch, iter([True] * 5), errno.ENOSPC, torn_bytes=300)
    for number in range(1, 6):
        append(writer, number)
    writer.close()
    run = assert_intact(run_path, [0, 4, 5])
    dropped = sum(array.values.nbytes for n in (1, 2, 3) for array in record_of(n))
    (note,) = run.notes
    reason = f"{journal_of(run_path)}: [Errno 28] No space left on device"
    assert {**note, "num_bytes": 0} == {
        **GAP, "step": 1, "last_step": 3, "num_records": 3, "num_notes": 0, "num_bytes": 0,
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
        append(writer, number)
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
        append(writer, number)
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
        append(writer, number)
    writer.close()
    assert writer.problem is None
    assert assert_intact(run_path, range(3)).damage == []


def test_deleted_journal_is_noticed(run_path: Path, writer: LogWriter) -> None:
    append(writer, 0)
    writer.flush()
    journal = journal_of(run_path)
    journal.unlink()
    assert append(writer, 1)
    writer.flush()
    assert writer.problem is not None
    assert f"{journal} was deleted; its records are lost, a new journal" in writer.problem


def test_records_are_stored_again_after_the_journal_was_deleted(
    run_path: Path, writer: LogWriter
) -> None:
    writer.add_table("probe", [LogArray("id", np.arange(3), ("example",))])
    append(writer, 0)
    writer.flush()
    journal_of(run_path).unlink()
    for number in (1, 2):
        append(writer, number)
    writer.close()
    run = assert_intact(run_path, [1, 2])
    assert run.activations.table("id").tolist() == [0, 1, 2]
    assert run.state == "finished"


def test_few_large_records_share_a_segment(run_path: Path) -> None:
    large, small = np.zeros(100 << 18, np.float32), np.zeros(5 << 18, np.float32)
    writer = LogWriter(run_path, seal=False)
    counts = []
    for step, values in enumerate([large] * 3 + [small] * 20):
        writer.append("activations", "probe", step, [LogArray("full", values, ("feature",))])
        writer.flush()
        counts.append(len(journals_of(run_path)))
    writer.close()
    # 100 and 200 MiB of few frames stay open, 300 do not; of many, 80 MiB do not.
    assert counts == [1, 1, 2] + [2] * 14 + [3] * 6


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
            append(writer, number)
        writer.flush()
        assert len(journals_of(run_path)) == 1
    append(writer, 3)
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
    append(writer, 0)
    writer.close()
    assert open_run(run_path).activations.table("id").tolist() == [0, 1, 2]


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
            **GAP, "step": 20, "last_step": 30, "num_records": 2, "num_notes": 0,
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
    append(writer, 6)
    writer.close()
    (note,) = assert_intact(run_path, [6]).notes
    assert (note["num_records"], note["reasons"]) == (1, ["the memory was full"])


def test_blocking_append_waits_for_room(run_path: Path, gate: Callable[[], Gate]) -> None:
    writer = LogWriter(run_path, queue_bytes=1, wait_seconds=0.01, block=True, seal=False)
    held = gate()
    append(writer, 0)
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(append(writer, 1)))
    thread.start()
    thread.join(0.1)
    assert results == []
    held.open()
    thread.join(60)
    assert results == [True]
    writer.close()
    assert_intact(run_path, range(2))


def test_empty_queue_takes_a_record_larger_than_its_bound(run_path: Path) -> None:
    writer = LogWriter(run_path, queue_bytes=1, wait_seconds=0.01, seal=False)
    for number in range(3):
        assert append(writer, number)
        writer.flush()
    writer.close()
    assert_intact(run_path, range(3))


def test_flush_gives_up_after_its_timeout(writer: LogWriter, gate: Callable[[], Gate]) -> None:
    held = gate()
    append(writer, 0)
    assert not writer.flush(timeout=0.01)
    held.open()
    assert writer.flush(timeout=60)


def test_close_gives_up_after_its_timeout(run_path: Path, gate: Callable[[], Gate]) -> None:
    writer = LogWriter(run_path, seal=False)
    held = gate()
    append(writer, 0)
    writer.close(timeout=0.01)
    held.open()
    assert writer.flush(timeout=60)
    assert_intact(run_path, [0])


def test_closed_writer_ignores_everything(run_path: Path, writer: LogWriter) -> None:
    append(writer, 0)
    writer.close("done")
    assert not append(writer, 1)
    writer.note("late", 1)
    writer.add_table("probe", [LogArray("id", np.arange(3), ("example",))])
    writer.sync()
    writer.close()
    assert writer.flush(timeout=0)
    assert [frame.kind for frame in frames_of(journal_of(run_path))] == ["attempt", "record", "end"]
    assert_intact(run_path, [0])


def test_append_that_waited_while_the_writer_closed_is_refused(
    run_path: Path, gate: Callable[[], Gate]
) -> None:
    writer = LogWriter(run_path, queue_bytes=1, block=True, seal=False)
    held = gate()
    append(writer, 0)
    results: list[bool] = []
    waiting = threading.Thread(target=lambda: results.append(append(writer, 1)))
    waiting.start()
    held.reached.wait(60)
    writer.close(timeout=0)
    held.open()
    waiting.join(60)
    assert results == [False]
    assert writer.flush(timeout=60)


def test_end_states_the_reason(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    writer.close("KeyboardInterrupt")
    assert frames_of(journal_of(run_path))[-1].body["reason"] == "KeyboardInterrupt"


def test_every_journal_begins_with_attempt_and_tables(run_path: Path) -> None:
    writer = LogWriter(run_path, about={"world_size": 2}, segment_bytes=1, seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(3), ("example",))])
    for number in range(3):
        append(writer, number)
    writer.close()
    heads = [[frame.kind for frame in frames_of(path)[:2]] for path in journals_of(run_path)]
    assert heads == [["attempt", "table"]] * 4
    sequences = [frame.sequence for path in journals_of(run_path) for frame in frames_of(path)]
    assert sequences == list(range(len(sequences)))


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
        append(writer, number)
    writer.sync()
    assert len(journals_of(run_path)) > 2
    assert unforced == set()
    writer.close()


def test_the_step_an_attempt_resumes_at_is_forced_to_the_disk(
    writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert append(writer, 0)
    writer.flush()
    assert synced == []
    writer.resume_at(5)
    assert synced != []


def test_sync_of_a_run_that_was_moved_does_not_pretend(
    run_path: Path, writer: LogWriter, tmp_path: Path
) -> None:
    append(writer, 0)
    run_path.rename(tmp_path / "moved")
    writer.sync()
    assert writer.problem is not None
    assert "was moved or deleted: what is recorded is safe from the end of the" in writer.problem


@pytest.mark.parametrize("place", ["lay_out", "encode_index", "fill_payload"])
def test_lack_of_memory_does_not_reach_the_training(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"sonde.log.writer.{place}", fail)
        assert not append(writer, 0)
    assert append(writer, 1)
    writer.close()
    (note,) = assert_intact(run_path, [1]).notes
    assert (note["num_records"], note["reasons"]) == (1, ["the memory was full"])


def test_sync_none_never_forces_anything(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    writer = LogWriter(run_path, sync="none", segment_bytes=2000, seal=False)
    for number in range(10):
        append(writer, number)
    writer.close()
    assert calls == []


def test_failed_fsync_is_a_problem_not_an_exception(
    run_path: Path, writer: LogWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    append(writer, 0)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fsync)
        writer.sync()
    assert writer.problem is not None
    assert "could not be forced to the disk: [Errno 5] Input/output error" in writer.problem
    assert_intact(run_path, [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync": "often"}, r"`sync` \(='often'\) must be 'seal', 'record' or 'none'"),
        ({"queue_bytes": 0}, r"`queue_bytes` \(=0\) must be >= 1"),
        ({"segment_bytes": -1}, r"`segment_bytes` \(=-1\) must be >= 1"),
    ],
)
def test_argument_out_of_range_is_refused(
    run_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        LogWriter(run_path, **options)
    assert [path.name for path in run_path.iterdir()] == ["run.json"]


def test_second_writer_of_an_attempt_is_refused(run_path: Path, writer: LogWriter) -> None:
    with pytest.raises(RunExistsError, match="attempt0-rank0 was already written by another rec"):
        LogWriter(run_path)


def test_array_that_cannot_be_stored_leaves_the_writer_usable(
    run_path: Path, writer: LogWriter
) -> None:
    with pytest.raises(InvalidInputError, match="has dtype complex128"):
        writer.append("m", "s", 0, [LogArray("z", np.zeros(1, complex), ("n",))])
    append(writer, 1)
    writer.close()
    assert_intact(run_path, [1])


def test_table_refuses_arrays_of_layers(writer: LogWriter) -> None:
    with pytest.raises(
        InvalidInputError, match="table 'probe' has an array of layer 'fc'; a table"
    ):
        writer.add_table("probe", [LogArray("id", np.arange(3), ("example",), "fc")])


@pytest.mark.parametrize("name", ["kind", "sequence"])
def test_note_refuses_a_detail_the_log_uses_itself(writer: LogWriter, name: str) -> None:
    message = f"note 'odd' has a detail named '{name}', which the log uses itself; choose another"
    with pytest.raises(InvalidInputError, match=message):
        writer.note("odd", 3, **{name: "x"})


def test_forked_child_cannot_touch_the_log_of_its_parent(run_path: Path) -> None:
    code = """
import os, sys
import numpy as np
from pathlib import Path
from sonde.log import LogArray, LogWriter
writer = LogWriter(Path(sys.argv[1]), seal=False)
array = [LogArray("a", np.arange(3), ("n",))]
writer.append("m", "s", 1, array)
pid = os.fork()
if pid == 0:
    assert not writer.append("m", "s", 99, array)
    writer.add_table("s", array)
    writer.note("child", 99)
    assert writer.flush()
    writer.sync()
    writer.close("child")
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert writer.append("m", "s", 2, array)
writer.close("parent")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(run_path)], check=True)
    run = open_run(run_path)
    assert run.steps() == [1, 2]
    assert run.notes == []
    assert frames_of(journal_of(run_path))[-1].body["reason"] == "parent"


def test_closed_log_is_finished_while_a_forked_child_lives_on(run_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from sonde.log import LogWriter, open_run
writer = LogWriter(Path(sys.argv[1]), seal=False)
reading, writing = os.pipe()
if os.fork() == 0:
    os.read(reading, 1)
    os._exit(0)
print(open_run(sys.argv[1]).state)
writer.close()
print(open_run(sys.argv[1]).state)
os.write(writing, b"x")
os.wait()
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(run_path)]
    printed = subprocess.run(command, check=True, capture_output=True).stdout
    assert printed.split() == [b"recording", b"finished"]


def test_writer_waits_for_a_reader_that_looks_whether_it_lives(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    looking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    locks: list[int | None] = []
    thread = threading.Thread(target=lambda: locks.append(lock_path(tmp_path)))
    thread.start()
    thread.join(0.05)
    assert locks == []
    os.close(looking)
    thread.join(60)
    assert locks[0] is not None
    assert is_being_written(tmp_path)
    unlock(locks[0])
    assert not is_being_written(tmp_path)


def test_writing_loads_neither_h5py_nor_torch_nor_xarray(run_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from sonde.log import LogArray, LogWriter
writer = LogWriter(Path(sys.argv[1]), segment_bytes=1)
writer.append("m", "s", 1, [LogArray("a", np.arange(3), ("n",))])
writer.close()
print(sorted({"h5py", "torch", "xarray"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(run_path)]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"[]\n"


def test_unknown_name_of_the_package_is_refused() -> None:
    import sonde.log

    with pytest.raises(AttributeError, match=r"module 'sonde\.log' has no attribute 'LogReader'"):
        _ = sonde.log.LogReader


def test_an_unexpected_failure_costs_one_record_and_no_hang(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter(run_path, seal=False)
    writer.flush()
    with monkeypatch.context() as broken:
        broken.setattr(Journal, "append", lambda *_: (_ for _ in ()).throw(ValueError("broken")))
        assert writer.append("activations", "probe", 0, record_of(0))
        assert writer.flush(30)
    assert "ValueError: broken" in (writer.problem or "")
    assert writer.append("activations", "probe", 1, record_of(1))
    writer.close()
    run = assert_intact(run_path, [1])
    assert [note["num_records"] for note in run.notes if note["event"] == "gap"] == [1]
