"""What is printed: errors and warnings of one line, plain text in pipes, readable numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sonde.cli.console import steps_text, thinned
from sonde.log import LogArray, LogWriter
from sonde.log.format.files import write_run_file
from sonde.sizes import size_text

from .conftest import call, error_of, output_of


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show nowhere", "nowhere does not exist; expected a run directory"),
        ("show runs", "runs is no run directory, but holds some: runs/seed0, runs/seed1"),
        ("ls nowhere", "nowhere does not exist; expected a folder of runs"),
        ("cka runs/seed0 --layers conv9", "matches 'conv9'.*layers: conv1, layer1.0.conv2"),
        ("cka runs/seed0 --step 7", "step 7 .*recorded steps: 0, 10, 20, 30"),
        ("cka runs/seed0 --source test", "no source 'test'; it has: probe"),
        ("cka runs/seed0 --figure out.docx", r"`--figure` \(=out.docx\) must end in .*png"),
        ("cka runs/seed0 --csv no/such/folder.csv", "No such file or directory"),
        ("stiffness runs/seed0 --layer rnn", "recorded layers: conv1"),
        ("stiffness runs/seed0 --steps 0,x", r"`--steps` \(=0,x\) must be whole numbers"),
        ("boundary runs/seed0 --draw agreement", "name at least 2"),
        ("tensorboard nowhere", "nowhere does not exist"),
        ("seal nowhere", "nowhere does not exist"),
        ("export nowhere out.h5", "nowhere does not exist"),
        ("export runs/seed0 runs", "runs is a folder; expected the name of a file"),
        ("export runs/seed0 runs/seed0/run.json", "run.json exists; replace it by --overwrite"),
        ("export runs/seed0 x.h5 --layers conv9", "matches 'conv9'; did you mean .*conv1"),
        ("export runs/seed0 x.h5 --steps 7", "has step 7; near it: 0, 10"),
        ("export runs/seed0 x.h5 --steps 1:9", "lies in 1:9; recorded steps: 0, 10"),
        ("export runs/seed0 x.h5 --steps 0;9", r"`--steps` \(=0;9\) must be whole .*0:1000:100"),
        ("export runs/seed0 x.h5 --steps 1:2:3:4", "must be whole numbers separated by commas"),
        ("export runs/seed0 x.h5 --measures loss", "no records of 'loss'; it has: activations"),
    ],
)
def test_errors_are_one_line(folder: Path, line: str, message: str) -> None:
    assert re.search(message, error_of(line))


def test_missing_measure_says_what_there_is(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    writer = LogWriter(tmp_path, seal=False)
    writer.append("scalars", "training", 0, [LogArray("loss", np.array(1.0), ())])
    writer.close()
    assert "no records of 'activations'; it has: scalars" in error_of(f"cka {tmp_path}")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line_on_stderr(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    writer = LogWriter(tmp_path, seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(8), ("example",))])
    features = np.random.default_rng(0).normal(size=(8, 3))
    grams = {"a": features @ features.T, "dead": np.zeros((8, 8))}
    dims = ("example", "other_example")
    arrays = [LogArray("gram", gram, dims, layer=name) for name, gram in grams.items()]
    writer.append("activations", "probe", 0, arrays)
    writer.close()
    result = call(f"cka {tmp_path}")
    assert result.exit_code == 0
    assert re.fullmatch(r"sonde: warning: CKA is NaN .*'dead' .*\n", result.stderr)


def test_piped_output_has_no_escape_codes(folder: Path) -> None:
    assert "\x1b" not in output_of("show runs/seed0")


def test_output_survives_a_terminal_without_unicode(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "sonde", "ls"], capture_output=True, env=environment, check=True
    )
    assert b"runs/seed0" in done.stdout


def test_sizes_have_units() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
    ]


def test_steps_are_summarised() -> None:
    assert steps_text([0, 10, 20]) == "0 to 20, every 10"
    assert steps_text([0, 1, 10]) == "0 to 10"
    assert steps_text([]) == "–"


def test_thinning_keeps_both_ends() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned(range(3), 4) == [0, 1, 2]
