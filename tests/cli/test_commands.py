"""`sonde ls`, `tensorboard`, `seal` and `verify`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sonde import __version__
from sonde.cli import app
from sonde.log.sealing.seal import seal_run

from .conftest import call, output_of, write_run


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sonde", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"sonde {__version__}\n"


def test_ls_lists_runs_below_a_folder(folder: Path) -> None:
    rows = output_of("ls").splitlines()
    assert [row.split()[:4] for row in rows if "seed" in row] == [
        ["runs/seed0", "finished", "0–30", "20"],
        ["runs/seed1", "finished", "0–30", "20"],
    ]


def test_ls_prints_json(folder: Path) -> None:
    first, _ = json.loads(output_of("ls runs --json"))
    assert first["path"] == "runs/seed0"
    assert first["steps"] == [0, 30]
    assert first["num_records"] == 20
    assert first["num_bytes"] == sum(
        file.stat().st_size for file in (folder / "runs/seed0").rglob("*") if file.is_file()
    ) - sum(f.stat().st_size for f in (folder / "runs/seed0").glob("tensorboard/*"))


def test_ls_names_a_run_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 999}')
    printed = " ".join(output_of(f"ls {tmp_path}").split())
    assert "unreadable" in printed
    assert "Install a newer sonde" in printed


def test_ls_says_that_there_are_no_runs(tmp_path: Path) -> None:
    assert call(f"ls {tmp_path}").stderr == f"no runs at or below {tmp_path}\n"


def test_tensorboard_prints_the_line_that_opens_it(folder: Path, tmp_path: Path) -> None:
    printed = output_of(f"tensorboard runs/seed0 runs/seed1 --logdir {tmp_path} --no-images")
    assert printed.splitlines()[-1] == f"tensorboard --logdir {tmp_path}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1"]


def test_seal_turns_journals_into_segments(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0)
    assert re.fullmatch(r"wrote .*\.h5\n", output_of(f"seal {tmp_path}/run"))
    assert output_of(f"seal {tmp_path}/run") == f"{tmp_path}/run: nothing to seal\n"


def test_verify_names_the_damage_and_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs" / "seed0"
    write_run(path, 0)
    seal_run(path)
    (segment,) = path.rglob("*.h5")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["verify", "runs/seed0"])
    assert result.exit_code == 1
    assert f"runs/seed0: attempt0-rank0/{segment.name}: " in result.stdout
    assert "checksum" in result.stdout
