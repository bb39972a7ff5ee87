"""A log and processes that do not write it: forked children, and readers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sonde.log import open_run
from sonde.log.format.files import is_being_written, lock_path, unlock
from tests.limits import LIMIT_SECONDS

from .files import frames_of, journal_of


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
    thread.join(LIMIT_SECONDS)
    assert locks[0] is not None
    assert is_being_written(tmp_path)
    unlock(locks[0])
    assert not is_being_written(tmp_path)
