"""Starting trainings on several processes, as a user does: by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

import sonde
from tests.limits import LIMIT_SECONDS

WORKERS = Path(__file__).parent / "workers"

RunRanks: TypeAlias = "Callable[..., subprocess.CompletedProcess[str]]"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "num_ranks" in metafunc.fixturenames:
        is_parallel = metafunc.module.__name__.endswith("test_parallel")
        takes_four = is_parallel or metafunc.config.getoption("--full")
        metafunc.parametrize("num_ranks", [2, 4] if takes_four else [2], scope="module")


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """Run a worker script on several processes, and see that there were as many."""

    def run(
        worker: str | Path, *arguments: object, num_ranks: int = 2, returncode: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(WORKERS / worker), *map(str, arguments)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(sonde.__file__).parents[1]),
            },
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        if returncode is not None:
            assert done.returncode == returncode, done.stderr
        for rank in range(num_ranks):
            # On the CPU some launchers start one process without a word.
            assert f"rank {rank} of {num_ranks}" in done.stdout
        return done

    return run
