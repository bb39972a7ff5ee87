"""`sonde ls` where some runs cannot be read has a row for each; and runs that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sonde.log.format.files import write_run_file

from .conftest import call, output_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it makes pipes and links")


def journal_in(run: Path) -> Path:
    (path,) = run.glob("attempt0-rank0/*.journal")
    return path


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def write_text(text: str) -> Callable[[Path], object]:
    return lambda run: (run / "run.json").write_text(text)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nested": write_text("[" * 100_000),
    "no JSON": write_text("{"),
    "a list": write_text("[1]"),
    "infinite": write_text('{"format": Infinity}'),
    "huge": write_text('{"format": 1' + "0" * 5000 + "}"),
    "newer": write_text('{"format": 999}'),
    "no format": write_text("{}"),
    "no checksum": write_text('{"format": 1}'),
    "binary": lambda run: (run / "run.json").write_bytes(bytes(range(256))),
    "measures": lambda run: write_run_file(run, {"measures": 5}),
    "model": lambda run: write_run_file(run, {"model": {"layers": ["fc"]}}),
    "environment": lambda run: write_run_file(run, {"environment": {"packages": 1}}),
    "description is a pipe": lambda run: replace(run / "run.json", os.mkfifo),
    "description is a device": lambda run: replace(
        run / "run.json", lambda path: path.symlink_to("/dev/zero")
    ),
    "description is a folder": lambda run: replace(run / "run.json", Path.mkdir),
    "description is a loop": lambda run: replace(
        run / "run.json", lambda path: path.symlink_to(path)
    ),
    "journal is a folder": lambda run: replace(journal_in(run), Path.mkdir),
    "journal is a pipe": lambda run: replace(journal_in(run), os.mkfifo),
    "journal is a device": lambda run: replace(
        journal_in(run), lambda path: path.symlink_to("/dev/zero")
    ),
    "journal is noise": lambda run: journal_in(run).write_bytes(b"\x93SONDE\r\n" * 4000),
}


@pytest.fixture
def runs(written: Path, tmp_path: Path) -> Path:
    """Return a folder of 200 runs, of which 20 are damaged, each in another way."""
    for number in range(200):
        shutil.copytree(written / "runs" / "seed0", tmp_path / f"run{number:03d}")
    for number, damage in enumerate(DAMAGES.values()):
        damage(tmp_path / f"run{10 * number:03d}")
    return tmp_path


def test_one_bad_run_hides_no_good_one(runs: Path) -> None:
    rows = {Path(row["path"]).name: row for row in json.loads(output_of(f"ls {runs} --json"))}
    assert sorted(rows) == [f"run{number:03d}" for number in range(200)]
    bad = {name for name, row in rows.items() if row["problem"]}
    assert bad == {f"run{10 * number:03d}" for number in range(20)}
    for name, row in rows.items():
        if name not in bad:
            assert (row["state"], row["num_records"]) == ("finished", 20)


def test_each_bad_run_is_named_with_its_problem_in_a_line(runs: Path) -> None:
    printed = call(f"ls {runs}").stdout
    for number in range(20):
        assert f"run{10 * number:03d}: " in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("command", ["show", "verify", "seal", "cka", "tensorboard"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_command_ends_with_a_line(
    written: Path, tmp_path: Path, command: str, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(written / "runs" / "seed0", run)
    DAMAGES[damage](run)
    done = call(f"{command} {run}")
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
@pytest.mark.parametrize("name", ["run000", "run000/attempt0-rank0"])
def test_a_folder_without_permission_has_its_row(runs: Path, name: str) -> None:
    folder = runs / name
    folder.chmod(0)
    try:
        rows = json.loads(output_of(f"ls {runs} --json"))
    finally:
        folder.chmod(0o700)
    assert len(rows) == 200
    assert "Permission denied" in rows[0]["problem"]


def test_a_folder_that_cannot_be_listed_is_named(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("run007"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    rows = json.loads(output_of(f"ls {runs} --json"))
    assert len(rows) == 200


def test_tensorboard_of_a_run_that_cannot_be_written_asks_for_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not mode & os.W_OK)
    done = call("tensorboard runs/seed0")
    assert done.exit_code == 1
    assert "runs/seed0/tensorboard cannot be written; give another folder" in done.stderr
    assert "--logdir DIR" in done.stderr
    output_of(f"tensorboard runs/seed0 --no-images --logdir {tmp_path}")
