"""The writer: what it takes, refuses and leaves in the journal."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonde.exceptions import InvalidInputError, RunExistsError
from sonde.log import LogArray, LogWriter, open_run
from tests.limits import LIMIT_SECONDS

from .conftest import assert_intact
from .doomed import append_record
from .files import frames_of, journal_of, journals_of


def test_closed_run_holds_every_record(run_path: Path, writer: LogWriter) -> None:
    for number in range(20):
        assert append_record(writer, number)
    writer.close()
    assert writer.problem is None
    assert_intact(run_path, range(20))


def test_record_is_readable_once_flushed(run_path: Path, writer: LogWriter) -> None:
    for number in range(5):
        append_record(writer, number)
        assert writer.flush(LIMIT_SECONDS)
        assert_intact(run_path, range(number + 1))


@pytest.mark.parametrize(
    "values",
    [
        np.arange(1 << 16, dtype=np.float32).reshape(64, 1024),
        np.arange(1 << 16, dtype=np.float32).reshape(64, 1024).T,
        np.arange((1 << 18) + 1, dtype=np.uint8),
        np.arange(1 << 16, dtype=">f8"),
        np.ones((), np.float64),
        np.empty((0, 3), np.float32),
    ],
    ids=["contiguous", "transposed", "odd", "big-endian", "scalar", "empty"],
)
def test_owned_arrays_are_stored_like_others(
    run_path: Path, writer: LogWriter, values: npt.NDArray[Any]
) -> None:
    for step, is_owned in enumerate((True, False)):
        arrays = [
            LogArray("a", values, ("n",) * values.ndim, f"layer{i}", is_owned=is_owned)
            for i in range(2)
        ]
        assert writer.append("activations", "probe", step, arrays)
    writer.close()
    content = journal_of(run_path).read_bytes()
    owned, copied = [frame for frame in frames_of(journal_of(run_path)) if frame.kind == "record"]
    np.testing.assert_array_equal(owned.checksums, copied.checksums)
    places = [
        slice(f.payload_offset, f.payload_offset + f.layout.num_bytes) for f in (owned, copied)
    ]
    assert content[places[0]] == content[places[1]]
    run = open_run(run_path)
    for layer in ("layer0", "layer1"):
        for step in range(2):
            found = run.activations[layer].array("a", step)
            np.testing.assert_array_equal(found, values)


def test_owned_arrays_are_not_copied(writer: LogWriter) -> None:
    values = np.ones(8 << 20, np.uint8)
    peaks = []
    for is_owned in (True, False):
        tracemalloc.start()
        array = LogArray("a", values, ("n",), is_owned=is_owned)
        writer.append("activations", "probe", int(is_owned), [array])
        writer.flush()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 1 << 20 < values.nbytes < peaks[1]


def test_reused_buffers_do_not_mix_records(run_path: Path, writer: LogWriter) -> None:
    for step, size in enumerate([1000, 600, 1000, 400, 999, 1001]):
        writer.append("m", "s", step, [LogArray("a", np.full(size, step), ("n",))])
        writer.flush()
    log = open_run(run_path).m
    assert [np.unique(log.array("a", step)).tolist() for step in log.steps] == [
        [step] for step in range(6)
    ]


def test_few_large_records_share_a_segment(run_path: Path) -> None:
    large, small = np.zeros(100 << 18, np.float32), np.zeros(5 << 18, np.float32)
    writer = LogWriter(run_path, seal=False)
    counts = []
    for step, values in enumerate([large] * 3 + [small] * 20):
        writer.append("activations", "probe", step, [LogArray("full", values, ("feature",))])
        writer.flush()
        counts.append(len(journals_of(run_path)))
    writer.close()
    # 100 and 200 MiB of few frames stay open, 300 do not; of many, 80 MiB do not.
    assert counts == [1, 1, 2] + [2] * 14 + [3] * 6


def test_closed_writer_ignores_everything(run_path: Path, writer: LogWriter) -> None:
    append_record(writer, 0)
    writer.close("done")
    assert not append_record(writer, 1)
    writer.note("late", 1)
    writer.add_table("probe", [LogArray("id", np.arange(3), ("example",))])
    writer.sync()
    writer.close()
    assert writer.flush(timeout=0)
    assert [frame.kind for frame in frames_of(journal_of(run_path))] == ["attempt", "record", "end"]
    assert_intact(run_path, [0])


def test_end_states_the_reason(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    writer.close("KeyboardInterrupt")
    assert frames_of(journal_of(run_path))[-1].body["reason"] == "KeyboardInterrupt"


def test_every_journal_begins_with_attempt_and_tables(run_path: Path) -> None:
    writer = LogWriter(run_path, about={"world_size": 2}, segment_bytes=1, seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(3), ("example",))])
    for number in range(3):
        append_record(writer, number)
    writer.close()
    heads = [[frame.kind for frame in frames_of(path)[:2]] for path in journals_of(run_path)]
    assert heads == [["attempt", "table"]] * 4
    sequences = [frame.sequence for path in journals_of(run_path) for frame in frames_of(path)]
    assert sequences == list(range(len(sequences)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync": "often"}, r"`sync` \(='often'\) must be 'seal', 'record' or 'none'"),
        ({"queue_bytes": 0}, r"`queue_bytes` \(=0\) must be >= 1"),
        ({"segment_bytes": -1}, r"`segment_bytes` \(=-1\) must be >= 1"),
    ],
)
def test_argument_out_of_range_is_refused(
    run_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        LogWriter(run_path, **options)
    assert [path.name for path in run_path.iterdir()] == ["run.json"]


def test_second_writer_of_an_attempt_is_refused(run_path: Path, writer: LogWriter) -> None:
    with pytest.raises(RunExistsError, match="attempt0-rank0 was already written by another rec"):
        LogWriter(run_path)


def test_array_that_cannot_be_stored_leaves_the_writer_usable(
    run_path: Path, writer: LogWriter
) -> None:
    with pytest.raises(InvalidInputError, match="has dtype complex128"):
        writer.append("m", "s", 0, [LogArray("z", np.zeros(1, complex), ("n",))])
    append_record(writer, 1)
    writer.close()
    assert_intact(run_path, [1])


def test_table_refuses_arrays_of_layers(writer: LogWriter) -> None:
    with pytest.raises(
        InvalidInputError, match="table 'probe' has an array of layer 'fc'; a table"
    ):
        writer.add_table("probe", [LogArray("id", np.arange(3), ("example",), "fc")])


@pytest.mark.parametrize("name", ["kind", "sequence"])
def test_note_refuses_a_detail_the_log_uses_itself(writer: LogWriter, name: str) -> None:
    message = f"note 'odd' has a detail named '{name}', which the log uses itself; choose another"
    with pytest.raises(InvalidInputError, match=message):
        writer.note("odd", 3, **{name: "x"})


def test_writing_loads_neither_h5py_nor_torch_nor_xarray(run_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from sonde.log import LogArray, LogWriter
writer = LogWriter(Path(sys.argv[1]), segment_bytes=1)
writer.append("m", "s", 1, [LogArray("a", np.arange(3), ("n",))])
writer.close()
print(sorted({"h5py", "torch", "xarray"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(run_path)]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"[]\n"


def test_unknown_name_of_the_package_is_refused() -> None:
    import sonde.log

    with pytest.raises(AttributeError, match=r"module 'sonde\.log' has no attribute 'LogReader'"):
        _ = sonde.log.LogReader
