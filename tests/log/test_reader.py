"""Round trips and the reader's view of files: bit-exact, each record once, damage by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sonde.exceptions import DamageError, FormatError
from sonde.log import LogArray, LogWriter, open_run
from sonde.log.reading import index as reader_module
from sonde.log.sealing.seal import seal_journal, seal_run
from sonde.log.verify import verify_run

from .conftest import (
    Array,
    Open,
    as_read,
    assert_holds,
    assert_identical,
    assert_intact,
    new_run,
    read_records,
    write_one,
    write_records,
)
from .doomed import record_of
from .files import journal_of, journals_of, overwrite, segment_of, segments_of

DTYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 bfloat16"
).split()
WEIRD_NAMES = [
    "", " ", "/", "//", ".", "..", "./a", ":", "a:b", "%", "%2F", "a/b.c", "\0", "\n\t", "größe",
    "层", "🧠", "step", "sequence", "presence", "crc32", "stream", "axis", "element", "data",
    "shape", "example", "metadata", "x" * 1000,
]  # fmt: skip


def every_bit_pattern(dtype: str, rng: np.random.Generator, shape: tuple[int, ...]) -> LogArray:
    """Return random bits: among floats also NaNs with payloads, infinities and negative zeros."""
    dims = tuple(f"axis_{axis}" for axis in range(len(shape)))
    if dtype == "bool":
        return LogArray("a", rng.random(shape) < 0.5, dims)
    storage = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    num_bytes = int(np.prod(shape)) * storage.itemsize
    values = np.frombuffer(rng.bytes(num_bytes), storage).reshape(shape)
    return LogArray("a", values, dims, dtype="bfloat16" if dtype == "bfloat16" else None)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (40, 50), (3, 0, 2), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_array_comes_back_bit_for_bit(
    run_path: Path, opened: Open, dtype: str, shape: tuple[int, ...]
) -> None:
    array = every_bit_pattern(dtype, np.random.default_rng(1), shape)
    write_one(run_path, [array])
    assert_identical(opened(run_path).activations.array("a", as_stored=True), as_read(array))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_nan_payloads_survive(run_path: Path, opened: Open, dtype: str) -> None:
    storage = "uint16" if dtype in ("float16", "bfloat16") else dtype.replace("float", "uint")
    width = np.dtype(storage).itemsize * 8
    bits = np.array([2**width - 1, 2**width - 2, 2 ** (width - 1) - 3], storage)
    values = bits if dtype == "bfloat16" else bits.view(dtype)
    array = LogArray("a", values, ("n",), dtype="bfloat16" if dtype == "bfloat16" else None)
    write_one(run_path, [array])
    read = opened(run_path).activations.array("a", as_stored=True)
    assert np.isnan(read).all()
    assert_identical(read, as_read(array))


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[::2],
        lambda a: a[:, ::-3],
        lambda a: a.T,
        lambda a: a[1, 2, ...],
        lambda a: np.broadcast_to(a[0], (5, *a.shape[1:])),
        lambda a: a.astype(">f4"),
        np.asfortranarray,
    ],
)
def test_array_of_any_memory_layout_is_stored_by_value(
    run_path: Path, opened: Open, view: Callable[[Array], Array]
) -> None:
    values = view(np.arange(120, dtype=np.float32).reshape(4, 5, 6))
    write_one(run_path, [LogArray("a", values, tuple("xyz"[: values.ndim]))])
    read = opened(run_path).activations.array("a")
    assert (read.dtype, read.tolist()) == (np.dtype("float32"), values.tolist())


@pytest.mark.parametrize("name", WEIRD_NAMES, ids=lambda name: ascii(name)[:12])
def test_any_name_names_a_layer_a_field_a_measure_and_a_source(
    run_path: Path, opened: Open, name: str
) -> None:
    rng = np.random.default_rng(2)
    keys = [(name, "gram"), (None, name), (name, name), ("fc", name)]
    arrays = [LogArray(f, rng.normal(size=3), ("example",), layer) for layer, f in keys]
    writer = LogWriter(run_path, seal=False)
    writer.add_table(name, [LogArray("id", np.arange(3), ("example",))])
    assert writer.append(name, name, 0, arrays)
    writer.close()
    run = opened(run_path)
    log = run[name, name]
    assert run.measures == [name]
    assert log.streams == keys
    assert_identical(log.table("id"), np.arange(3))
    for array in arrays:
        assert_identical(log.array(array.field, 0, array.layer), array.values)


def test_all_weird_names_stand_side_by_side(run_path: Path, opened: Open) -> None:
    keys = [(layer, field) for layer in (None, *WEIRD_NAMES) for field in WEIRD_NAMES]
    arrays = [
        LogArray(field, np.array([number]), (field or "dim",), layer)
        for number, (layer, field) in enumerate(keys)
    ]
    write_one(run_path, arrays)
    log = opened(run_path).activations
    assert [log.array(field, 0, layer).item() for layer, field in keys] == list(range(len(keys)))


def test_helpers_of_a_segment_do_not_take_the_names_of_streams(
    run_path: Path, opened: Open
) -> None:
    # Ragged and reserved streams get helper datasets; dimensions get one per size.
    keys = [("x", "shape"), (None, "x"), (None, "presence"), ("presence", "data"), (None, "n_3")]
    writer = LogWriter(run_path, seal=False)
    for step in range(2):
        arrays = [LogArray(f, np.arange(2 + step), ("n",), layer) for layer, f in keys]
        arrays.append(LogArray("other", np.arange(3), ("n_3",)))
        writer.append("activations", "probe", step, arrays)
    writer.close()
    log = opened(run_path).activations
    for layer, field in keys:
        assert [len(log.array(field, step, layer)) for step in range(2)] == [2, 3]


@pytest.mark.parametrize("name", ["tables", "metadata", "metadata_byte"])
def test_measure_may_be_named_like_a_part_of_a_segment(
    run_path: Path, opened: Open, name: str
) -> None:
    writer = LogWriter(run_path, seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(2), ("example",))])
    writer.append(name, "probe", 0, [LogArray("a", np.arange(3), ("n",))])
    writer.close()
    assert opened(run_path)[name].array("a").tolist() == [0, 1, 2]


def test_ragged_streams_come_back_whole(run_path: Path, opened: Open) -> None:
    rng = np.random.default_rng(3)
    shapes = [(3,), (0,), (2, 4), (), (2, 0), (5,), (3,)]
    dims = ("a", "b")
    writer = LogWriter(run_path, seal=False)
    values = [rng.integers(0, 2**16, shape, np.uint16) for shape in shapes]
    for step, value in enumerate(values):
        names = dims[: value.ndim]
        arrays = [
            LogArray("bits", value, names, "fc", "bfloat16"), LogArray("plain", value, names)
        ]  # fmt: skip
        writer.append("activations", "probe", step, arrays[step % 2 :])
    writer.close()
    log = opened(run_path).activations
    for step, value in enumerate(values):
        assert_identical(log.array("plain", step), value)
        if step % 2 == 0:
            expected = as_read(LogArray("bits", value, (), dtype="bfloat16"))
            assert_identical(log.array("bits", step, "fc"), expected)
            assert log.describe(step)["fc", "bits"].shape == value.shape


def test_stream_whose_number_of_axes_changes_comes_back_whole(run_path: Path, opened: Open) -> None:
    writer = LogWriter(run_path, seal=False)
    shapes = [(4,), (2, 3), (), (1, 2, 2)]
    for step, shape in enumerate(shapes):
        names = ("row", "column", "depth")[: len(shape)]
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape) + step
        writer.append("m", "s", step, [LogArray("a", values, names, "fc")])
    writer.close()
    log = opened(run_path).m
    for step, shape in enumerate(shapes):
        expected = np.arange(np.prod(shape, dtype=int)).reshape(shape) + step
        assert_identical(log.array("a", step, "fc"), expected)
        assert log.describe(step)["fc", "a"].shape == shape
        assert len(log.describe(step)["fc", "a"].dims) == len(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stream_that_some_records_lack_comes_back_where_it_is(
    run_path: Path, opened: Open, dtype: str
) -> None:
    rng = np.random.default_rng(4)
    writer = LogWriter(run_path, seal=False)
    written = {}
    for step in range(6):
        written[step] = every_bit_pattern(dtype, rng, (3, 2))
        writer.append("activations", "probe", step, [written[step]] if step in (1, 2, 4) else [])
    writer.close()
    log = opened(run_path).activations
    assert log.steps == list(range(6))
    assert [step for step in log.steps if log.describe(step)] == [1, 2, 4]
    assert_identical(
        log.stack("a", [1, 2, 4], as_stored=True),
        np.stack([as_read(written[step]) for step in (1, 2, 4)]),
    )


names = st.text(max_size=6) | st.sampled_from(WEIRD_NAMES)
values = st.one_of(
    [hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
     for dtype in DTYPES if dtype != "bfloat16"]
)  # fmt: skip
streams = st.dictionaries(st.tuples(st.none() | names, names), st.tuples(values, names), max_size=5)


@settings(max_examples=60, derandomize=True, database=None)
@given(records=st.lists(streams, min_size=1, max_size=3))
def test_whatever_is_recorded_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[tuple[str | None, str], tuple[Array, str]]],
) -> None:
    path = new_run(tmp_path_factory.mktemp("any") / "run")
    writer = LogWriter(path, seal=False)
    dtypes: dict[tuple[str | None, str], Any] = {}
    written = []
    for step, record in enumerate(records):
        arrays = []
        for key, (value, dim) in record.items():
            # One stream has one dtype within a journal.
            value = np.resize(value, value.shape).astype(dtypes.setdefault(key, value.dtype))
            dims = tuple(f"{dim}{axis or ''}" for axis in range(value.ndim))
            arrays.append(LogArray(key[1], value, dims, key[0]))
        written.append(arrays)
        writer.append("activations", "probe", step, arrays)
    writer.close()
    for _ in ("journal", "segment"):
        read = read_records(open_run(path))
        assert list(read) == list(range(len(records)))
        for step, arrays in enumerate(written):
            assert_holds(arrays, read[step])
        seal_run(path)
    assert segments_of(path)


def test_a_flipped_byte_of_an_array_costs_that_array_only(run_path: Path) -> None:
    write_records(run_path, [0, 5, 10, 15])
    seal_run(run_path)
    segment = segment_of(run_path)
    with h5py.File(segment) as file:
        dataset = file["activations/probe/conv1:gram"]
        row_bytes = dataset.size * dataset.dtype.itemsize // len(dataset)
        position = dataset.id.get_offset() + 2 * row_bytes + 5
    content = bytearray(segment.read_bytes())
    content[position] ^= 1
    overwrite(segment, bytes(content), 1)
    run = open_run(run_path)
    message = r"'gram' of layer 'conv1' of record \d+ \(activations, step 10\) does not match"
    with pytest.raises(DamageError, match=message):
        run.activations.array("gram", 10, "conv1")
    assert_identical(run.activations.array("gram", 5, "conv1"), record_of(5)[0].values)
    (damage,) = verify_run(run_path)
    assert "(activations, step 10) does not match its checksum" in damage.reason


def test_damage_outside_of_all_records_is_found_too(run_path: Path) -> None:
    write_records(run_path, range(2))
    seal_run(run_path)
    segment = segment_of(run_path)
    overwrite(segment, b"x" + segment.read_bytes()[1:], 1)
    assert_intact(run_path, range(2))
    (damage,) = verify_run(run_path)
    assert damage.reason == "bytes that belong to no record do not match their checksum"


def test_an_intact_run_verifies(run_path: Path) -> None:
    write_records(run_path, range(6), segment_bytes=3000)
    seal_run(run_path, before=8)
    assert verify_run(run_path) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "the segment is cut short"),
        (lambda content: content[:31], "the segment is cut short"),
        (lambda content: content[:-1], "the segment has no valid trailer: it is cut short or dam"),
        (lambda content: content[9:], "the segment does not have the size its trailer states"),
    ],
)
def test_damage_of_a_segment_says_what_is_wrong(
    run_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    write_records(run_path, range(3))
    seal_run(run_path)
    segment = segment_of(run_path)
    overwrite(segment, change(segment.read_bytes()), 1)
    (damage,) = open_run(run_path).damage
    assert str(damage).startswith(f"attempt0-rank0/{segment.name}: {reason}")


def test_damaged_segment_leaves_the_others_readable(run_path: Path) -> None:
    write_records(run_path, range(12), segment_bytes=3000)
    seal_run(run_path)
    middle = segments_of(run_path)[1]
    os.truncate(middle, 1000)
    run = open_run(run_path)
    assert 0 < len(run.steps()) < 12
    assert_intact(run_path, run.steps())
    assert len(run.damage) == 1


def test_segment_of_a_newer_format_is_refused(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(run_path, [0])
    with monkeypatch.context() as newer:
        newer.setattr("sonde.log.reading.segment.FORMAT_VERSION", 2)
        seal_run(run_path)
    message = r"\.h5 has log format 2; this sonde reads up to 1\. Install a newer sonde"
    with pytest.raises(FormatError, match=message):
        open_run(run_path)


def test_record_in_both_journal_and_segment_counts_once(run_path: Path, tmp_path: Path) -> None:
    write_records(run_path, range(5))
    journal = journal_of(run_path)
    shutil.copy(journal, tmp_path / "kept")
    seal_run(run_path)
    shutil.copy(tmp_path / "kept", journal)
    assert_intact(run_path, range(5))
    seal_run(run_path)
    assert journals_of(run_path) == []
    assert_intact(run_path, range(5))


def test_damage_in_both_journal_and_segment_is_reported_once(
    run_path: Path, tmp_path: Path
) -> None:
    write_records(run_path, range(5))
    journal = journal_of(run_path)
    os.truncate(journal, journal.stat().st_size - 1)
    shutil.copy(journal, tmp_path / "kept")
    seal_run(run_path)
    shutil.copy(tmp_path / "kept", journal)
    assert len(open_run(run_path).damage) == 1


def test_what_is_left_of_a_journal_whose_segment_is_whole_is_no_damage(
    run_path: Path, tmp_path: Path
) -> None:
    write_records(run_path, range(6))
    journal = journal_of(run_path)
    content = bytearray(journal.read_bytes())
    seal_run(run_path)
    content[1000:1400] = bytes(400)
    journal.write_bytes(content)
    assert_intact(run_path, range(6))
    assert open_run(run_path).damage == []
    # Beside a segment that is damaged it may be all there is, so it counts.
    segment = segment_of(run_path)
    segment.write_bytes(segment.read_bytes()[:-10])
    assert len(open_run(run_path).damage) == 2


def test_copy_of_a_journal_adds_no_record(run_path: Path) -> None:
    write_records(run_path, range(3))
    journal = journal_of(run_path)
    shutil.copy(journal, journal.with_name("000000000099.journal"))
    assert_intact(run_path, range(3))


def test_temporary_and_foreign_files_are_ignored(run_path: Path) -> None:
    write_records(run_path, range(3))
    folder = journal_of(run_path).parent
    for name in ("000000000000-000000000005.1.tmp", "notes.txt", "1.journal", ".nfs0001", "x.h5"):
        (folder / name).write_bytes(b"not a log")
    (run_path / "attempt-rank0").mkdir()
    (run_path / "attempt7-rank0").write_bytes(b"a file")
    assert assert_intact(run_path, range(3)).damage == []


@pytest.mark.parametrize("size", [0, 20, 40])
def test_journal_without_frames_holds_nothing(run_path: Path, size: int) -> None:
    write_records(run_path, range(3))
    os.truncate(journal_of(run_path), size)
    assert_intact(run_path, [])
    assert seal_run(run_path) == []


def test_tail_of_a_live_journal_is_no_damage(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    writer.append("activations", "probe", 0, record_of(0))
    writer.flush()
    with journal_of(run_path).open("ab") as file:
        file.write(b"\x93SONDE\r\n on its way")
    assert assert_intact(run_path, [0]).damage == []
    writer.close()


def test_damage_within_a_live_journal_is_reported(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for number in range(3):
        writer.append("activations", "probe", number, record_of(number))
    writer.flush()
    content = bytearray(journal_of(run_path).read_bytes())
    content[len(content) // 2] ^= 1
    journal_of(run_path).write_bytes(content)
    assert [damage.is_tail for damage in open_run(run_path).damage] == [False]
    writer.close()


@pytest.mark.parametrize("moment", ["segments", "journals"])
def test_journal_sealed_while_the_folder_is_listed_is_not_missed(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write_records(run_path, range(12), segment_bytes=3000)
    listing = getattr(reader_module, moment)

    def list_then_seal(folder: Path) -> object:
        listed = listing(folder)
        for journal in journals_of(run_path)[:1]:
            seal_journal(journal)
        return listed

    monkeypatch.setattr(reader_module, moment, list_then_seal)
    assert_intact(run_path, range(12))


def test_journal_sealed_after_the_run_was_opened_is_found_again(run_path: Path) -> None:
    write_records(run_path, range(3))
    run = open_run(run_path)
    seal_run(run_path)
    for number in range(3):
        assert_identical(run.activations.array("loss", number), record_of(number)[3].values)


def test_table_whose_journal_was_sealed_is_found_again(run_path: Path) -> None:
    write_records(run_path, range(3))
    log = open_run(run_path).activations
    seal_run(run_path)
    assert log.table("id").tolist() == [100, 101, 102, 103, 104]


def test_run_recorded_anew_at_the_same_path_is_read_anew(run_path: Path) -> None:
    for value in (1, 2):
        shutil.rmtree(run_path)
        new_run(run_path)
        write_one(run_path, [LogArray("a", np.full(3, value), ("n",))])
        seal_run(run_path)
        assert open_run(run_path).activations.array("a").tolist() == [value] * 3


@pytest.mark.parametrize("was_sealed", [False, True])
def test_run_opened_before_its_path_was_recorded_anew_reads_no_mixture(
    run_path: Path, was_sealed: bool
) -> None:
    write_one(run_path, [LogArray("a", np.full(3, 1), ("n",))])
    if was_sealed:
        seal_run(run_path)
    old = open_run(run_path)
    shutil.rmtree(run_path)
    new_run(run_path)
    write_one(run_path, [LogArray("b", np.zeros(9), ("n",)), LogArray("a", np.zeros(4), ("n",))])
    if was_sealed:
        seal_run(run_path)
    assert open_run(run_path).activations.array("a").shape == (4,)
    assert old.activations.array("a").shape in ((3,), (4,))


def test_a_run_of_many_segments_holds_no_file_open(run_path: Path) -> None:
    write_records(run_path, range(70), segment_bytes=1)
    assert len(seal_run(run_path)) >= 70
    run = open_run(run_path)
    losses = run.activations.stack("loss")
    assert losses.tolist() == [record_of(number)[3].values.item() for number in range(70)]
    assert_identical(run.activations.array("loss", 0), record_of(0)[3].values)
