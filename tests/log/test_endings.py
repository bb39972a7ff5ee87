"""Every way a training process ends: what it recorded is there, and its end is not changed."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sonde.log import LogWriter
from sonde.log.format.files import is_being_written
from tests.limits import LIMIT_SECONDS

from .conftest import assert_intact
from .doomed import record_of
from .files import journals_of
from .launched import Launch, Training, launching

NUM_STEPS = 5
SLOWLY_SECONDS = 0.02

End = Callable[[Training], object]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with launching(tmp_path_factory.mktemp("launched") / "errors") as launch:
        yield launch


def kill_me(number: int) -> None:
    os.kill(os.getpid(), number)


def fail(*_: object) -> None:
    raise RuntimeError("this failed")


def interrupt(training: Training) -> None:
    raise KeyboardInterrupt


def fail_in_a_thread(training: Training) -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def drop(training: Training) -> None:
    training.recorder = None
    gc.collect()


def close(training: Training) -> None:
    """Close the recorder, if there is one."""
    if training.recorder is not None:
        training.recorder.close()


def close_and_exit(training: Training) -> None:
    close(training)
    sys.exit(0)


def close_and_terminate(training: Training) -> None:
    close(training)
    kill_me(signal.SIGTERM)


def terminate_while_closing(training: Training) -> None:
    """Be told to terminate once the last record is on its way, which closing waits for."""
    if training.recorder is None:
        kill_me(signal.SIGTERM)
        return
    appender = training.recorder._log.writer._appender
    store = appender.store

    def store_and_terminate(pending: Any) -> None:
        if pending.kind == "end":
            kill_me(signal.SIGTERM)
        store(pending)

    appender.store = store_and_terminate  # type: ignore[method-assign]  # as before, and more
    close(training)


def handle_termination(handler: Any, training: Training) -> None:  # as signal.signal takes it
    signal.signal(signal.SIGTERM, handler)
    kill_me(signal.SIGTERM)
    close(training)
    assert signal.getsignal(signal.SIGTERM) is handler


def leave(number: int, frame: FrameType | None) -> None:
    sys.exit(7)


def go_on(number: int, frame: FrameType | None) -> None:
    print("told to terminate", file=sys.stderr)


def hand_on(training: Training) -> None:
    """Handle the signal first, then let whoever handled it before do the same."""
    before = signal.getsignal(signal.SIGTERM)

    def handler(number: int, frame: FrameType | None) -> None:
        go_on(number, frame)
        if callable(before):
            before(number, frame)
        signal.signal(number, signal.SIG_DFL)
        kill_me(number)

    signal.signal(signal.SIGTERM, handler)
    kill_me(signal.SIGTERM)


ENDINGS: dict[str, tuple[End, int]] = {
    "return": (lambda training: None, 0),
    "close": (close, 0),
    "no reference": (drop, 0),
    "exit": (lambda training: sys.exit(3), 3),
    "exit with a message": (lambda training: sys.exit("that was it"), 1),
    "exception": (fail, 1),
    "exception in a thread": (fail_in_a_thread, 0),
    "KeyboardInterrupt": (interrupt, -signal.SIGINT),
    "SIGINT": (lambda training: kill_me(signal.SIGINT), -signal.SIGINT),
    "SIGTERM": (lambda training: kill_me(signal.SIGTERM), -signal.SIGTERM),
    "SIGTERM after close": (close_and_terminate, -signal.SIGTERM),
    "SIGTERM while closing": (terminate_while_closing, -signal.SIGTERM),
    "SIGTERM handled by leaving": (lambda t: handle_termination(leave, t), 7),
    "SIGTERM handled by going on": (lambda t: handle_termination(go_on, t), 0),
    "SIGTERM handled and handed on": (hand_on, -signal.SIGTERM),
    "SIGTERM ignored": (lambda t: handle_termination(signal.SIG_IGN, t), 0),
}
"""What a process may live to close: how it ends, and with which status."""

STATES = {
    "exception": "ended by RuntimeError",
    "KeyboardInterrupt": "interrupted",
    "SIGINT": "interrupted",
    "SIGTERM": "ended by SIGTERM",
    "SIGTERM while closing": "finished",
    "SIGTERM handled and handed on": "ended by SIGTERM",
}
"""What the run is called afterwards, where that is not `finished`."""

SEALED = {"return", "exit", "exception", "SIGINT"}

KILLS: dict[str, tuple[End, int]] = {
    "_exit": (lambda training: os._exit(4), 4),
    "segmentation fault": (lambda training: ctypes.string_at(0), -signal.SIGSEGV),
    "abort": (lambda training: os.abort(), -signal.SIGABRT),
    "SIGKILL": (lambda training: kill_me(signal.SIGKILL), -signal.SIGKILL),
}

HANDLERS: dict[str, Any] = {"leave": leave, "go on": go_on, "ignore": signal.SIG_IGN}


def end(ending: str, run: str) -> None:
    """Take some steps, whose records are still on their way when the training ends."""
    training = Training(Path(run) if run else None, seal=ending in SEALED)
    if training.recorder is not None:
        appender = training.recorder._log.writer._appender
        store = appender.store

        def store_slowly(pending: Any) -> None:
            time.sleep(SLOWLY_SECONDS)
            store(pending)

        appender.store = store_slowly  # type: ignore[method-assign]  # as before, but slower
    for _ in range(NUM_STEPS):
        training.step()
    ENDINGS[ending][0](training)


def be_killed(ending: str, run: str) -> None:
    """Take some steps, and die once they are committed."""
    training = Training(Path(run) if run else None)
    training.train(NUM_STEPS)
    KILLS[ending][0](training)


@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_was_recorded_is_there_after_every_ending(
    tmp_path: Path, ending: str, launch: Launch, is_full: bool, counts: Counter[str]
) -> None:
    run_path = tmp_path / "seed0"
    recorded = launch(end, ending, run_path)
    assert (recorded.status, recorded.warnings) == (ENDINGS[ending][1], [])
    assert not is_full or recorded == launch(end, ending, "")
    run = assert_intact(run_path, range(NUM_STEPS + 1))
    assert (run.state, run.damage, run.notes) == (STATES.get(ending, "finished"), [], [])
    assert len(journals_of(run_path)) == (0 if ending in SEALED else 1)
    counts["endings: the log is closed"] += 1


@pytest.mark.parametrize("ending", KILLS)
def test_what_was_committed_is_there_after_every_kill(
    tmp_path: Path, ending: str, launch: Launch, is_full: bool, counts: Counter[str]
) -> None:
    run_path = tmp_path / "seed0"
    recorded = launch(be_killed, ending, run_path)
    assert recorded.status == KILLS[ending][1]
    assert not is_full or recorded == launch(be_killed, ending, "")
    run = assert_intact(run_path, range(NUM_STEPS + 1))
    assert (run.state, run.damage, run.notes) == ("interrupted", [], [])
    counts["endings: killed"] += 1


def handle_before(handler: str, run: str) -> None:
    """Handle the signal before anything is recorded."""
    signal.signal(signal.SIGTERM, HANDLERS[handler])
    training = Training(Path(run) if run else None, seal=False)
    assert signal.getsignal(signal.SIGTERM) is HANDLERS[handler]
    for _ in range(NUM_STEPS):
        training.step()
    kill_me(signal.SIGTERM)
    close(training)
    assert signal.getsignal(signal.SIGTERM) is HANDLERS[handler]


@pytest.mark.parametrize("handler", HANDLERS)
def test_handler_that_was_there_first_is_kept(
    tmp_path: Path, handler: str, launch: Launch, is_full: bool, counts: Counter[str]
) -> None:
    run_path = tmp_path / "seed0"
    recorded = launch(handle_before, handler, run_path)
    assert recorded.status == {"leave": 7}.get(handler, 0)
    assert not is_full or recorded == launch(handle_before, handler, "")
    assert assert_intact(run_path, range(NUM_STEPS + 1)).state == "finished"
    counts["endings: the log is closed"] += 1


def record_in_a_thread(run: str) -> None:
    trainings: list[Training] = []
    thread = threading.Thread(target=lambda: trainings.append(Training(Path(run))))
    thread.start()
    thread.join()
    trainings[0].train(NUM_STEPS)
    kill_me(signal.SIGTERM)


def test_recorder_of_a_thread_changes_no_signal(tmp_path: Path, launch: Launch) -> None:
    run_path = tmp_path / "seed0"
    assert launch(record_in_a_thread, run_path).status == -signal.SIGTERM
    assert assert_intact(run_path, range(NUM_STEPS + 1)).state == "interrupted"


def load_by_workers(run: str, persistent: str) -> None:
    """Train on batches of workers, which end before the log is closed, or after."""
    training = Training(Path(run), segment_bytes=3_000)
    loader = DataLoader(
        TensorDataset(torch.ones(8, 4)),
        batch_size=2,
        num_workers=2,
        multiprocessing_context="fork",
        persistent_workers=persistent == "persistent",
    )
    for _ in range(3):
        for (batch,) in loader:
            training.step(batch)
    close(training)
    for (batch,) in loader:
        training.step(batch)


@pytest.mark.parametrize("workers", ["persistent", "new each epoch"])
def test_forked_workers_of_a_data_loader_cost_nothing(
    tmp_path: Path, workers: str, launch: Launch, counts: Counter[str]
) -> None:
    run_path = tmp_path / "seed0"
    ended = launch(load_by_workers, run_path, workers)
    assert (ended.status, ended.stderr) == (0, "")
    run = assert_intact(run_path, range(13))
    assert (run.state, run.damage, run.notes) == ("finished", [], [])
    assert journals_of(run_path) == []
    counts["endings: of data loader workers"] += 2 if workers == "persistent" else 8


CHILDREN: dict[str, tuple[End, int]] = {
    "exit": (lambda training: sys.exit(9), 9),
    "close": (close_and_exit, 0),
    "_exit": (lambda training: os._exit(4), 4),
    "exception": (fail, 1),
    "SIGTERM": (lambda training: kill_me(signal.SIGTERM), -signal.SIGTERM),
    "SIGKILL": (lambda training: kill_me(signal.SIGKILL), -signal.SIGKILL),
}


def fork_children(run: str) -> None:
    """Let children record what they must not, and end in all ways, between steps of the parent."""
    training = Training(Path(run), segment_bytes=3_000)
    assert training.recorder is not None
    for act, status in CHILDREN.values():
        training.train(2)
        journal = max(journals_of(Path(run)))
        before = journal.read_bytes()
        pid = os.fork()
        if pid == 0:
            signal.alarm(LIMIT_SECONDS)
            training.step()
            training.recorder.sync()
            act(training)
            return
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
        assert journal.read_bytes() == before
        assert is_being_written(training.folder)
    training.train(1)


def test_forked_children_leave_the_log_of_their_parent_alone(
    tmp_path: Path, launch: Launch, counts: Counter[str]
) -> None:
    ended = launch(fork_children, tmp_path / "seed0")
    assert (ended.status, ended.warnings) == (0, []), ended.stderr
    run = assert_intact(tmp_path / "seed0", range(2 * len(CHILDREN) + 2))
    assert (run.state, run.damage, run.notes) == ("finished", [], [])
    assert journals_of(tmp_path / "seed0") == []
    counts["endings: of forked children"] += len(CHILDREN)


def fork_a_recorder(run: str, other: str) -> None:
    """Let a child record a run of its own, and end without closing it."""
    training = Training(Path(run), seal=False)
    training.train(NUM_STEPS)
    pid = os.fork()
    if pid == 0:
        child = Training(Path(other), seal=False)
        for _ in range(NUM_STEPS):
            child.step()
        return
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_forked_child_closes_its_own_recorder(tmp_path: Path, launch: Launch) -> None:
    ended = launch(fork_a_recorder, tmp_path / "seed0", tmp_path / "seed1")
    assert (ended.status, ended.stderr) == (0, "")
    for name in ("seed0", "seed1"):
        assert assert_intact(tmp_path / name, range(NUM_STEPS + 1)).state == "finished"


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, OSError])
def test_process_that_may_not_fork_any_more_leaves_its_journal(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error("can't fork at interpreter shutdown")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    writer = LogWriter(run_path)
    assert writer.append("activations", "probe", 0, record_of(0))
    writer.close()
    assert "no process could be started: can't fork at interpreter shutdown" in str(writer.problem)
    assert assert_intact(run_path, [0]).state == "finished"
