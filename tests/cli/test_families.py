"""`sonde ls --config`, `--by` and `--where`, and `sonde sweep`."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from sonde.analysis import fragmentation
from sonde.log import open_runs

from .conftest import call, error_of, output_of, write_run


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for width in (8, 64):
        for seed in (0, 1):
            config: dict[str, object] = {"width": width, "seed": seed, "sgd": {"lr": 0.1}}
            write_run(tmp_path / "runs" / f"w{width}s{seed}", width + seed, config=config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def test_ls_shows_the_configuration(swept: Path) -> None:
    printed = output_of("ls runs --config")
    assert re.search(r"measures +width +seed +sgd\.lr", printed)
    assert re.search(r"runs/w64s1 .* 64 +1 +0\.1", printed)


def test_ls_chooses_by_values(swept: Path) -> None:
    printed = output_of("ls runs --where width=64 --where seed=0,1")
    assert ("w64s0" in printed, "w64s1" in printed, "w8s0" in printed) == (True, True, False)


def test_ls_says_when_none_fits(swept: Path) -> None:
    result = call("ls runs --where width=9")
    assert (result.exit_code, result.stderr) == (0, "no run has width=9\n")


def test_ls_groups_by_keys(swept: Path) -> None:
    rows = output_of("ls runs --by width,sgd.lr").splitlines()
    assert rows[0].split() == ["width", "sgd.lr", "number", "last", "step", "runs"]
    assert [row.split() for row in rows[2:]] == [
        ["8", "0.1", "2", "30", "w8s0,", "w8s1"],
        ["64", "0.1", "2", "30", "w64s0,", "w64s1"],
    ]


def test_ls_names_runs_without_the_key(swept: Path) -> None:
    write_run(swept / "runs" / "other", 9, config={})
    result = call("ls runs --by width")
    assert result.stderr == "sonde: --by leaves out runs without 'width': other\n"
    assert "other" not in result.stdout


def test_ls_refuses_a_key_that_no_run_has(swept: Path) -> None:
    assert "no run has the configuration key 'w'; keys: width, seed, sgd.lr" in error_of(
        "ls runs --where w=3"
    )


def test_ls_refuses_a_condition_without_a_value(swept: Path) -> None:
    assert "`--where` (=width) must be KEY=VALUE, such as width=64" in error_of(
        "ls runs --where width"
    )


def test_ls_json_holds_the_configuration(swept: Path) -> None:
    facts = json.loads(output_of("ls runs --json --where width=8,9"))
    assert [run["config"] for run in facts] == [
        {"width": 8, "seed": seed, "sgd.lr": 0.1} for seed in (0, 1)
    ]


def test_sweep_prints_mean_and_spread(swept: Path) -> None:
    family = open_runs("runs").where(width=64)
    values = [float(fragmentation(run).fragmentation[-1]) for run in family]
    expected = rf"64 +2 +{np.mean(values):.2f} ±{np.std(values, ddof=1):.2f}"
    printed = output_of("sweep runs --over width")
    assert printed.startswith("fragmentation over width, mean ± spread of 4 runs\n")
    assert re.search(expected, printed)


def test_sweep_writes_every_combination(swept: Path) -> None:
    output_of("sweep runs/* --over width --group seed --of stiffness --csv out.csv --figure a.png")
    rows = list(csv.DictReader((swept / "out.csv").read_text().splitlines()))
    assert [(row["seed"], row["width"], row["num_runs"]) for row in rows] == [
        ("0", "8", "1"),
        ("0", "64", "1"),
        ("1", "8", "1"),
        ("1", "64", "1"),
    ]
    assert all(-1 <= float(row["cosine_within"]) <= 1 for row in rows)


def test_sweep_says_that_no_run_fits(swept: Path) -> None:
    assert "`--where` (=width=9) fits none of 4 runs" in error_of(
        "sweep runs --over width --where width=9"
    )
