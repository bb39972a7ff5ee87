"""Help: every command and option has it, and the examples in it run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sonde.cli import app

from .conftest import output_of, write_run

COMMANDS = (
    "run ls show cka blocks components stiffness boundary sweep tensorboard export seal verify"
).split()
TRAINING = """
import torch
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.randn(32, 4)).sum().backward()
    optimizer.step()
"""


def write_training(folder: Path) -> None:
    """Write a script that trains a little, also as a module, and a configuration."""
    (folder / "train.py").write_text(TRAINING)
    (folder / "project").mkdir()
    (folder / "project" / "train.py").write_text(TRAINING)
    (folder / "sonde.yaml").write_text("measures: [activations, scalars]\nwhen: {every: 2}")


def examples_of(command: str) -> list[str]:
    wide = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).stdout
    return [line.strip() for line in re.findall(r"\$ sonde (.*)", wide)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_documents_an_example_of_itself(command: str) -> None:
    examples = examples_of(command)
    assert examples
    assert all(example.split()[0] == command for example in examples)


def test_every_command_and_option_has_help() -> None:
    # Asked in a process of its own: typer's command objects differ between its versions.
    code = """if True:
        import typer.main, sonde.cli
        group = typer.main.get_command(sonde.cli.app)
        print(",".join(group.commands))
        for command in (group, *group.commands.values()):
            assert command.help, command.name
            for parameter in command.params:
                assert getattr(parameter, "help", None), (command.name, parameter.name)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().split(",") == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_example_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"seed{seed}", seed)
    monkeypatch.chdir(tmp_path)
    write_training(tmp_path)
    for example in examples_of(command):
        words = shlex.split(example)
        if command == "run":
            done = subprocess.run([sys.executable, "-m", "sonde", *words], check=False)
            assert done.returncode == 0
            continue
        assert output_of(example)
        for option, file in pairwise(words):
            if option in ("--figure", "--csv", "--nc"):
                assert (tmp_path / file).stat().st_size > 0
