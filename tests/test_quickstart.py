"""The quickstart, run as a user runs it: to its end, and killed in the middle."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sonde
from sonde.analysis import cka, reproducibility, stiffness
from tests.limits import LIMIT_SECONDS

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"
FIGURES = [
    "cka_across",
    "cka_within",
    "class_matrix",
    "decision_planes",
    "fragmentation",
    "reproducibility",
    "stiffness",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--epochs", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture
def runs(finished: tuple[Path, str]) -> dict[str, sonde.Run]:
    return {name: sonde.open_run(finished[0] / name) for name in ("seed0", "seed1", "random")}


def test_it_prints_one_table_with_every_analysis(finished: tuple[Path, str]) -> None:
    rows = re.findall(r"│ (\w[^│]*?) +│", finished[1])
    assert {"accuracy, test", "fragmentation (regions per plane)"} <= set(rows)
    assert "nan" not in finished[1]


def test_it_draws_every_figure(finished: tuple[Path, str]) -> None:
    assert sorted(path.stem for path in finished[0].glob("*.png")) == FIGURES


def test_it_writes_event_files_for_each_run(finished: tuple[Path, str]) -> None:
    found = {path.relative_to(finished[0]).parts[0] for path in finished[0].rglob("*tfevents*")}
    assert found == {"seed0", "seed1", "random"}


def test_it_records_every_measure_and_seals_it(runs: dict[str, sonde.Run]) -> None:
    for run in runs.values():
        assert run.measures == [
            "activations",
            "example_gradients",
            "predictions",
            "decision_planes",
            "scalars",
        ]
        assert (run.state, run.damage) == ("finished", [])
        assert list(run.path.rglob("*.journal")) == []


def test_random_labels_pull_together_far_less_than_true_ones(runs: dict[str, sonde.Run]) -> None:
    within = {
        name: float(stiffness(run, steps=[-1]).cosine_within[0]) for name, run in runs.items()
    }
    assert within["random"] < 0.7 * within["seed0"]


def test_a_run_reproduces_itself_and_another_seed_better_than_chance(
    runs: dict[str, sonde.Run],
) -> None:
    result = reproducibility(list(runs.values()))
    agreement = result.agreement.values
    assert np.diagonal(agreement).tolist() == [1.0, 1.0, 1.0]
    assert agreement[0, 1] > 0.8
    assert agreement[0, 2] < 0.3


def test_early_layers_agree_across_seeds(runs: dict[str, sonde.Run]) -> None:
    similarity = cka(runs["seed0"], runs["seed1"])
    assert float(similarity.sel(layer="conv1", other_layer="conv1")) > 0.9


def test_a_kill_in_the_middle_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--epochs", "500"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen: list[int] = []
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(seen) < 8 and time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "seed0" / "run.json").exists():
            seen = sonde.open_run(tmp_path / "seed0").steps()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = sonde.open_run(tmp_path / "seed0")
    assert len(seen) >= 8
    assert run.state == "interrupted"
    assert run.steps()[: len(seen)] == seen
    assert not [damage for damage in run.damage if not damage.is_tail]
    for step in seen[:-1]:
        gram = run.activations.gram(step, "conv1")
        assert np.array_equal(gram, gram.T)
    for command in (["ls", str(tmp_path)], ["show", str(run.path)]):
        shown = subprocess.run(
            [sys.executable, "-m", "sonde", *command], capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, shown.stderr
        assert "interrupted" in shown.stdout
