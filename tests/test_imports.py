"""Reading and analyzing must not pay for torch, nor a glance at the help for xarray."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = "import sys; print(sorted(m for m in {heavy!r} if m in sys.modules))"


def loaded_by(statement: str, heavy: list[str]) -> str:
    code = f"{statement}\n{LOADED.format(heavy=heavy)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import sonde", ["torch", "xarray", "pandas", "h5py", "numpy", "matplotlib"]),
        (
            "import sys; sys.argv = ['sonde', '--help']\n"
            "from sonde.cli import main\ntry: main()\nexcept SystemExit: pass",
            ["torch", "xarray", "pandas", "h5py", "matplotlib"],
        ),
        ("import sonde; sonde.analysis.cka", ["torch", "matplotlib"]),
        ("import sonde; sonde.open_run; import sonde.log.run", ["torch", "xarray"]),
        ("import sonde; sonde.Recorder", ["h5py", "xarray", "matplotlib"]),
        ("from sonde.log import LogWriter, LogArray", ["torch", "h5py", "xarray"]),
    ],
)
def test_heavy_modules_stay_out(statement: str, heavy: list[str]) -> None:
    assert loaded_by(statement, heavy) == "[]"


def test_every_public_name_resolves() -> None:
    import sonde

    assert [name for name in sonde.__all__ if getattr(sonde, name) is None] == []


def test_unknown_public_name_is_an_attribute_error() -> None:
    import sonde

    with pytest.raises(AttributeError, match="module 'sonde' has no attribute 'record'"):
        sonde.record  # noqa: B018 - the access itself is under test
