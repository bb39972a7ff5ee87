import os
import subprocess
import sys
from types import FunctionType

import pytest

from sonde import analysis


@pytest.mark.parametrize("module", ["matplotlib", "torch"])
def test_importing_the_analyses_does_not_load(module: str) -> None:
    script = f"import sonde.analysis, sys; sys.exit({module!r} in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0


@pytest.mark.parametrize("name", ["cka", "stiffness"])
def test_an_analysis_is_the_function_not_its_module(name: str) -> None:
    assert isinstance(getattr(analysis, name), FunctionType)


def test_public_names_are_sorted_and_exist() -> None:
    assert analysis.__all__ == sorted(name for name in analysis.__all__ if hasattr(analysis, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'sonde\.analysis' has no attribute 'cca'"):
        getattr(analysis, "cca")  # noqa: B009  # The attribute is unknown to type checkers.
