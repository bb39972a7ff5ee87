"""`sonde blocks`: what it prints and writes."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from sonde.log import LogArray, LogWriter
from sonde.log.format.files import write_run_file

from .conftest import error_of, output_of


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of 10 layers, of which the third to the seventh are alike."""
    for seed in (0, 1):
        path = tmp_path / "runs" / f"seed{seed}"
        path.mkdir(parents=True)
        write_run_file(path, {"config": {"seed": seed}})
        generator = np.random.default_rng(seed)
        writer = LogWriter(path, seal=False)
        writer.add_table("probe", [LogArray("id", np.arange(30), ("example",))])
        for step in (0, 5):
            common = generator.normal(size=(30, 5))
            layers = []
            for index in range(10):
                x = generator.normal(size=(30, 5)) * (0.4 if 2 <= index < 7 else 1)
                x += common * (2 <= index < 7)
                dims = ("example", "other_example")
                layers.append(LogArray("gram", x @ x.T, dims, layer=f"layer{index}"))
            writer.append("activations", "probe", step, layers)
        writer.close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def test_blocks_are_listed_with_their_bounds(planted: Path) -> None:
    printed = output_of("blocks runs/seed0 --csv blocks.csv --figure map.png --nc blocks.nc")
    assert printed.startswith("1 block of runs/seed0, 30 examples of 'probe'\n")
    row = r"5 +layer2 +layer6 +5 +0\.\d\d +0\.\d\d +0\.005 +2 \(\d–\d\) +6 \(\d–\d\) +[01]\.\d\d"
    assert re.search(row, printed)
    (written,) = csv.DictReader((planted / "blocks.csv").read_text().splitlines())
    assert (written["step"], written["first_layer"], written["end"]) == ("5", "layer2", "7")
    with xr.open_dataset(planted / "blocks.nc") as read:
        assert int(read["num_blocks"]) == 1
    assert (planted / "map.png").stat().st_size > 0


def test_no_block_is_said(planted: Path) -> None:
    printed = output_of("blocks runs/seed0 --min-contrast 0.99 --null 20 --intervals 0")
    assert printed == (
        "0 blocks, 1 too faint (contrast below 0.99) of runs/seed0, 30 examples of 'probe'\n"
    )


def test_blocks_of_several_steps_have_a_row_each(planted: Path) -> None:
    printed = output_of("blocks runs/seed1 --steps 0,-1 --null 40 --intervals 0 --figure a.png")
    assert re.findall(r"^ *(\d) +layer2 +layer6", printed, re.M) == ["0", "5"]


def test_blocks_of_a_family_are_averaged(planted: Path) -> None:
    options = "--null 40 --intervals 0 --csv out.csv --figure a.png"
    printed = output_of(f"blocks runs {options}")
    assert printed.startswith("blocks of 2 runs, mean ± spread\n")
    assert re.search(r"2 +1\.00 ±0\.00 +0\.50 ±0\.00 +5\.00 ±0\.00", printed)
    (row,) = csv.DictReader((planted / "out.csv").read_text().splitlines())
    assert (row["num_runs"], float(row["largest_size"])) == ("2", 5)


def test_wrong_steps_are_refused(planted: Path) -> None:
    assert "`--steps` (=a) must be whole numbers" in error_of("blocks runs/seed0 --steps a")


def test_components_are_listed_with_their_dominant_examples(planted: Path) -> None:
    options = "--dominant 3 --csv out.csv --nc out.nc --figure out.png"
    printed = output_of(f"components runs/seed0 {options}")
    assert printed.startswith("components of runs/seed0, 'probe'\n")
    row = r"layer2 +0\.\d\d +\d\.\d +[01]\.\d\d +\d+, \d+, \d+"
    assert re.search(row, printed)
    rows = list(csv.DictReader((planted / "out.csv").read_text().splitlines()))
    assert (len(rows), 0 < float(rows[0]["variance_share_0"]) < 1) == (10, True)
    with xr.open_dataset(planted / "out.nc") as read:
        assert read["alignment"].shape == (10, 10)


def test_components_of_seeds_are_aligned_between_them(planted: Path) -> None:
    printed = output_of("components runs --between")
    assert "alignment with other runs" in " ".join(printed.split())
    grouped = output_of("components runs --by seed --csv out.csv")
    assert re.search(r"1 +layer9 +0\.\d\d", grouped)
    assert (planted / "out.csv").read_text().startswith("seed,layer,variance_share_0")


def test_nearest_neighbours_are_compared_instead_of_cka(planted: Path) -> None:
    printed = output_of("cka runs/seed0 --knn 4 --null 40 --layers layer2,layer3,layer9")
    assert printed.startswith(
        "share of 4 nearest neighbours in common (chance: 0.14) of runs/seed0, step 5, 30 examples"
    )
    assert "*" in printed
    assert "`--knn` goes without --biased, --bandwidth, which are of CKA" in error_of(
        "cka runs/seed0 --knn 4 --biased --bandwidth 1"
    )
