"""Every example runs as a user runs it, and ends with what it read from its log."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sonde
from tests.limits import LIMIT_SECONDS

FOLDER = Path(__file__).resolve().parents[1] / "examples"
# These have tests of their own: one draws, exports and takes longer, the other runs on two ranks.
TESTED_ELSEWHERE = {"quickstart", "accelerate_digits"}
EXAMPLES = {
    "ignite_engine": "stiffness",
    "lbfgs": "stiffness",
    "lightning_trainer": "stiffness",
    "plain_loop": "CKA",
    "steps_by_hand": "stiffness",
    "transformers_trainer": "stiffness",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*EXAMPLES, *TESTED_ELSEWHERE}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_records_a_training_and_reads_a_number(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "switches it off" not in done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert EXAMPLES[name] in last
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", last)]
    assert numbers
    assert all(0 < number < 1 for number in numbers)
    assert sonde.open_run(tmp_path / "run").state == "finished"
