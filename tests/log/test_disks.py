"""Real disks in trouble under a training: full, deleted, moved, read-only."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sonde.log import LogWriter, open_run
from sonde.log.format.files import is_being_written
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run
from sonde.log.writing.sealer_process import Sealing
from tests.limits import LIMIT_SECONDS

from .conftest import assert_intact, new_run, write_records
from .doomed import record_of
from .files import journals_of, segments_of
from .launched import Ended, Launch, Training, launching

OUTAGES = 3


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with launching(tmp_path_factory.mktemp("launched") / "errors") as launch:
        yield launch


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """Mount a disk of 2 MiB, where that is allowed."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may mount nothing; a limit of the file size stands in for it")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


class Full:
    """A disk that is full meanwhile: by a file that takes all, or by a limit of the file size."""

    def __init__(self, run: Path, kind: str) -> None:
        self._ballast = run.parent / "ballast" if kind == "disk" else None
        self._run = run
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self) -> None:
        if self._ballast is None:
            size = max(journals_of(self._run)).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, self._limits[1]))
            return
        with suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))

    def __exit__(self, *_: object) -> None:
        if self._ballast is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)
        else:
            self._ballast.unlink()


def fill_and_free(run: str, kind: str) -> None:
    training = Training(Path(run), segment_bytes=5_000)  # Each outage meets another journal.
    training.train(5)
    for _ in range(OUTAGES):
        with Full(Path(run), kind):
            training.train(20)
        training.train(5)


def fill_until_the_end(run: str, kind: str) -> None:
    training = Training(Path(run))
    training.train(5)
    full = Full(Path(run), kind)
    full.__enter__()
    training.train(20)


@pytest.fixture(params=["disk", "file"])
def room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Return the run directory to write, and what gets full there."""
    if request.param == "disk":
        with small_disk(tmp_path / "disk") as disk:
            yield disk / "seed0", "disk"
    else:
        yield tmp_path / "seed0", "file"


def assert_one_warning(ended: Ended, *parts: str) -> None:
    assert ended.status == 0, ended.stderr
    assert len(ended.warnings) == 1, ended.stderr
    # The warning, and the line of code it points to.
    assert ended.stderr.count("\n") == 2, ended.stderr
    for part in parts:
        assert part in ended.warnings[0]


def test_full_disk_costs_what_did_not_fit_and_one_warning(
    room: tuple[Path, str], launch: Launch, counts: Counter[str]
) -> None:
    run_path, kind = room
    ended = launch(fill_and_free, run_path, kind)
    reason, advice = {
        "disk": ("[Errno 28] No space left on device", "free space there"),
        "file": ("[Errno 27] File too large", ""),
    }[kind]
    assert_one_warning(ended, f"the log cannot be written ({run_path}", reason, advice)
    run = open_run(run_path)
    steps = set(run.steps())
    assert_intact(run_path, steps)
    gaps = [note for note in run.notes if note["event"] == "gap"]
    assert [gap["num_records"] for gap in gaps] == [
        sum(gap["step"] <= step <= gap["last_step"] for step in set(range(81)) - steps)
        for gap in gaps
    ]
    assert all(reason in text for gap in gaps for text in gap["reasons"])
    outages = [set(range(6 + 25 * n, 26 + 25 * n)) for n in range(OUTAGES)]
    assert set(range(81)) - steps <= set.union(*outages)
    assert outages[0] - steps  # In the others, sealing may make room by what it deletes.
    assert (run.state, run.damage) == ("finished", [])
    assert journals_of(run_path) == []
    assert len(segments_of(run_path)) > 1
    counts["disks: full, and free again"] += OUTAGES


def test_disk_that_stays_full_costs_the_rest_and_one_warning(
    room: tuple[Path, str], launch: Launch, counts: Counter[str]
) -> None:
    run_path, kind = room
    ended = launch(fill_until_the_end, run_path, kind)
    assert_one_warning(ended, "the log cannot be written", "records are dropped until it can")
    run = open_run(run_path)
    # A small record may fit where a larger one did not.
    assert set(range(6)) <= set(run.steps()) != set(range(26))
    assert_intact(run_path, run.steps())
    assert run.damage == []
    # Sealing needs room, too: libhdf5 may tear the process down in which it ends without.
    assert journals_of(run_path)
    (run_path.parent / "ballast").unlink(missing_ok=True)
    seal_run(run_path)
    assert_intact(run_path, run.steps())
    assert [path.suffix for path in (run_path / "attempt0-rank0").iterdir()] == [".h5"]
    counts["disks: full until the end"] += 1


def delete_folder(run: str) -> None:
    training = Training(Path(run), segment_bytes=3_000)
    training.train(10)
    shutil.rmtree(training.folder)
    training.train(10)
    assert is_being_written(training.folder)


def test_deleted_folder_is_made_again(tmp_path: Path, launch: Launch, counts: Counter[str]) -> None:
    run_path = tmp_path / "seed0"
    ended = launch(delete_folder, run_path)
    assert_one_warning(ended, ".journal was deleted; its records are lost, a new journal goes on")
    run = assert_intact(run_path, range(11, 21))
    assert run.state == "finished"
    (lost,) = run.damage
    assert re.fullmatch(
        r"frames 0 to \d+ are missing: a file was lost before this one", lost.reason
    )
    assert journals_of(run_path) == []
    counts["disks: folder deleted"] += 1


def delete_run(run: str) -> None:
    training = Training(Path(run))
    training.train(5)
    shutil.rmtree(run)
    training.train(5)
    assert training.recorder is not None
    assert training.recorder._log.writer._appender._lost.num_records == 5


def test_deleted_run_stays_deleted(tmp_path: Path, launch: Launch, counts: Counter[str]) -> None:
    run_path = tmp_path / "seed0"
    ended = launch(delete_run, run_path)
    journal = run_path / "attempt0-rank0" / "000000000000.journal"
    assert_one_warning(
        ended,
        f"the log cannot be written ({run_path} was deleted or moved): make a new recorder to "
        f"record on; records are dropped until it can, what was recorded before was deleted "
        f"with {journal}",
    )
    assert list(tmp_path.iterdir()) == []
    counts["disks: run deleted"] += 1


def rename_run(run: str, other: str) -> None:
    training = Training(Path(run), segment_bytes=3_000)
    training.train(10)
    os.rename(run, other)
    training.train(10)
    assert training.recorder is not None
    training.recorder.sync()
    training.train(5)


def test_renamed_run_goes_on_in_its_new_place(
    tmp_path: Path, launch: Launch, counts: Counter[str]
) -> None:
    ended = launch(rename_run, tmp_path / "seed0", tmp_path / "other")
    assert ended.status == 0
    # What could not be forced to the disk is all there is to say.
    assert ended.stderr.count("SondeWarning") == 1
    assert "is safe from the end of the process, not of the machine, until" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    run = assert_intact(tmp_path / "other", range(26))
    assert (run.state, run.damage, run.notes) == ("finished", [], [])
    assert journals_of(tmp_path / "other") == []
    counts["disks: run renamed"] += 1


def make_read_only(run: str) -> None:
    training = Training(Path(run), segment_bytes=3_000)
    if os.geteuid() == 0:  # Root may write everywhere.
        for path in (training.folder, *training.folder.iterdir()):
            os.chown(path, 65534, 65534)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    training.folder.chmod(0o500)
    training.train(10)
    assert len(list(training.folder.iterdir())) == 1
    training.folder.chmod(0o700)
    training.train(10)
    assert len(list(training.folder.iterdir())) > 1


def test_folder_made_read_only_costs_nothing(launch: Launch, counts: Counter[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)  # Others get there, too.
        run_path = Path(root, "seed0")
        ended = launch(make_read_only, run_path)
        assert ended.status == 0
        # Another user may not be able to start a process for the sealing.
        assert all("were not sealed into HDF5" in warning for warning in ended.warnings)
        assert len(ended.warnings) <= 1
        seal_run(run_path)
        run = assert_intact(run_path, range(21))
        assert (run.state, run.damage, run.notes) == ("finished", [], [])
        assert len(segments_of(run_path)) > 1
    counts["disks: folder read-only, and writable again"] += 1


def append(writer: LogWriter, number: int) -> None:
    assert writer.append("activations", "probe", number, record_of(number))
    assert writer.flush(LIMIT_SECONDS)


@pytest.mark.parametrize("is_deleted", [True, False], ids=["deleted", "moved"])
def test_run_made_anew_in_the_same_place_is_left_alone(tmp_path: Path, is_deleted: bool) -> None:
    run_path = new_run(tmp_path / "seed0")
    old = LogWriter(run_path, segment_bytes=1, seal=False)
    append(old, 0)
    if is_deleted:
        shutil.rmtree(run_path)
    else:
        run_path.rename(tmp_path / "moved")
    new = LogWriter(new_run(run_path), segment_bytes=1, seal=False)
    for number in range(1, 4):
        append(old, number)
        append(new, 10 + number)
    old.close()
    new.close()
    run = assert_intact(run_path, [11, 12, 13])
    assert (run.state, run.damage, new.problem) == ("finished", [], None)
    if is_deleted:
        assert f"{run_path} was deleted or moved" in (old.problem or "")
    else:
        assert_intact(tmp_path / "moved", range(4))
        assert old.problem is None


def test_folder_another_recorder_has_made_is_left_alone(run_path: Path) -> None:
    old = LogWriter(run_path, seal=False)
    append(old, 0)
    shutil.rmtree(old.folder)
    new = LogWriter(run_path, seal=False)
    append(old, 1)
    append(new, 2)
    old.close()
    new.close()
    assert assert_intact(run_path, [2]).damage == []
    assert f"{old.folder} is another recorder's now" in (old.problem or "")


def test_sealing_that_failed_meanwhile_is_repeated_at_the_end(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lose the sealing process just after it was told what to do last."""
    writer = LogWriter(run_path, segment_bytes=1)
    append(writer, 0)
    assert writer._sealing is not None
    assert writer._sealing.problem is None
    say = Sealing._say

    def say_and_kill(self: Sealing, process: subprocess.Popen[bytes], number: int) -> None:
        say(self, process, number)
        process.kill()
        monkeypatch.undo()

    monkeypatch.setattr(Sealing, "_say", say_and_kill)
    writer.close()
    assert writer.problem is None
    assert journals_of(run_path) == []
    assert_intact(run_path, [0])


class Neighbour(threading.Thread):
    """Fills a disk and frees it again, over and over, as another program beside the sealer."""

    def __init__(self, disk: Path) -> None:
        super().__init__(daemon=True)
        self._file = disk / "neighbour"
        self._random = random.Random(0)
        self.is_over = threading.Event()
        self.num_outages = 0

    def run(self) -> None:
        while not self.is_over.is_set():
            with suppress(OSError), self._file.open("wb", buffering=0) as file:
                while not self.is_over.is_set():
                    if file.write(bytes(self._random.choice([512, 4096, 65536]))) == 0:
                        break
            self.num_outages += 1
            self._file.unlink(missing_ok=True)
            self.is_over.wait(self._random.random() / 500)


def test_a_disk_that_is_full_now_and_then_costs_no_record_while_sealing(
    tmp_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    whole = new_run(tmp_path / "whole")
    write_records(whole, range(6), segment_bytes=1300)
    with small_disk(tmp_path / "disk") as disk:
        neighbour = Neighbour(disk)
        neighbour.start()
        num_refused = 0
        num_sealings = 2000 if is_full else 200
        for _ in range(num_sealings):
            run_path = disk / "run"
            copy_patiently(whole, run_path)
            try:
                seal_run(run_path)
            except (OSError, RuntimeError):
                num_refused += 1
            assert_intact(run_path, range(6))
            assert verify_run(run_path) == []
            shutil.rmtree(run_path)
        neighbour.is_over.set()
        neighbour.join()
    assert neighbour.num_outages
    counts["sealings beside a neighbour who fills the disk"] += num_sealings
    counts["of these, refused for want of room"] += num_refused


def copy_patiently(source: Path, target: Path) -> None:
    """Copy a folder to a disk that is full now and then."""
    while True:
        try:
            shutil.copytree(source, target)
            return
        except (OSError, shutil.Error):
            shutil.rmtree(target, ignore_errors=True)
