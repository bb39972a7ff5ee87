"""`sonde cka`, `stiffness` and `boundary`: what they print and write."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from .conftest import LAYERS, error_of, output_of, write_run


def test_cka_says_what_it_is(folder: Path) -> None:
    assert output_of("cka runs/seed0").splitlines()[0] == (
        "debiased CKA of runs/seed0, step 30, 20 examples of 'probe'"
    )
    assert output_of("cka runs/seed0 runs/seed1 --step 0 --biased").splitlines()[0] == (
        "biased CKA of runs/seed0, step 0 and runs/seed1, step 0, 20 examples of 'probe'"
    )


def test_cka_prints_the_matrix_of_the_selected_layers(folder: Path) -> None:
    printed = output_of("cka runs/seed0 --layers conv*,fc")
    assert re.search(r"0 +conv1 +1\.00 +0\.\d\d *\n", printed)
    assert re.search(r"1 +fc +0\.\d\d +1\.00 *\n", printed)
    assert "relu" not in printed


def test_cka_compares_layers_of_other_names(folder: Path) -> None:
    printed = output_of("cka runs/seed0 runs/seed1 --layers conv* --other-layers fc")
    assert re.search(r"conv1 +-?0\.\d\d *\n", printed)
    assert len(re.findall(r"0\.\d\d", printed)) == 1


def test_cka_marks_what_is_beyond_chance(folder: Path, tmp_path: Path) -> None:
    printed = output_of(f"cka runs/seed0 --null 40 --intervals 9 --csv {tmp_path}/cka.csv")
    assert "1.00*" in printed
    rows = list(csv.DictReader((tmp_path / "cka.csv").read_text().splitlines()))
    assert len(rows) == len(LAYERS) ** 2
    first = next(row for row in rows if row["layer"] == row["other_layer"] == "fc")
    assert float(first["p_value"]) == pytest.approx(1 / 41)
    assert float(first["low"]) <= float(first["cka"]) + 1e-9


def test_cka_of_a_family_is_a_map_per_group(folder: Path, tmp_path: Path) -> None:
    printed = output_of(f"cka runs --by seed --nc {tmp_path}/cka.nc")
    assert printed.startswith("debiased CKA of mean of 2 runs, step 30, 20 examples of 'probe'\n")
    assert "seed 0 (1 runs)" in printed
    with xr.open_dataarray(tmp_path / "cka.nc") as read:
        assert read.dims == ("seed", "layer", "other_layer")


def test_cka_of_pairs_is_printed_as_json(folder: Path) -> None:
    printed = json.loads(output_of("cka runs --between --json"))
    assert printed["coords"]["num_pairs"]["data"] == 1
    assert np.array(printed["data"]).shape == (4, 4)


def test_cka_of_three_runs_asks_what_is_meant(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "third", 2)
    assert "3 runs were given; take their --mean, group them --by" in error_of(
        f"cka runs/seed0 runs/seed1 {tmp_path}/third"
    )
    assert "`--rank` is of one run or two" in error_of("cka runs --mean --rank 0")
    assert "`--without` (=a) must be whole numbers" in error_of("cka runs/seed0 --without a")


def test_cka_of_many_layers_is_summarised(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0, layers=[f"layer{index}" for index in range(21)])
    printed = output_of(f"cka {tmp_path}/run")
    assert "The matrix (21 × 21) is too large for a table" in printed
    assert re.search(r"layer20 +– +layer\d+ +0\.\d\d", printed)


def test_cka_csv_holds_the_whole_matrix(folder: Path, tmp_path: Path) -> None:
    output_of(f"cka runs/seed0 --csv {tmp_path}/cka.csv")
    header, *rows = (tmp_path / "cka.csv").read_text().splitlines()
    assert header.split(",") == ["layer", *LAYERS]
    matrix = np.array([[float(value) for value in row.split(",")[1:]] for row in rows])
    np.testing.assert_allclose(np.diagonal(matrix), 1)


def test_stiffness_compares_runs(folder: Path, tmp_path: Path) -> None:
    printed = output_of(f"stiffness runs/seed0 runs/seed1 --csv {tmp_path}/out.csv")
    assert printed.startswith(
        "stiffness within and between classes, 1 of 2 parameters (`sonde show` says why): "
        "seed0, seed1, 20 examples of 'probe'\n"
    )
    assert printed.count("seed1 ") == 4
    header, *rows = (tmp_path / "out.csv").read_text().splitlines()
    assert header == (
        "run,step,cosine_within,cosine_between,sign_within,sign_between,num_zero_gradients"
    )
    assert [row.split(",")[:2] for row in rows[:2]] == [["seed0", "0"], ["seed0", "10"]]


def test_stiffness_over_all_pairs_has_one_column_per_kind(folder: Path) -> None:
    header = output_of("stiffness runs/seed0 --by none --steps -1").splitlines()[1]
    assert header.split() == ["run", "step", "cosine", "sign", "zero", "gradients"]


def test_boundary_compares_runs(folder: Path) -> None:
    printed = output_of("boundary runs/seed0 runs/seed1")
    assert "5 planes of 'planes'" in printed
    assert re.search(r"seed0 +seed1 +0\.\d{3} +0\.\d{3}–0\.\d{3} +0\.\d{3} +0\.\d{3}", printed)


def test_runs_of_the_same_name_are_told_apart_by_their_path(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "seed0", 2)
    assert f"runs/seed0, {tmp_path}/seed0," in output_of(f"stiffness runs/seed0 {tmp_path}/seed0")
