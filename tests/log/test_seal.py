"""Sealing: what a segment is named, what it holds, and who else can read it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray

from sonde.exceptions import FormatError, RunNotFoundError
from sonde.log import LogArray, LogWriter, open_run
from sonde.log.sealing import seal as seal_module
from sonde.log.sealing.seal import main, seal_journal, seal_run
from sonde.log.sealing.segment_writer import write_segment
from sonde.log.verify import verify_run

from .conftest import assert_intact, read_records, write_records
from .doomed import record_of
from .files import frame_bounds, frames_of, journal_of, journals_of, segment_of, segments_of

STEPS = [0, 10, 20, 30]
NUM_EXAMPLES = 6


@pytest.fixture
def segment(run_path: Path) -> Path:
    """Seal a run of every kind of stream: dense, gappy, ragged, bfloat16, and without axes."""
    writer = LogWriter(run_path, seal=False)
    ids = 100 + np.arange(NUM_EXAMPLES)
    writer.add_table(
        "probe",
        [LogArray("id", ids, ("example",)), LogArray("target", ids % 3, ("example",))],
    )
    for step in STEPS:
        gram = np.full((NUM_EXAMPLES, NUM_EXAMPLES), step, np.float32)
        bits = np.full((NUM_EXAMPLES, 3), 0x3FC0, np.uint16)
        arrays = [
            LogArray("gram", gram, ("example", "other_example"), "conv1"),
            LogArray("full", bits, ("example", "feature"), "layer1.0/fc", "bfloat16"),
            LogArray("ragged", np.arange(step), ("element",)),
            LogArray("loss", np.array(step / 2), ()),
        ]
        if step == 10:
            arrays.append(LogArray("grad", np.ones(2), ("feature",), "rare"))
        writer.append("activations", "probe", step, arrays, {"step": step})
        writer.append("scalars", "training", step, [LogArray("lr", np.array(0.1), ())])
    writer.close()
    (sealed,) = seal_run(run_path)
    return sealed


def test_segment_is_named_after_its_frames_and_replaces_the_journal(run_path: Path) -> None:
    write_records(run_path, range(12), segment_bytes=3000)
    expected = [
        f"{frames[0].sequence:012d}-{frames[-1].sequence + 1:012d}.h5"
        for frames in map(frames_of, journals_of(run_path))
    ]
    assert [path.name for path in seal_run(run_path)] == expected
    assert sorted(path.name for path in (run_path / "attempt0-rank0").iterdir()) == expected
    assert len(expected) > 2
    assert_intact(run_path, range(12))


def test_sealing_twice_writes_nothing_more(run_path: Path) -> None:
    write_records(run_path, range(3))
    assert len(seal_run(run_path)) == 1
    assert seal_run(run_path) == []
    assert_intact(run_path, range(3))


def test_closing_a_writer_seals_its_journals(run_path: Path) -> None:
    writer = LogWriter(run_path, segment_bytes=3000)
    for number in range(12):
        writer.append("activations", "probe", number, record_of(number))
    writer.close()
    assert journals_of(run_path) == []
    assert len(segments_of(run_path)) > 2
    assert_intact(run_path, range(12))


def test_live_journal_is_not_sealed(run_path: Path) -> None:
    writer = LogWriter(run_path, segment_bytes=3000, seal=False)
    for number in range(12):
        writer.append("activations", "probe", number, record_of(number))
    writer.flush()
    assert seal_run(run_path) == []
    writer.close()
    assert seal_run(run_path)
    assert_intact(run_path, range(12))


def test_only_journals_before_a_number_are_sealed(run_path: Path) -> None:
    write_records(run_path, range(12), segment_bytes=3000)
    second = int(journals_of(run_path)[1].stem)
    seal_run(run_path, before=second)
    assert int(journals_of(run_path)[0].stem) == second
    assert len(segments_of(run_path)) == 1
    assert_intact(run_path, range(12))


def test_only_the_named_folder_is_sealed(run_path: Path) -> None:
    write_records(run_path, range(3))
    write_records(run_path, range(3, 6), resume_step=3)
    seal_run(run_path, "attempt1-rank0")
    assert [path.parent.name for path in segments_of(run_path)] == ["attempt1-rank0"]
    assert [path.parent.name for path in journals_of(run_path)] == ["attempt0-rank0"]


def test_journal_that_is_gone_is_not_sealed(run_path: Path) -> None:
    assert seal_journal(run_path / "000000000000.journal") is None


def test_journal_deleted_by_another_sealer_meanwhile_is_sealed_all_the_same(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(run_path, range(3))
    journal = journal_of(run_path)

    def delete_then_write(*args: Any) -> None:  # what write_segment takes
        journal.unlink()
        write_segment(*args)

    monkeypatch.setattr(seal_module, "write_segment", delete_then_write)
    assert seal_journal(journal) is not None
    assert_intact(run_path, range(3))


@pytest.mark.parametrize("call", ["fsync", "replace", "create_dataset"])
def test_failed_sealing_leaves_the_journal_and_no_temporary_file(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_records(run_path, range(3))
    before = sorted((run_path / "attempt0-rank0").iterdir())

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    home = {"fsync": os, "replace": Path, "create_dataset": h5py.Group}[call]
    with monkeypatch.context() as full:
        full.setattr(home, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            seal_run(run_path)
    assert sorted((run_path / "attempt0-rank0").iterdir()) == before
    assert_intact(run_path, range(3))


def test_journal_that_has_no_room_as_a_segment_is_left_alone(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(run_path, range(3))
    num_bytes = journal_of(run_path).stat().st_size
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(run_path)._replace(free=num_bytes - 1)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match=r"No space left on device: '.*\.h5'"):
            seal_run(run_path)
    assert_intact(run_path, range(3))
    assert len(list(journal_of(run_path).parent.iterdir())) == 1
    assert seal_run(run_path)


def test_damage_of_a_journal_is_still_reported_once_sealed(run_path: Path) -> None:
    write_records(run_path, range(5))
    journal = journal_of(run_path)
    content = bytearray(journal.read_bytes())
    content[frame_bounds(journal)[3][1] - 1] ^= 1
    journal.write_bytes(content[:-1])
    before = open_run(run_path).damage
    seal_run(run_path)
    run = assert_intact(run_path, [0, 2, 3, 4])
    assert run.damage == before
    assert [damage.is_tail for damage in before] == [False, True]
    assert before[0].reason == (
        "the payload of record 3 (activations, step 1) does not match its checksum"
    )


def test_notes_and_end_survive_sealing(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    writer.note("missing", 5, layer="fc", reason="never called")
    writer.close()
    before = open_run(run_path).notes
    seal_run(run_path)
    run = open_run(run_path)
    assert run.notes == before != []
    assert run.state == "finished"


def test_stream_of_two_types_keeps_its_journal_and_seals_the_others(run_path: Path) -> None:
    for attempt in range(2):
        writer = LogWriter(run_path, attempt=attempt, about={"resume_step": 2}, seal=False)
        for step, dtype in enumerate(("float32", "float16" if attempt == 0 else "float32")):
            array = LogArray("full", np.ones(3, dtype), ("n",), "fc")
            writer.append("activations", "probe", 2 * attempt + step, [array])
        writer.close()
    with pytest.raises(FormatError, match="'fc:full' is stored with dtypes float16, float32"):
        seal_run(run_path)
    assert [path.parent.name for path in journals_of(run_path)] == ["attempt0-rank0"]
    assert [path.parent.name for path in segments_of(run_path)] == ["attempt1-rank0"]
    log = open_run(run_path).activations
    stored = [log.array("full", step, "fc", as_stored=True) for step in log.steps]
    assert [values.dtype.name for values in stored] == ["float32", "float16", "float32", "float32"]


def test_sealing_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match=r"is no run directory: it has no run\.json"):
        seal_run(tmp_path)


def test_command_prints_what_it_sealed(run_path: Path) -> None:
    write_records(run_path, range(3))
    command = [sys.executable, "-m", "sonde.log.sealing.seal", str(run_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed == f"{segment_of(run_path)}\n"
    assert_intact(run_path, range(3))


def test_command_reports_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["seal", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^sonde: .*none does not exist; expected a run direct"):
        main()


def test_sealed_run_verifies(segment: Path) -> None:
    assert verify_run(segment.parent.parent) == []


def test_segment_opens_in_plain_h5py(segment: Path) -> None:
    with h5py.File(segment, "r") as file:
        group = file["activations/probe"]
        assert group["step"][:].tolist() == STEPS
        assert group["conv1:gram"].shape == (4, NUM_EXAMPLES, NUM_EXAMPLES)
        assert [dim[0].name.rsplit("/")[-1] for dim in group["conv1:gram"].dims] == [
            "step", "example", "other_example"
        ]  # fmt: skip
        assert group["conv1:gram"][2].max() == 20
        assert group["loss"][:].tolist() == [0, 5, 10, 15]
        assert group["layer1.0%2Ffc:full"].attrs["layer"] == b"layer1.0/fc"
        assert group["ragged::shape"][:].tolist() == [[0], [10], [20], [30]]
        assert np.isnan(group["rare:grad"][0]).all()


def test_hdf5_converts_bfloat16_exactly(segment: Path) -> None:
    with h5py.File(segment, "r") as file:
        dataset = file["activations/probe/layer1.0%2Ffc:full"]
        converted = np.empty(dataset.shape, np.float32)
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, converted)
    assert np.unique(converted).tolist() == [1.5]


def test_segment_opens_in_xarray_with_names_and_ids(segment: Path) -> None:
    with xarray.open_dataset(segment, group="activations/probe", engine="h5netcdf") as dataset:
        assert dataset["conv1:gram"].dims == ("step", "example", "other_example")
        ids = list(range(100, 100 + NUM_EXAMPLES))
        assert dataset["example"].values.tolist() == ids
        assert dataset["other_example"].values.tolist() == ids
        assert dataset["conv1:gram"].sel(step=20, example=103).values.tolist() == [20] * 6
        assert dataset["layer1.0%2Ffc:full"].dims == ("step", "example", "feature")
        assert dataset["layer1.0%2Ffc:full"].values.max() == 1.5
        assert dataset["rare:grad"].dims == ("step", "feature_2")


def test_segment_opens_as_an_xarray_tree(segment: Path) -> None:
    with xarray.open_datatree(segment, engine="h5netcdf") as tree:
        assert {"/activations/probe", "/scalars/training", "/tables/probe"} <= set(tree.groups)
        assert tree["scalars/training"].to_dataset()["lr"].values.tolist() == [0.1] * 4
        assert tree["tables/probe"]["target"].dims == ("example",)


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="needs h5dump (Debian: hdf5-tools)")
def test_segment_opens_in_h5dump_with_names(segment: Path) -> None:
    def dump(*options: str) -> str:
        command = ["h5dump", *options, str(segment)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    names = {line.split()[-1] for line in dump("--contents").splitlines() if " dataset " in line}
    assert {"/activations/probe/conv1:gram", "/activations/probe/step", "/tables/probe/id"} <= names
    described = dump("--header", "--dataset=/activations/probe/layer1.0%2Ffc:full")
    assert 'ATTRIBUTE "layer"' in described
    assert "16-bit little-endian floating-point" in described
    assert "( 4, 6, 3 ) / ( 4, 6, 3 )" in described
    values = dump("--noindex", "--dataset=/activations/probe/loss")
    assert "0, 5, 10, 15" in values
    everything = dump()
    assert everything.count("1.5, 1.5, 1.5") == 4 * NUM_EXAMPLES


@pytest.mark.parametrize("is_sonde_first", [True, False])
def test_sonde_and_xarray_read_a_segment_at_the_same_time(
    run_path: Path, segment: Path, is_sonde_first: bool
) -> None:
    if is_sonde_first:
        open_run(run_path).activations.array("loss")
    with xarray.open_datatree(segment, engine="h5netcdf") as tree:
        gram = open_run(run_path).activations.gram(20, "conv1")
        there = tree["activations/probe"].to_dataset()["conv1:gram"].sel(step=20)
        assert gram.tolist() == there.values.tolist()
        assert [len(read) for read in read_records(open_run(run_path)).values()] == [4, 5, 4, 4]


def test_two_processes_may_read_a_segment(run_path: Path, segment: Path) -> None:
    code = "import sys, sonde; print(sonde.open_run(sys.argv[1]).activations.array('loss'))"
    with h5py.File(segment, "r"):
        command = [sys.executable, "-c", code, str(run_path)]
        assert subprocess.run(command, check=True, capture_output=True).stdout == b"15.0\n"


@pytest.mark.parametrize(
    "edit",
    [
        lambda segment: segment.rename(segment.with_suffix(".renamed")),
        lambda segment: shutil.copy(segment, segment.with_suffix(".copy")),
    ],
)
def test_segment_is_an_ordinary_file_that_can_be_moved(
    segment: Path, edit: Callable[[Path], object]
) -> None:
    moved = Path(str(edit(segment)))
    with h5py.File(moved, "r") as file:
        assert file["activations/probe/loss"][1] == 5


@pytest.mark.parametrize("executable", [None, "/nonexistent/python"])
def test_a_sealer_that_cannot_be_started_leaves_journals_and_says_so(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr("sys.executable", executable)
    writer = LogWriter(run_path)
    assert writer.append("activations", "probe", 0, record_of(0))
    writer.close()
    assert "journals were not sealed into HDF5 (no process could be started" in (
        writer.problem or ""
    )
    assert_intact(run_path, [0])


def test_a_module_in_the_working_folder_does_not_shadow_the_sealers(
    run_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "h5py.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    writer = LogWriter(run_path)
    assert writer.append("activations", "probe", 0, record_of(0))
    writer.close()
    assert (writer.problem, journals_of(run_path)) == (None, [])


def test_a_record_on_its_way_is_no_damage_and_goes_when_it_is_sealed(run_path: Path) -> None:
    write_records(run_path, range(4))
    (journal,) = journals_of(run_path)
    os.truncate(journal, frame_bounds(journal)[-2][1] - 5)  # Within the last record.
    assert verify_run(run_path) == []
    assert [item.is_cut_off for item in open_run(run_path).unfinished] == [True]
    seal_run(run_path)
    run = assert_intact(run_path, range(3))
    assert (run.unfinished, run.damage, journals_of(run_path)) == ([], [], [])


def test_a_journal_without_a_frame_is_removed(run_path: Path) -> None:
    write_records(run_path, range(4))
    (journal,) = journals_of(run_path)
    os.truncate(journal, 30)  # Within the header of the file.
    assert verify_run(run_path) == []
    assert seal_run(run_path) == []
    assert journals_of(run_path) == []


def test_a_journal_that_was_cut_before_others_is_damaged(run_path: Path) -> None:
    write_records(run_path, range(6), segment_bytes=1300)
    first, *others = journals_of(run_path)
    assert others
    os.truncate(first, frame_bounds(first)[-1][1] - 5)
    assert len(verify_run(run_path)) == 1
    seal_run(run_path)
    assert len(verify_run(run_path)) == 1
