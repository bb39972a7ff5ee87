"""The example of Accelerate, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sonde
from tests.limits import LIMIT_SECONDS

from .conftest import RunRanks

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "accelerate_digits.py"


def assert_recorded(path: Path, printed: str, num_ranks: int) -> None:
    assert f"step 0: {64 * num_ranks} examples, of processes {list(range(num_ranks))}" in printed
    run = sonde.open_run(path)
    assert run["activations", "probe"].gram(-1, "head").shape == (200, 200)
    losses = run.scalars.stack("loss")
    assert losses[-1] < losses[1] / 2
    assert np.isfinite(losses).all()


def test_the_example_runs_on_one_process(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_recorded(tmp_path / "run", done.stdout, 1)


def test_the_example_runs_on_two_processes(
    run_ranks: RunRanks, is_full: bool, tmp_path: Path
) -> None:
    if not is_full:
        pytest.skip("the tests of every day run it on one process")
    done = run_ranks(SCRIPT, "--out", tmp_path / "run", "--epochs", 6)
    assert_recorded(tmp_path / "run", done.stdout, 2)
