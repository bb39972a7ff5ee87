"""Exports that are damaged or cannot be written: nothing wrong is read, nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from sonde.exceptions import DamageError, LayerNotFoundError, RunNotFoundError, SondeError
from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log import export as export_module
from sonde.log import output as output_module
from sonde.log.compression import Compression
from sonde.log.export import export_run
from sonde.log.verify import verify_run

from .conftest import Array, new_run, overwrite, write_records
from .test_export import COMPRESSIONS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks, and limits processes")

Read = dict[tuple[str, int, str | None, str], Array]


def write_compressible(path: Path) -> Path:
    """Record arrays in many chunks that compress, ragged and small ones among them."""
    rng = np.random.default_rng(0)
    writer = LogWriter(new_run(path), seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(32), ("example",))])
    for step in range(40):
        features = np.maximum(rng.normal(size=(32, 300)), 0).astype(np.float32)
        arrays = [
            LogArray("full", features, ("example", "feature"), "fc"),
            LogArray("bits", features.view(np.uint16)[:, ::2], ("a", "b"), "fc", "bfloat16"),
            LogArray("ragged", features.reshape(-1)[: 40 * step], ("element",)),
            LogArray("loss", np.array(step / 3), ()),
        ]
        writer.append("activations", "probe", step, arrays[step % 3 == 1 :], {"step": step})
    writer.close()
    return path


@pytest.fixture(scope="module")
def compressible(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compressible(tmp_path_factory.mktemp("compressible") / "run")


def read_all(run: Run) -> Read:
    """Read all arrays of `activations` and its ids; leave out those that are refused."""
    read: Read = {}
    if "activations" not in run.measures:
        return read
    log = run["activations"]
    for step in log.steps:
        for layer, field in log.streams:
            with contextlib.suppress(DamageError, LayerNotFoundError):
                read["record", step, layer, field] = log.array(field, step, layer)
    with contextlib.suppress(DamageError):
        read["table", 0, None, "id"] = log.table("id")
    return read


def faults_of(path: Path, whole: Read) -> list[str]:
    """Read and verify a damaged file; return what is wrong with how it is read."""
    faults = []
    try:
        found = read_all(open_run(path))
    except (DamageError, RunNotFoundError):
        found = {}
    except SondeError as error:
        faults.append(f"refused as {type(error).__name__}: {error}")
        found = {}
    for key, values in found.items():
        if (values.dtype, values.shape, values.tobytes()) != (
            whole[key].dtype,
            whole[key].shape,
            whole[key].tobytes(),
        ):
            faults.append(f"{key} is wrong")
    try:
        if not verify_run(path):
            faults.append("the damage is not reported")
    except RunNotFoundError:
        pass
    return faults


def in_a_child(
    path: Path, changes: Sequence[tuple[str, bytes]], whole: Read, seconds: int
) -> list[str]:
    """Give a file one content after the other in a forked process, and read each."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(5 * seconds)
        with os.fdopen(writing, "w") as pipe:
            for version, (what, content) in enumerate(changes, 1):
                try:
                    overwrite(path, content, version)
                    faults = faults_of(path, whole)
                except BaseException:
                    faults = [traceback.format_exc()]
                print(json.dumps([what, faults]), file=pipe, flush=True)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        printed = [json.loads(line) for line in pipe]
    status = os.waitpid(pid, 0)[1]
    found = [f"{what}: {fault}" for what, faults in printed for fault in faults]
    if len(printed) < len(changes):
        found.append(f"{changes[len(printed)][0]}: ended with {os.waitstatus_to_exitcode(status)}")
    return found


def flips(content: bytes, rng: random.Random, num: int) -> Iterator[tuple[str, bytes]]:
    """Change a bit or a byte, every fourth time among the last bytes."""
    for number in range(num):
        size = len(content)
        position = size - 1 - rng.randrange(80) if number % 4 == 0 else rng.randrange(size)
        mask = 1 << rng.randrange(8) if number % 2 else rng.randrange(1, 256)
        changed = bytearray(content)
        changed[position] ^= mask
        yield f"byte {position} ^ {mask:#x}", bytes(changed)


def splices(content: bytes, rng: random.Random, num: int) -> Iterator[tuple[str, bytes]]:
    """Cut a file, or zero, remove, insert or move a stretch of it."""
    size = len(content)
    while num:
        length = min(size, int(2 ** rng.uniform(0, 16)))
        start, at = rng.randrange(size - length + 1), rng.randrange(size - length + 1)
        stretch = content[start : start + length]
        what, changed = rng.choice(
            [
                ("cut", content[:at]),
                ("zeroed", content[:at] + bytes(length) + content[at + length :]),
                ("removed", content[:at] + content[at + length :]),
                ("inserted", content[:at] + stretch + content[at:]),
                ("moved", content[:at] + stretch + content[at + length :]),
                ("appended", content + stretch),
            ]
        )
        if changed != content:
            num -= 1
            yield f"{what} {start} to {start + length} at {at}", changed


@pytest.mark.parametrize("damage", [flips, splices])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_no_damage_is_read_as_data_or_ends_the_reader(
    compressible: Path,
    tmp_path: Path,
    compression: Compression,
    damage: Callable[[bytes, random.Random, int], Iterator[tuple[str, bytes]]],
    is_full: bool,
    counts: Counter[str],
) -> None:
    out = tmp_path / "out.h5"
    export_run(open_run(compressible), out, compression=compression)
    whole = read_all(open_run(out))
    assert len(whole) == 40 * 4 - 13 + 1
    content = out.read_bytes()
    changes = list(
        damage(
            content, random.Random(compression), 1000 if is_full else 70 if damage is flips else 35
        )
    )
    seconds = 600 if is_full else 120
    assert in_a_child(out, changes, whole, seconds) == []
    counts[f"{damage.__name__} of exported runs"] += len(changes)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_flipped_byte_of_a_chunk_costs_the_records_in_it(
    compressible: Path, tmp_path: Path, compression: Compression
) -> None:
    out = tmp_path / "out.h5"
    export_run(open_run(compressible), out, compression=compression)
    whole = read_all(open_run(out))
    content = bytearray(out.read_bytes())
    position = len(content) // 5
    content[position] ^= 1
    overwrite(out, bytes(content), 1)
    (damage,) = verify_run(out)
    assert damage.path.endswith("/out.h5")
    assert damage.offset <= position < damage.offset + damage.num_bytes
    label = (
        r"'full' of layer 'fc' \(activations, steps (\d+) to (\d+)\) does not match its checksum"
    )
    found = re.fullmatch(label, damage.reason)
    assert found
    first, last = map(int, found.groups())
    assert 0 < last - first < 8
    run = open_run(out)
    lost = whole.keys() - read_all(run).keys()
    steps = [step for step in range(first, last + 1) if step % 3 != 1]
    assert lost == {("record", step, "fc", "full") for step in steps}
    with pytest.raises(DamageError, match=rf"out\.h5: {label}"):
        run.activations.array("full", first, "fc")


def test_an_array_is_checked_after_it_is_unpacked(
    compressible: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.h5"
    export_run(open_run(compressible), out)

    def unpack_wrongly(raw: bytes, num_bytes: int, compression: Compression) -> bytes:
        return bytes(num_bytes)

    monkeypatch.setattr("sonde.log.export_streams.decompress", unpack_wrongly)
    with pytest.raises(DamageError, match=r"'full' of layer 'fc' \(activations, step 5\) does not"):
        open_run(out).activations.array("full", 5, "fc")


@pytest.mark.parametrize("size", [0, 51, 52, 3000, -1])
def test_a_file_that_is_cut_short_is_refused_by_name(
    run_path: Path, tmp_path: Path, size: int
) -> None:
    write_records(run_path, range(3))
    out = tmp_path / "out.h5"
    export_run(open_run(run_path), out)
    os.truncate(out, size if size >= 0 else out.stat().st_size + size)
    if size in (0, 51, 52):
        with pytest.raises(RunNotFoundError, match=r"out\.h5 is a file; expected a run directory"):
            open_run(out)
        return
    message = r"/out\.h5: the file has no valid trailer: it is cut short or damaged"
    with pytest.raises(DamageError, match=message):
        open_run(out)
    (damage,) = verify_run(out)
    assert damage.reason == "the file has no valid trailer: it is cut short or damaged"


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
    import resource, sys
    from pathlib import Path
    from sonde.log import open_run
    from sonde.log.export import export_run
    from sonde.log.verify import verify_run

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

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
            *(LogArray("gram", rng.normal(size=(64, 64)), ("a", "b"), str(n)) for n in range(20)),
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
    # An array takes 4 MiB; the cache of unpacked chunks up to 32 MiB.
    exported, read = map(float, done.stdout.split())
    assert exported < 32
    assert read < 80
    assert (tmp_path / "out.h5").stat().st_size > 4 * num_records << 20
