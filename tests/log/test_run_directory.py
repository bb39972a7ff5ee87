"""The run directory: its description, and where runs are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sonde.exceptions import FormatError, RunNotFoundError
from sonde.log import open_run
from sonde.log.format.files import find_runs, write_run_file
from sonde.log.sealing.seal import seal_run

from .conftest import assert_intact, new_run, write_records


def test_run_of_a_newer_format_is_refused(run_path: Path) -> None:
    (run_path / "run.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(
        FormatError,
        match=r"seed0 has log format 2; this sonde reads up to 1\. Install a newer sonde\.",
    ):
        open_run(run_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "new"}', '{"format": null}'])
def test_damaged_run_file_is_refused(run_path: Path, text: str) -> None:
    (run_path / "run.json").write_text(text)
    with pytest.raises(FormatError, match=r"run\.json is damaged: "):
        open_run(run_path)


def test_run_file_is_replaced_as_a_whole(run_path: Path) -> None:
    write_run_file(run_path, {"name": "new", "layers": ["größe"]})
    assert open_run(run_path).info == {"format": 1, "name": "new", "layers": ["größe"]}
    assert [path.name for path in run_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path / "none", "none does not exist; expected a run directory"),
        (lambda path: path / "seed0" / "run.json", "run.json is a file; expected a run directory"),
        (lambda path: path / "seed0" / "empty", r"empty is no run directory: it has no run\.json$"),
        (lambda path: path, r"is no run directory, but holds some: .*seed0, .*seed1$"),
    ],
)
def test_path_without_a_run_says_what_is_there(
    tmp_path: Path, prepare: Callable[[Path], Path], message: str
) -> None:
    for name in ("seed1", "seed0"):
        new_run(tmp_path / name)
    (tmp_path / "seed0" / "empty").mkdir()
    with pytest.raises(RunNotFoundError, match=message):
        open_run(prepare(tmp_path))


def test_runs_below_a_folder_are_found(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    paths = [new_run(tmp_path / "sweep" / "b"), new_run(tmp_path / "sweep" / "a")]
    assert find_runs(tmp_path) == sorted(paths)
    assert find_runs(paths[0]) == paths[:1]


def test_path_may_be_a_string(run_path: Path) -> None:
    write_records(run_path, range(2))
    assert open_run(str(run_path)).steps() == [0, 1]


def test_moved_run_reads_the_same(run_path: Path, tmp_path: Path) -> None:
    write_records(run_path, range(6), segment_bytes=3000)
    seal_run(run_path, before=1)
    moved = tmp_path / "moved"
    shutil.move(run_path, moved)
    assert assert_intact(moved, range(6)).name == "moved"


def test_a_planted_link_is_not_followed(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = run_path.parent / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda num_bytes: "00" * num_bytes)
    (run_path / f".run.json.{'00' * 8}").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_run_file(run_path, {"name": "again"})
    assert victim.read_text() == "precious"
    assert open_run(run_path).info["name"] == "seed0"
