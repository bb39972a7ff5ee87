"""Every code block of the README runs as it stands, and prints what it says it prints."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")

SCRIPTS = README.parent / "tests" / "scripts"
# What stands for the reader's own files.
FILES = {
    "train.py": (SCRIPTS / "mnist.py").read_text(),
    "digest.py": (SCRIPTS / "digest.py").read_text(),
    "probes.py": """
import sonde
import torch

def test_set():
    return sonde.Probe(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
""",
    "sonde.yaml": next(block for language, block in BLOCKS if language == "yaml"),
}
# What `make` does is what runs these tests.
NOT_RUN = ("make", "tensorboard", "pip", "git")


def run_shell(block: str, folder: Path) -> None:
    for line in block.strip().splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] in NOT_RUN:
            continue
        assert words[0] == "sonde", f"the README runs something that is not tested: {line}"
        command = [sys.executable, "-m", "sonde", *words[1:]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def same_text(actual: str, stated: str) -> None:
    """Words agree exactly; numbers to 0.15, as other processors round training otherwise."""
    assert NUMBER.sub("#", actual).split() == NUMBER.sub("#", stated).split()
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (actual, stated)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.15)


def test_the_readme_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    names: dict[str, Any] = {}
    printed: str | None = None
    num_compared = 0
    for language, block in BLOCKS:
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block, "README.md", "exec"), names)
            printed = output.getvalue()
        elif language == "bash":
            run_shell(block, tmp_path)
        elif language == "text" and printed:
            same_text(printed, block)
            printed = None
            num_compared += 1
    assert num_compared == sum(language == "text" for language, _ in BLOCKS)


def test_the_readme_has_blocks_of_each_kind() -> None:
    assert {"python", "bash", "text"} <= {language for language, _ in BLOCKS}


def test_every_picture_and_link_of_the_readme_exists() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (README.parent / target).exists()] == []
