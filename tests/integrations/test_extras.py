"""Integrations without the package they are for: one line names the extra to install."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("accelerate", "accelerate"),
        ("ignite", "pytorch-ignite"),
        ("lightning", "lightning"),
        ("transformers", "transformers"),
    ],
)
def test_without_the_package_one_line_names_the_extra(name: str, needed: str) -> None:
    code = f"import sys; sys.modules['{name}'] = None; import sonde.integrations.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        f"sonde.exceptions.MissingExtraError: sonde.integrations.{name} needs {needed}; "
        f"install it by: pip install 'sonde[{name}]'"
    )
