"""Export: what a reader sees of a run, bit for bit in one file."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.exceptions import (
    DamageError,
    FormatError,
    InvalidInputError,
    RunExistsError,
    RunNotFoundError,
    SondeWarning,
)
from sonde.log import LogArray, LogWriter, open_run
from sonde.log.export import export_run
from sonde.log.export import writer as export_writer_module
from sonde.log.reading.compression import Compression
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run

from .alike import assert_alike, export_and_open
from .conftest import Array, Open, new_run, write_records
from .doomed import record_of
from .files import overwrite, segment_of
from .shapes import SHAPES, write_shape
from .test_reader import DTYPES, WEIRD_NAMES, every_bit_pattern, streams

COMPRESSIONS: list[Compression] = list(get_args(Compression))
STORED = ["float16", "float32", "float64", "bfloat16"]


@pytest.fixture(params=["chunks of 1 MiB", "chunks of 64 bytes"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export streams in one piece each, and in many small ones."""
    if request.param == "chunks of 64 bytes":
        monkeypatch.setattr(export_writer_module, "CHUNK_BYTES", 64)
        monkeypatch.setattr(export_writer_module, "_PLAIN_BYTES", 0)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_exported_run_reads_like_the_run(
    tmp_path: Path, shape: str, compression: Compression
) -> None:
    write_shape(tmp_path / "run", shape, 0)
    run = export_and_open(tmp_path / "run", compression=compression)
    assert assert_alike(run, open_run(tmp_path / "run")) > 3
    assert run.state == "finished"
    assert run.name == "out.h5"


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", ["small_records", "ragged_streams", "bfloat16"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_chunks_of_any_size_read_the_same(
    tmp_path: Path, shape: str, compression: Compression
) -> None:
    write_shape(tmp_path / "run", shape, 1)
    assert_alike(
        export_and_open(tmp_path / "run", compression=compression), open_run(tmp_path / "run")
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_type_and_shape_comes_back_bit_for_bit(
    run_path: Path, opened: Open, compression: Compression
) -> None:
    rng = np.random.default_rng(0)
    shapes = [(), (0,), (7,), (5, 9), (3, 0, 2), (1, 1, 1, 1, 1), (2, 3, 40)]
    writer = LogWriter(run_path, seal=False)
    for step in range(5):
        arrays = []
        for dtype in DTYPES:
            for shape in shapes:
                array = every_bit_pattern(dtype, rng, shape)
                arrays.append(LogArray(dtype, array.values, array.dims, str(shape), array.dtype))
        # Each is missing from some records.
        assert writer.append("activations", "probe", step, arrays[: 20 * step])
    writer.close()
    expected = opened(run_path)
    assert assert_alike(export_and_open(run_path, compression=compression), expected) == 20 * (
        1 + 2 + 3 + 4
    )


@pytest.mark.usefixtures("small_chunks")
def test_a_stream_may_change_its_type_shape_and_axes(run_path: Path) -> None:
    for attempt, dtype in enumerate(["float32", "float16", "float32"]):
        about = {"resume_step": 2 * attempt}
        writer = LogWriter(run_path, attempt=attempt, about=about, seal=False)
        for step in range(2 * attempt, 2 * attempt + 3):
            values = np.arange(6 + step % 2).astype(dtype)
            arrays = [
                LogArray("full", values[:6].reshape(2, 3), ("example", "feature"), "fc"),
                LogArray("ragged", values, ("element",)),
                LogArray("named", values[:6], (f"axis{step % 2}",)),
            ]
            assert writer.append("activations", "probe", step, arrays)
        writer.close()
    run = export_and_open(run_path)
    assert assert_alike(run, open_run(run_path)) == 21
    stored = [run.activations.array("full", s, "fc", as_stored=True) for s in (0, 2, 4)]
    assert [values.dtype.name for values in stored] == ["float32", "float16", "float32"]


@pytest.mark.parametrize("name", WEIRD_NAMES, ids=lambda name: ascii(name)[:12])
def test_any_name_names_a_layer_a_field_a_measure_and_a_source(run_path: Path, name: str) -> None:
    keys = [(name, "gram"), (None, name), (name, name), ("fc", name)]
    writer = LogWriter(run_path, seal=False)
    writer.add_table(name, [LogArray(name, np.arange(3), ("example",))], {name: name})
    for step in range(2):
        arrays = [LogArray(f, np.arange(3 + step), (name or "dim",), layer) for layer, f in keys]
        assert writer.append(name, name, step, arrays, {name: step})
    writer.close()
    assert assert_alike(export_and_open(run_path), open_run(run_path)) == 9


@pytest.mark.parametrize("name", ["tables", "metadata", "chunks", "attempt0", "rank0", "tables/a"])
def test_a_measure_may_be_named_like_a_part_of_the_file(run_path: Path, name: str) -> None:
    for rank in (0, 1):
        writer = LogWriter(run_path, rank=rank, seal=False)
        writer.add_table("probe", [LogArray("id", np.arange(2), ("example",))])
        for measure in (name, "activations"):
            writer.append(measure, "probe", 0, [LogArray("a", np.arange(3), ("n",))])
        writer.close()
    assert assert_alike(export_and_open(run_path), open_run(run_path)) == 12
    shutil.rmtree(run_path / "attempt0-rank1")
    assert assert_alike(export_and_open(run_path), open_run(run_path)) == 4


@settings(max_examples=40, derandomize=True, database=None)
@given(
    records=st.lists(streams, min_size=1, max_size=4),
    compression=st.sampled_from(COMPRESSIONS),
    chunk_bytes=st.sampled_from([16, 100, 1 << 20]),
)
def test_whatever_is_recorded_is_exported(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[tuple[str | None, str], tuple[Array, str]]],
    compression: Compression,
    chunk_bytes: int,
) -> None:
    path = new_run(tmp_path_factory.mktemp("any") / "run")
    writer = LogWriter(path, seal=False)
    for step, record in enumerate(records):
        arrays = [
            LogArray(
                key[1], value, tuple(f"{dim}{axis or ''}" for axis in range(value.ndim)), key[0]
            )
            for key, (value, dim) in record.items()
        ]
        writer.append("activations", "probe", step, arrays)
    writer.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_writer_module, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(export_writer_module, "_PLAIN_BYTES", chunk_bytes // 4)
        export_run(open_run(path), path / "out.h5", compression=compression)
    assert_alike(open_run(path / "out.h5"), open_run(path))
    assert verify_run(path / "out.h5") == []


def test_an_export_can_be_exported_again(tmp_path: Path) -> None:
    write_shape(tmp_path / "run", "resumed_attempts", 0)
    first, second, third = (tmp_path / f"{number}.h5" for number in range(3))
    export_run(open_run(tmp_path / "run"), first)
    export_run(open_run(first), second)
    assert first.read_bytes() == second.read_bytes()
    export_run(open_run(first), third, steps=[3, 8], layers="conv1")
    run = open_run(third)
    assert run.activations.steps == [3, 8]
    assert run.layers == ["conv1"]
    export_run(open_run(second), second, overwrite=True, steps=[-1])
    assert open_run(second).steps() == open_run(first).steps()[-1:]


def test_a_file_replaced_while_it_is_open_is_read_anew(run_path: Path) -> None:
    write_records(run_path, range(3))
    run = export_and_open(run_path)
    write_records(run_path, range(5), resume_step=2)
    export_and_open(run_path, compression="none")
    assert run.activations.array("loss", 1).item() == record_of(1)[3].values.item()
    assert run.activations.steps == [0, 1, 2, 3, 4]


def test_nothing_is_left_open(run_path: Path) -> None:
    write_records(run_path, range(3))
    before = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    run = export_and_open(run_path)
    assert run.activations.array("loss", 1).item() == record_of(1)[3].values.item()
    assert run.activations.ids is not None
    after = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    assert len(after) == len(before)


def test_a_file_that_is_there_is_kept_unless_told_otherwise(run_path: Path, tmp_path: Path) -> None:
    write_records(run_path, range(2))
    out = tmp_path / "out.h5"
    out.write_text("mine")
    with pytest.raises(RunExistsError, match=r"out\.h5 exists; replace it by --overwrite"):
        export_run(open_run(run_path), out)
    assert out.read_text() == "mine"
    export_run(open_run(run_path), out, overwrite=True)
    assert open_run(out).steps() == [0, 1]
    with pytest.raises(InvalidInputError, match="is a folder; expected the name of a file"):
        export_run(open_run(run_path), tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError):
        export_run(open_run(run_path), tmp_path / "nowhere" / "out.h5")


def test_without_hdf5plugin_gzip_is_taken_and_zstd_refused(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shape(tmp_path / "large", "large_arrays", 0)
    by_default = export_and_open(tmp_path / "large")
    assert b'"compression":"zstd"' in by_default.path.read_bytes()
    out = tmp_path / "other.h5"
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    advice = r"takes the package hdf5plugin: pip install 'sonde\[compression\]'; .* gzip needs noth"
    with pytest.raises(InvalidInputError, match=f"compression='zstd' {advice}"):
        export_run(open_run(tmp_path / "large"), out, compression="zstd")
    with pytest.raises(InvalidInputError, match=f"reading a run exported with zstd {advice}"):
        by_default.activations.array("full", 0, "fc")
    assert verify_run(by_default.path) == []
    export_run(open_run(tmp_path / "large"), out)
    assert b'"compression":"gzip"' in out.read_bytes()
    assert_alike(open_run(out), open_run(tmp_path / "large"))


def test_an_export_of_a_newer_format_is_refused(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(run_path, [0])
    with monkeypatch.context() as newer:
        newer.setattr("sonde.log.reading.export_file.EXPORT_VERSION", 2)
        export_run(open_run(run_path), tmp_path / "out.h5")
    message = r"out\.h5 has export format 2; this sonde reads up to 1\. Install a newer sonde"
    for read in (open_run, verify_run):
        with pytest.raises(FormatError, match=message):
            read(tmp_path / "out.h5")


@pytest.mark.parametrize("content", [b"", b"x", b"\x89HDF\r\n\x1a\n" + bytes(5000)])
def test_another_file_is_no_run(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.h5"
    path.write_bytes(content)
    message = (
        r"notes\.h5 is a file; expected a run directory .*, or a file that `sonde export` wrote"
    )
    for read in (open_run, verify_run):
        with pytest.raises(RunNotFoundError, match=message):
            read(path)


def test_a_segment_is_no_run(run_path: Path) -> None:
    write_records(run_path, [0])
    seal_run(run_path)
    with pytest.raises(FormatError, match="is a part of a run; expected its run directory"):
        open_run(segment_of(run_path))


@pytest.mark.usefixtures("small_chunks")
def test_an_array_damaged_in_the_run_is_damaged_in_the_export(
    run_path: Path, tmp_path: Path
) -> None:
    write_records(run_path, range(6))
    seal_run(run_path)
    segment = segment_of(run_path)
    content = segment.read_bytes()
    for number in (2, 3):
        for array in record_of(number)[:2]:
            content = content.replace(array.values.tobytes(), bytes(array.values.nbytes))
    overwrite(segment, content, 1)
    message = r"4 arrays of .*seed0 are damaged, and so they are in .*out\.h5: attempt0-rank0/"
    with pytest.warns(SondeWarning, match=message):
        export_run(open_run(run_path), tmp_path / "out.h5")
    run, expected = open_run(tmp_path / "out.h5"), open_run(run_path)
    assert run.activations.steps == list(range(6))
    for step in range(6):
        for layer, field in expected.activations.describe(step):
            try:
                values = expected.activations.array(field, step, layer)
            except DamageError as error:
                with pytest.raises(
                    DamageError, match=str(error).replace("(", r"\(").replace(")", r"\)")
                ):
                    run.activations.array(field, step, layer)
            else:
                assert run.activations.array(field, step, layer).tobytes() == values.tobytes()
    assert len(verify_run(tmp_path / "out.h5")) == 4
    assert str(run.damage[0]).startswith(f"attempt0-rank0/{segment.name}: '")


def test_a_table_damaged_in_the_run_is_damaged_in_the_export(
    run_path: Path, tmp_path: Path
) -> None:
    write_records(run_path, range(2))
    seal_run(run_path)
    segment = segment_of(run_path)
    content = segment.read_bytes()
    ids = (100 + np.arange(5)).tobytes()
    position = content.index(ids)
    overwrite(segment, content[:position] + b"x" + content[position + 1 :], 1)
    with pytest.raises(DamageError, match="table 'id' does not match its checksum"):
        open_run(run_path).activations.table("id")
    with pytest.warns(SondeWarning, match="1 arrays of .* are damaged.*: table 'id' does not"):
        export_run(open_run(run_path), tmp_path / "out.h5")
    run = open_run(tmp_path / "out.h5")
    with pytest.raises(DamageError, match=r"table 'id' does not match .* \(when the run was exp"):
        run.activations.table("id")
    assert run.activations.array("loss", 1).item() == record_of(1)[3].values.item()
    (damage,) = verify_run(tmp_path / "out.h5")
    assert damage.reason == "table 'id' does not match its checksum"
