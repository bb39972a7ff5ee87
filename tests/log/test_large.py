"""Large arrays, beyond what one call or one piece takes; and a thousand awkward names."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.format.names import stream_name
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run
from tests.limits import LIMIT_SECONDS

from .conftest import Open, assert_holds, assert_identical, read_records
from .doomed import time_limit
from .files import frame_bounds, frames_of, journal_of, journals_of, segments_of

GIB = 1 << 30
SURROGATE = "\ud800"


def run_alone(action: str, path: Path, dtype: str, num: int) -> int:
    """Act in a process of its own; return the memory it took, in bytes."""
    command = [sys.executable, "-m", "tests.log.gigabytes", action, str(path), dtype, str(num)]
    folder = Path(__file__).parents[2]
    return int(subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE).stdout)


def available_bytes() -> int:
    """Return how much memory processes may take, what only caches files included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.parametrize(("dtype", "num"), [("uint8", 2**31 + 5), ("float32", 2**30 + 3)])
def test_array_of_gigabytes_comes_back_bit_for_bit(
    run_path: Path, is_full: bool, counts: Counter[str], dtype: str, num: int
) -> None:
    num_bytes = num * np.dtype(dtype).itemsize
    if not is_full:
        pytest.skip("takes gigabytes and minutes; the tests below go the same way in small steps")
    if available_bytes() < 3 * num_bytes or shutil.disk_usage(run_path).free < 3 * num_bytes:
        pytest.skip(f"needs {3 * num_bytes >> 30} GiB of memory and of disk")
    run_alone("write", run_path, dtype, num)
    assert journals_of(run_path)[0].stat().st_size > num_bytes
    run_alone("read", run_path, dtype, num)
    assert run_alone("seal", run_path, dtype, num) < GIB // 2
    assert segments_of(run_path)[0].stat().st_size > num_bytes
    run_alone("read", run_path, dtype, num)
    counts["arrays of more than 2 GiB"] += 1


@pytest.fixture(params=[16, 61, 4096])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Read and write in pieces of some bytes, and let no call do more than a part of its work."""
    size = int(request.param)
    pread, pwritev = os.pread, os.pwritev

    def read_some(fd: int, count: int, offset: int) -> bytes:
        return pread(fd, min(count, size // 2 + 1), offset)

    def write_some(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        first = memoryview(buffers[0])
        if len(buffers) > 1 and first.nbytes < size:
            return pwritev(fd, buffers[:2], offset)
        return pwritev(fd, [first[: size // 2 + 3]], offset)

    for module in ("scan", "segment_file", "segment_records"):
        monkeypatch.setattr(f"sonde.log.reading.{module}._CHUNK_BYTES", size)
    monkeypatch.setattr("sonde.log.sealing.segment_writer._BATCH_BYTES", size)
    monkeypatch.setattr("sonde.log.format.positioned._MAX_BUFFERS", 3)
    monkeypatch.setattr(os, "pread", read_some)
    monkeypatch.setattr(os, "pwritev", write_some)
    with time_limit(LIMIT_SECONDS):
        yield size


def arrays_around(size: int, seed: int) -> list[LogArray]:
    """Return arrays that end just before, at and behind multiples of a size."""
    rng = np.random.default_rng(seed)
    sizes = [0, 1, 7, size - 1, size, size + 1, 2 * size - 1, 2 * size, 3 * size + 5]
    arrays = [
        LogArray("full", rng.integers(0, 256, n, np.uint8), ("n",), f"layer{position}")
        for position, n in enumerate(sizes)
    ]
    ragged = rng.normal(size=seed * size // 3)
    bits = rng.integers(0, 2**16, (3, size), np.uint16)
    return [
        *arrays,
        LogArray("ragged", ragged, ("n",)),
        LogArray("bits", bits, ("a", "b"), None, "bfloat16"),
    ]


def write_around(path: Path, size: int) -> None:
    writer = LogWriter(path, seal=False)
    for number, array in enumerate(arrays_around(size, 7)):
        writer.add_table(f"probe{number}", [replace(array, layer=None)])
    for step in range(4):
        # A record that lacks a stream is filled up, in pieces too.
        arrays = arrays_around(size, step)[step == 2 :]
        assert writer.append("activations", "probe", step, arrays)
    writer.close()
    assert writer.problem is None


def test_arrays_larger_than_every_piece_come_back_bit_for_bit(
    run_path: Path, small_pieces: int
) -> None:
    write_around(run_path, small_pieces)
    for _ in ("journal", "segment"):
        assert verify_run(run_path) == []
        run = open_run(run_path)
        read = read_records(run)
        assert list(read) == list(range(4))
        for step in read:
            assert_holds(arrays_around(small_pieces, step)[step == 2 :], read[step])
        stacked = run.activations.stack("full", range(4), "layer5")
        expected = [arrays_around(small_pieces, step)[5].values for step in range(4)]
        assert_identical(stacked, np.stack(expected))
        seal_run(run_path)
    assert len(segments_of(run_path)) == 1


def test_damage_is_found_in_pieces(run_path: Path, small_pieces: int) -> None:
    write_around(run_path, small_pieces)
    journal = journal_of(run_path)
    content = journal.read_bytes()
    kinds = [frame.kind for frame in frames_of(journal)]
    start, end = frame_bounds(journal)[kinds.index("record")]
    # The start of the next record lies across pieces in one way or another.
    for position in range(start, start + 40, 3):
        damaged = bytearray(content)
        damaged[position] ^= 1
        journal.write_bytes(damaged)
        assert open_run(run_path).steps() == [1, 2, 3]
        (damage,) = verify_run(run_path)
        assert (damage.offset, damage.offset + damage.num_bytes) == (start, end)
    journal.write_bytes(content)
    seal_run(run_path)
    segment = segments_of(run_path)[0]
    whole = segment.read_bytes()
    start = whole.find(arrays_around(small_pieces, 3)[8].values.tobytes())
    for position in (start, start + small_pieces, start + 3 * small_pieces + 4, 2000):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        segment.write_bytes(damaged)
        os.utime(segment, ns=(position, position))
        (damage,) = verify_run(run_path)
        is_in_record = (
            "'full' of layer 'layer8' of record 15 (activations, step 3)" in damage.reason
        )
        assert is_in_record == (position != 2000)


def awkward_names(num: int) -> list[str]:
    """Return names of every kind a str can hold, each different from all others."""
    rng = random.Random(0)
    names = ["", " ", ".", "..", "./a", "../a", "a/..", "a/", "/a", "//", "%", "%2F", "%2f", "%25"]
    names += [chr(code) for code in (*range(33), *range(0x7F, 0xA1), 0x2028, 0xFEFF, 0xFFFF)]
    names += list("!\"#$&'()*+,-:;<=>?@[\\]^_`{|}~")
    names += ["Conv", "conv", "CONV", "cOnV", "é", "e\u0301", "ﬁ", "fi", "ß", "SS", "ss"]
    names += ["a\0", "a\0b", "a", "a\r\n", "\u202ea", "🧠", "👩‍👩‍👧", "\U0010ffff", "层", "İ", "i̇"]
    names += ["step", "sequence", "presence", "example", "target", "a::shape", "a:shape", "_", "__"]
    names += ["nan", "0", "-1", "None", "null", "true", '"', "[]", "{}", "\\u0041", "\\"]
    names += [char * 10_000 for char in "x/:%é🧠\1"]
    alphabet = [chr(code) for block in (0x0, 0x300, 0x2000, 0x4E00, 0xE000, 0xFF00, 0x1F300)
                for code in range(block, block + 256)]  # fmt: skip
    kept = dict.fromkeys(names)
    while len(kept) < num:
        kept["".join(rng.choices(alphabet, k=rng.randrange(1, 12)))] = None
    return list(kept)


def test_a_thousand_awkward_names_stay_apart(run_path: Path, opened: Open) -> None:
    names = awkward_names(1000)
    written = {}
    writer = LogWriter(run_path, seal=False)
    for step in range(2):
        # Some layers have another shape at each step, and some are missing from one.
        written[step] = [
            LogArray("gram", np.full(2 + step * (number % 7 == 0), number), (name,), name)
            for number, name in enumerate(names)
            if step == 0 or number % 5
        ]
        assert writer.append("activations", "probe", step, written[step])
    writer.close()
    run = opened(run_path)
    assert run.layers == names
    read = read_records(run)
    for step, arrays in written.items():
        assert_holds(arrays, read[step])
        described = run.activations.describe(step)
        assert {key: stream.dims for key, stream in described.items()} == {
            (array.layer, "gram"): array.dims for array in arrays
        }
    for number in (0, 20, 400, 999):
        assert run.activations[names[number]].array("gram", 0).tolist() == [number] * 2
    assert verify_run(run_path) == []


def write_names(path: Path, names: Sequence[str]) -> list[str]:
    """Write one record with a layer of each name, and its number; return how streams are named."""
    writer = LogWriter(path, seal=False)
    arrays = [LogArray("gram", np.full(2, n), ("n",), name) for n, name in enumerate(names)]
    assert writer.append("activations", "probe", 0, arrays)
    writer.close()
    return [stream_name(name, "gram") for name in names]


def test_a_thousand_awkward_names_are_variables_of_a_tree(run_path: Path, opened: Open) -> None:
    labels = write_names(run_path, awkward_names(1000))
    dataset = opened(run_path).to_xarray()["activations/probe"].to_dataset()
    assert list(dataset.data_vars) == labels
    assert [dataset[label].values[0, 1] for label in labels] == list(range(1000))


def test_awkward_names_are_variables_of_a_segment(run_path: Path, is_full: bool) -> None:
    # h5netcdf takes 10 ms for each; those that are no mere mixtures come first.
    names = awkward_names(1000 if is_full else 220)
    labels = write_names(run_path, names)
    (segment,) = seal_run(run_path)
    group = "activations/probe"
    with xarray.open_dataset(segment, group=group, engine="h5netcdf") as dataset:
        assert set(labels) <= set(dataset.data_vars)
        for number, (label, name) in enumerate(zip(labels, names, strict=True)):
            assert dataset[label].values.tolist() == [[number, number]]
            # An attribute of HDF5 ends at a NUL.
            assert dataset[label].attrs.get("layer", "") == name.split("\0")[0]


def test_name_of_half_a_character_is_read_from_a_journal(run_path: Path) -> None:
    write_half_a_character(run_path)
    assert open_run(run_path).activations.array("gram", 0, SURROGATE).tolist() == [1]


def test_name_of_half_a_character_can_be_sealed(run_path: Path) -> None:
    write_half_a_character(run_path)
    assert seal_run(run_path)
    assert open_run(run_path).activations.array("gram", 0, SURROGATE).tolist() == [1]


def write_half_a_character(path: Path) -> None:
    """Write a layer whose name holds a lone surrogate, which a str can and UTF-8 cannot."""
    writer = LogWriter(path, seal=False)
    writer.append("activations", "probe", 0, [LogArray("gram", np.ones(1), ("n",), SURROGATE)])
    writer.close()
