"""Kills: what was announced as committed is read back, bit for bit and once, whatever died when.

`doomed` has the processes that die, `deaths` says where they do.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import get_args

import pytest

from sonde.exceptions import RunNotFoundError
from sonde.log import LogWriter, Run, open_run
from sonde.log.format.files import RUN_FILE, lock_path, unlock
from sonde.log.sealing.seal import seal_run
from sonde.log.writing.appender import Sync
from tests.limits import LIMIT_SECONDS

from .conftest import assert_intact, new_run, write_records
from .deaths import BYTES, CENSUS, Act, Death, each_death
from .doomed import NUM_RECORDS, record_of, time_limit
from .files import frames_of, journals_of

SYNCS: tuple[Sync, ...] = get_args(Sync)
ROOT = Path(__file__).parents[2]


def spawn(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.log.doomed", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


class Executioner:
    """Lets processes die, one after the other."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def kill(self, death: Death, run_path: Path) -> bool:
        """Let a process die at a run that is made anew; tell whether it came to that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        shutil.rmtree(run_path, ignore_errors=True)
        self._process.stdin.write(json.dumps([str(run_path), *astuple(death)]).encode() + b"\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        assert ended["errors"] == ""
        if (run_path / "census").exists():
            assert ended["status"] == 0
            return False
        signum = signal.SIGXFSZ if death.call == BYTES else signal.SIGKILL
        assert ended["status"] == (0 if death.act == "seal beside a writer" else -signum)
        return True

    def deaths(self, act: Act, sync: Sync, run_path: Path) -> list[Death]:
        """Return where a process can die: at each of the calls it makes if it lives."""
        assert not self.kill(Death(act, sync, CENSUS), run_path)
        census = Counter(json.loads((run_path / "census").read_text()))
        assert set(census) >= {"create", "write", "force", "rename", "delete"}
        return each_death(act, sync, census)


@pytest.fixture(scope="module")
def executioner() -> Iterator[Executioner]:
    with spawn("die") as process:
        yield Executioner(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(LIMIT_SECONDS) == 0


def drawn(deaths: list[Death], share: float, *, is_full: bool) -> list[Death]:
    """Return all deaths, or the first and a share of the others, drawn every day alike."""
    rng = random.Random(repr(deaths[0]))
    return deaths if is_full else [deaths[0], *rng.sample(deaths[1:], round(share * len(deaths)))]


def survivors(
    executioner: Executioner, deaths: list[Death], run_path: Path, counts: Counter[str]
) -> Iterator[None]:
    """Yield after each death; count them."""
    num_killed = 0
    for death in deaths:
        with time_limit(LIMIT_SECONDS):
            if executioner.kill(death, run_path):
                num_killed += 1
                yield
    # Records that are forced together make fewer calls than were counted.
    assert num_killed > 0.7 * len(deaths)
    what = "by the size of a file" if deaths[0].call == BYTES else "at a call"
    counts[f"kills {what}: {deaths[0].act}"] += num_killed


def announced(run_path: Path) -> list[int]:
    return [int(line) for line in (run_path / "announced").read_bytes().split()]


def check_killed_writer(run_path: Path) -> None:
    """Check what a killed writer left, and then what is left of it once it is sealed."""
    numbers = announced(run_path)
    if not (run_path / RUN_FILE).exists():
        assert numbers == []
        with pytest.raises(RunNotFoundError):
            open_run(run_path)
        return
    before = check_announced(run_path, numbers)
    seal_run(run_path)
    after = check_announced(run_path, numbers)
    assert after.steps() == before.steps()
    # A journal that was killed before its first frame stays.
    assert [path for path in journals_of(run_path) if frames_of(path)] == []
    assert len(after.damage) == len(before.damage)


def check_announced(run_path: Path, numbers: list[int]) -> Run:
    run = assert_intact(run_path, numbers, may_hold_more=True)
    assert len(run.steps()) - len(numbers) <= 1
    assert all(damage.is_tail for damage in run.damage)
    return run


def check_killed_sealer(run_path: Path, num_records: int) -> None:
    """Check that a sealer lost nothing, and that the next one does its work."""
    for _ in range(2):
        run = assert_intact(run_path, range(num_records))
        assert (run.damage, run.state) == ([], "finished")
        seal_run(run_path)
    assert journals_of(run_path) == []
    assert list(run_path.rglob("*.tmp")) == []


@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("act", ["write", "write beside a sealer"])
def test_writer_killed_at_any_call_loses_nothing_announced(
    executioner: Executioner,
    memory_path: Path,
    act: Act,
    sync: Sync,
    is_full: bool,
    counts: Counter[str],
) -> None:
    run_path = memory_path / "seed0"
    deaths = drawn(executioner.deaths(act, sync, run_path), 0.15, is_full=is_full)
    for _ in survivors(executioner, deaths, run_path, counts):
        check_killed_writer(run_path)


@pytest.mark.parametrize("sync", SYNCS)
def test_sealer_killed_at_any_call_costs_its_writer_nothing(
    executioner: Executioner, memory_path: Path, sync: Sync, is_full: bool, counts: Counter[str]
) -> None:
    run_path = memory_path / "seed0"
    every = executioner.deaths("seal beside a writer", sync, run_path)
    deaths = drawn(every, 0.08, is_full=is_full)
    for _ in survivors(executioner, deaths, run_path, counts):
        check_killed_sealer(run_path, NUM_RECORDS)


def test_sealer_of_a_closed_log_killed_at_any_call_loses_nothing(
    executioner: Executioner, memory_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    run_path = memory_path / "seed0"
    write_records(new_run(memory_path / "whole"), range(5), segment_bytes=2_000)
    deaths = drawn(executioner.deaths("seal", "seal", run_path), 0.4, is_full=is_full)
    for _ in survivors(executioner, deaths, run_path, counts):
        check_killed_sealer(run_path, 5)


@pytest.mark.parametrize(
    ("act", "num_bytes", "step"),
    [("write", 2_000, 16), ("seal beside a writer", 16_000, 64), ("seal", 16_000, 64)],
)
def test_process_killed_amid_any_write_loses_nothing_announced(
    executioner: Executioner,
    memory_path: Path,
    act: Act,
    num_bytes: int,
    step: int,
    is_full: bool,
    counts: Counter[str],
) -> None:
    run_path = memory_path / "seed0"
    write_records(new_run(memory_path / "whole"), range(5), segment_bytes=2_000)
    every = [Death(act, "seal", BYTES, number) for number in range(0, num_bytes, step)]
    for _ in survivors(executioner, drawn(every, 0.12, is_full=is_full), run_path, counts):
        if act == "write":
            check_killed_writer(run_path)
        else:
            check_killed_sealer(run_path, NUM_RECORDS if act != "seal" else 5)


def test_writer_and_its_sealing_process_killed_at_any_time_lose_nothing_announced(
    memory_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    for seed in range(150 if is_full else 9):
        rng = random.Random(seed)
        run_path = new_run(memory_path / f"seed{seed}")
        with time_limit(LIMIT_SECONDS), spawn("append", run_path, SYNCS[seed % 3]) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0, 0.6))
            process.kill()
            lines = (first + process.stdout.read()).split(b"\n")
            assert process.wait() == -signal.SIGKILL
            numbers = [int(number) for number in lines[:-1]]
            assert numbers == list(range(len(numbers)))
            # The sealer that the writer had started may still be at work.
            check_announced(run_path, numbers)
            wait_for_lock(run_path / "attempt0-rank0")
            seal_run(run_path)
            run = check_announced(run_path, numbers)
            assert run.state == "interrupted"
        counts["kills at any time: write, with a sealing process"] += 1


def wait_for_lock(folder: Path) -> None:
    """Wait for a sealer that was forked just before the kill to let go of the writer's lock."""
    lock = lock_path(folder)
    assert lock is not None
    unlock(lock)


def test_sealing_process_killed_at_any_time_costs_its_writer_nothing(
    run_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    rng = random.Random(0)
    writer = LogWriter(run_path, segment_bytes=12_000)
    numbers = itertools.count()
    for _ in range(60 if is_full else 4):
        with time_limit(LIMIT_SECONDS):
            seconds = rng.uniform(0, 0.6)
            sealer = append_until_sealing(writer, numbers)
            for _ in range(10):
                with pytest.raises(subprocess.TimeoutExpired):
                    sealer.wait(seconds / 10)
                append_one(writer, numbers)
            sealer.kill()
            assert sealer.wait() == -signal.SIGKILL
        counts["kills at any time: the sealing process of a writer"] += 1
    append_until_sealing(writer, numbers)
    writer.close()
    check_killed_sealer(run_path, next(numbers))


def append_until_sealing(writer: LogWriter, numbers: Iterator[int]) -> subprocess.Popen[bytes]:
    """Append records until there is a sealing process, and return it."""
    assert writer._sealing is not None
    while True:
        append_one(writer, numbers)
        process = writer._sealing._process
        if process is not None and process.poll() is None:
            return process


def append_one(writer: LogWriter, numbers: Iterator[int]) -> None:
    number = next(numbers)
    assert writer.append("activations", "probe", number, record_of(number))
    assert writer.flush(LIMIT_SECONDS)


def test_attempt_killed_at_its_start_hides_nothing_of_the_one_before(run_path: Path) -> None:
    write_records(run_path, range(5))
    (run_path / "attempt1-rank0").mkdir()
    assert_intact(run_path, range(5))
    (run_path / "attempt1-rank0" / "000000000000.journal").touch()
    assert_intact(run_path, range(5))
