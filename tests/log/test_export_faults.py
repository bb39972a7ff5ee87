"""Exports that fail: an error, nothing left behind, and memory that stays bounded."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.export import export_run
from sonde.log.export import write_run as export_module
from sonde.log.sealing import output as output_module

from .alike import write_compressible
from .conftest import new_run, write_records

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks, and limits processes")


@pytest.fixture(scope="module")
def compressible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compressible(tmp_path_factory.mktemp("compressible") / "run")


EXPORT_WITH_LIMITS = """if True:
    import errno, os, resource, signal, sys
    from pathlib import Path
    from sonde.log import open_run
    from sonde.log.export import export_run

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    folder = Path(sys.argv[2])
    for limit in map(int, sys.argv[3:]):
        pid = os.fork()
        if pid == 0:
            # The process ends as any other does, so that libhdf5 has its say at the exit.
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                export_run(open_run(sys.argv[1]), folder / "out.h5")
            except OSError as error:
                sys.exit(7 if error.errno == errno.EFBIG else 8)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *os.listdir(folder), flush=True)
"""


def test_a_full_disk_ends_in_an_error_and_leaves_nothing(
    compressible: Path, tmp_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    size = export_run(open_run(compressible), tmp_path / "whole.h5").stat().st_size
    num = 400 if is_full else 25
    limits = [size * number // num for number in range(num)] + [size - 1]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_WITH_LIMITS, compressible, folder, *map(str, limits)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (set(done.stdout.split("\n")), done.stderr) == ({"7", ""}, "")
    assert done.stdout.count("7\n") == num + 1
    counts["exports to a full disk"] += num + 1


def test_an_interrupt_leaves_nothing(
    compressible: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for target, name in ((output_module, "write_at"), (export_module, "encode_trailer")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                export_run(open_run(compressible), folder / "out.h5")
        assert os.listdir(folder) == []
    with pytest.raises(KeyboardInterrupt):
        export_run(open_run(compressible), folder / "out.h5", on_part=interrupt)
    assert os.listdir(folder) == []


def test_a_file_is_forced_to_the_disk_before_it_takes_its_name(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(run_path, range(3))
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(fd: int) -> None:
        calls.append("fsync of a folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync")
        fsync(fd)

    def note_replace(path: Path, target: Path) -> Path:
        assert path.read_bytes()[-52:].startswith(b"SONDEEXP")
        calls.append(f"rename to {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    export_run(open_run(run_path), tmp_path / "out.h5")
    assert calls == ["fsync", "rename to out.h5", "fsync of a folder"]


def test_a_killed_export_leaves_the_file_that_was_there(run_path: Path, tmp_path: Path) -> None:
    write_records(run_path, range(3))
    out = tmp_path / "out.h5"
    export_run(open_run(run_path), out)
    before = out.read_bytes()
    pid = os.fork()
    if pid == 0:
        parts: list[str] = []

        def die_at_the_third(part: str) -> None:
            parts.append(part)
            if len(parts) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        export_run(open_run(run_path), out, overwrite=True, on_part=die_at_the_third)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert out.read_bytes() == before
    export_run(open_run(run_path), out, overwrite=True)
    assert open_run(out).steps() == [0, 1, 2]


MEASURE_MEMORY = """if True:
    import re, sys
    from pathlib import Path
    from sonde.log import open_run
    from sonde.log.export import export_run
    from sonde.log.verify import verify_run

    def peak():
        # Of this program alone; getrusage counts the process in that it was started, too.
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024

    small, large, out = map(Path, sys.argv[1:])
    export_run(open_run(small), out, compression="zstd")
    open_run(out).activations.array("loss")
    before = peak()
    export_run(open_run(large), out, compression="zstd", overwrite=True)
    exported = peak()
    log = open_run(out).activations
    for layer, field in log.streams:
        for step in log.steps:
            log.array(field, step, layer)
    assert verify_run(out) == []
    print(exported - before, peak() - before)
"""


def test_memory_stays_bounded(compressible: Path, tmp_path: Path, is_full: bool) -> None:
    rng = np.random.default_rng(0)
    num_records = 256 if is_full else 24
    writer = LogWriter(new_run(tmp_path / "large"), seal=False)
    for step in range(num_records):
        arrays = [
            LogArray("full", rng.normal(size=(256, 2048)), ("example", "feature"), "fc"),
            LogArray("ragged", rng.normal(size=1000 * step), ("element",)),
            *(LogArray("gram", rng.normal(size=(64, 64)), ("a", "b"), str(n)) for n in range(128)),
        ]
        assert writer.append("activations", "probe", step, arrays)
        writer.flush()
    writer.close()
    arguments = [compressible, tmp_path / "large", tmp_path / "out.h5"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    # An array takes 4 MiB, the cache of unpacked chunks up to 32 MiB, the list of records the rest.
    exported, read = map(float, done.stdout.split())
    assert exported < (64 if is_full else 32)
    assert read < (96 if is_full else 64)
    assert (tmp_path / "out.h5").stat().st_size > 4 * num_records << 20
