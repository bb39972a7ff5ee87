"""Exported runs that are damaged: nothing wrong is read, and what is lost is named."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from sonde.exceptions import DamageError, LayerNotFoundError, RunNotFoundError, SondeError
from sonde.log import Run, open_run
from sonde.log.export import export_run
from sonde.log.reading.compression import Compression
from sonde.log.verify import verify_run
from tests.limits import LIMIT_SECONDS

from .alike import write_compressible
from .conftest import Array, write_records
from .files import overwrite
from .test_export import COMPRESSIONS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks, and limits processes")

Read = dict[tuple[str, int, str | None, str], Array]


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


def in_a_child(path: Path, changes: Sequence[tuple[str, bytes]], whole: Read) -> list[str]:
    """Give a file one content after the other in a forked process, and read each."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            for version, (what, content) in enumerate(changes, 1):
                signal.alarm(LIMIT_SECONDS)
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
    """Change a bit or a byte; in every other case near the end, where the metadata is."""
    size = len(content)
    for number in range(num):
        near_the_end = size - int(2 ** rng.uniform(0, math.log2(size)))
        position = near_the_end if number % 2 else rng.randrange(size)
        mask = 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
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
    assert in_a_child(out, changes, whole) == []
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

    monkeypatch.setattr("sonde.log.reading.export_streams.decompress", unpack_wrongly)
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


@pytest.mark.parametrize("position", [0, 20_000, -52])
def test_a_file_of_another_size_than_it_states_is_refused(
    compressible: Path, tmp_path: Path, position: int
) -> None:
    out = tmp_path / "out.h5"
    content = export_run(open_run(compressible), out).read_bytes()
    overwrite(out, content[:position] + bytes(8) + content[position:], 1)
    with pytest.raises(DamageError, match=r"out\.h5: the file does not have the size its trailer"):
        open_run(out)
    assert len(verify_run(out)) == 1
