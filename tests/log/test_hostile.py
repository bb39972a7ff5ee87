"""Hostile runs: whatever values they hold, a reader ends with a result or with one plain error.

`hostile.py` makes them, with checksums that fit; `roads.py` reads them. Many are read by one forked
process, which may take 512 MiB more than it had, and a generous time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.limits import LIMIT_SECONDS

from .hostile import Case, all_cases, make_origins

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks, and limits processes")

_LIMIT_BYTES = 512 << 20
_BATCH = 60
_NAMES = ["journal", "segment", "gzip.h5", "zstd.h5"]
_SHARES = {"journal": 0.35, "segment": 0.35, "gzip.h5": 0.2, "zstd.h5": 0.1}


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_origins(tmp_path_factory.mktemp("origins"))


@pytest.fixture(scope="module")
def cases(origins: dict[str, Path]) -> dict[str, list[Case]]:
    return all_cases(origins)


def limit_memory() -> None:
    """Let this process take so much memory more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def try_case(origin: Path, case: Case, scratch: Path, number: int) -> list[str]:
    from .roads import faults_of

    content = case.content()
    copy = scratch / "copy"
    if case.file:
        shutil.copytree(origin, copy)
        (copy / case.file).write_bytes(content)
    else:
        copy = scratch / "copy.h5"
        copy.write_bytes(content)
        os.utime(copy, ns=(number, number))
    faults = faults_of(copy, scratch, is_wide=number % 8 == 0)
    for path in scratch.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return faults


def in_a_child(origin: Path, cases: Sequence[tuple[int, Case]], scratch: Path) -> list[str]:
    """Try cases in one forked process; return what is wrong."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        scratch.mkdir()
        with os.fdopen(writing, "w") as pipe:
            limit_memory()
            signal.alarm(LIMIT_SECONDS)
            for number, case in cases:
                try:
                    faults = try_case(origin, case, scratch, number)
                except BaseException:
                    faults = [traceback.format_exc()]
                print(json.dumps([case.what, faults]), file=pipe, flush=True)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        printed = [json.loads(line) for line in pipe]
    status = os.waitpid(pid, 0)[1]
    shutil.rmtree(scratch, ignore_errors=True)
    found = [f"{what}: {fault}" for what, faults in printed for fault in faults]
    if len(printed) < len(cases):
        ended = os.waitstatus_to_exitcode(status)
        found.append(f"{cases[len(printed)][1].what}: ended with {ended}")
    return found


@pytest.mark.parametrize("name", _NAMES)
def test_no_value_ends_a_reader(
    origins: dict[str, Path],
    cases: dict[str, list[Case]],
    memory_path: Path,
    name: str,
    is_full: bool,
    counts: Counter[str],
) -> None:
    from . import roads  # noqa: F401 - imported before the memory is limited

    num = round(_SHARES[name] * (5600 if is_full else 500))
    chosen = list(enumerate(cases[name][:num]))
    faults = []
    for start in range(0, len(chosen), _BATCH):
        batch = chosen[start : start + _BATCH]
        faults += in_a_child(origins[name], batch, memory_path / "scratch")
    assert len(chosen) == num
    counts[f"hostile values in {name}"] += num
    assert faults == []
