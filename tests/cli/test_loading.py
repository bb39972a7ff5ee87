"""What a command loads: neither help nor an analysis waits for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "xarray", "pandas", "matplotlib", "h5py", "tensorboard", "scipy"]


def loaded_after(code: str) -> list[str]:
    check = f"import sys; print(*sorted(set(sys.modules) & set({HEAVY})), file=sys.stderr)"
    code = f"import contextlib\nwith contextlib.suppress(SystemExit):\n {code}\n{check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.split()


@pytest.mark.parametrize("line", ["import sonde.cli", "import sonde.__main__"])
def test_import_loads_nothing_heavy(line: str) -> None:
    assert loaded_after(line) == []


@pytest.mark.parametrize("arguments", ["--help", "cka --help", "--version"])
def test_help_loads_nothing_heavy(arguments: str) -> None:
    assert loaded_after(f"import sonde.cli; sonde.cli.app({arguments.split()})") == []


@pytest.mark.parametrize(
    "arguments",
    [
        "ls runs",
        "show runs/seed0",
        "cka runs/seed0 --figure cka.svg",
        "stiffness runs/seed0",
        "boundary runs/seed0 runs/seed1",
        "tensorboard runs/seed0 --logdir boards",
        "export runs/seed0 out.h5",
        "seal runs/seed0",
    ],
)
def test_no_command_loads_torch(folder: Path, tmp_path: Path, arguments: str) -> None:
    words = [f"{folder}/{word}" if "runs" in word else word for word in arguments.split()]
    line = f"import os, sonde.cli; os.chdir({str(tmp_path)!r}); sonde.cli.app({words})"
    assert "torch" not in loaded_after(line)
