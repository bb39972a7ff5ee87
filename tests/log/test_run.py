"""What a reader of a run sees: measures, steps, layers, states, and what came since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sonde.exceptions import MeasureNotFoundError, StepNotFoundError
from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.sealing.seal import seal_run

from .conftest import assert_identical, assert_intact, new_run, write_records
from .doomed import append_record, record_of
from .example_run import STEPS
from .files import journals_of, segments_of


def test_run_lists_what_it_holds(run: Run) -> None:
    assert run.measures == ["activations", "scalars"]
    assert run.sources("activations") == ["train", "test"]
    assert run.layers == ["conv1", "fc", "head", "late"]
    assert run.steps() == STEPS
    assert run.steps("activations", "test") == STEPS
    assert run.ranks == [0]
    assert run.name == "seed0"
    assert run.info["name"] == "seed0"
    assert run.damage == []
    assert [attempt["attempt"] for attempt in run.attempts] == [0]
    assert run.notes == [
        {"event": "missing", "step": 5, "layer": "fc9", "reason": "never called", "rank": 0}
    ]


def test_run_describes_itself(run: Run) -> None:
    assert repr(run) == "<Run 'seed0', finished, steps 0 to 30: activations, scalars>"
    assert repr(run.scalars) == (
        "<scalars of 'training' in run 'seed0': 4 records, 0 layers, – examples>"
    )
    log = run["activations", "train"]
    assert repr(log) == "<activations of 'train' in run 'seed0': 4 records, 4 layers, 3 examples>"
    assert repr(log["late"]) == "<layer 'late': gram at 1 steps>"
    assert "<td>activations</td><td>test</td><td>4</td><td>1</td><td>3</td>" in run._repr_html_()
    assert {"activations", "scalars", "steps"} <= set(dir(run))


def test_empty_run_describes_itself(run_path: Path) -> None:
    run = open_run(run_path)
    assert repr(run) == "<Run 'seed0', interrupted, nothing recorded yet: >"
    assert (run.steps(), run.measures, run.layers, run.ranks) == ([], [], [], [])


def test_private_names_are_not_measures(run: Run) -> None:
    with pytest.raises(AttributeError, match=r"^_ipython_display_$"):
        _ = run._ipython_display_


def test_state_follows_the_writer(run_path: Path) -> None:
    assert open_run(run_path).state == "interrupted"
    writer = LogWriter(run_path, seal=False)
    run = open_run(run_path)
    assert run.state == "recording"
    writer.close()
    assert run.state == "recording"
    run.refresh()
    assert run.state == "finished"


def test_run_whose_end_is_missing_was_interrupted(run_path: Path) -> None:
    write_records(run_path, range(3))
    write_records(run_path, range(3, 4), resume_step=3)
    assert open_run(run_path).state == "finished"
    last = run_path / "attempt1-rank0" / "000000000000.journal"
    last.write_bytes(last.read_bytes()[:-1])
    assert open_run(run_path).state == "interrupted"


def test_refresh_takes_in_what_came_since(run_path: Path) -> None:
    writer = LogWriter(run_path, segment_bytes=1500, seal=False)
    run = open_run(run_path)
    for number in range(8):
        append_record(writer, number)
        writer.flush()
        seal_run(run_path, before=int(journals_of(run_path)[-1].stem))
        assert run.steps() == list(range(number))
        run.refresh()
        assert run.steps() == list(range(number + 1))
    writer.close()
    assert len(segments_of(run_path)) > 1
    assert_intact(run_path, range(8))


def record_and_flush(writer: LogWriter, number: int) -> None:
    assert append_record(writer, number)
    writer.flush()


def test_follow_yields_each_record_once_until_the_writer_closes(run_path: Path) -> None:
    writer = LogWriter(run_path, segment_bytes=2000)
    record_and_flush(writer, 0)
    followed = []
    for log, step in open_run(run_path).follow(poll_seconds=0.001):
        followed.append((log.measure, step))
        assert_identical(log.array("loss", step), record_of(step)[3].values)
        if len(followed) < 20:
            record_and_flush(writer, len(followed))
        else:
            writer.close()
    assert followed == [("activations", step) for step in range(20)]


def test_follow_yields_what_a_resumed_attempt_records_again(run_path: Path) -> None:
    first = LogWriter(run_path, seal=False)
    for number in range(3):
        record_and_flush(first, number)
    following = open_run(run_path).follow(poll_seconds=0.001)
    assert [next(following)[1] for _ in range(3)] == [0, 1, 2]
    second = LogWriter(run_path, attempt=1, about={"resume_step": 2}, seal=False)
    record_and_flush(second, 2)
    first.close()
    second.close()
    assert [step for _, step in following] == [2]


def test_records_that_are_gone_are_errors_that_say_so(run_path: Path, tmp_path: Path) -> None:
    write_records(run_path, range(3))
    seal_run(run_path)
    log = open_run(run_path).activations
    other = new_run(tmp_path / "other")
    write_records(other, range(2))
    seal_run(other)
    segment = segments_of(run_path)[0]
    segment.write_bytes(segments_of(other)[0].read_bytes())
    with pytest.raises(StepNotFoundError, match="step 2 of 'activations' was not recorded"):
        log.array("loss", 2)
    segment.write_bytes(b"")
    with pytest.raises(MeasureNotFoundError, match="of run 'seed0' are not there any more: they"):
        log.array("loss", 1)


def test_run_whose_ids_are_damaged_can_still_be_shown(run_path: Path) -> None:
    write_records(run_path, range(3))
    seal_run(run_path)
    segment = segments_of(run_path)[0]
    content, ids = segment.read_bytes(), (100 + np.arange(5)).tobytes()
    assert ids in content
    segment.write_bytes(content.replace(ids, bytes(len(ids))))
    run = open_run(run_path)
    assert "<td>?</td>" in run._repr_html_()
    assert "? examples>" in repr(run.activations)


def test_measures_with_awkward_names_are_reached_by_brackets(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for name in ("steps", "a b", "_x"):
        writer.append(name, "s", 0, [LogArray("a", np.arange(2), ("n",))])
    writer.close()
    run = open_run(run_path)
    assert [run[name].array("a").tolist() for name in run.measures] == [[0, 1]] * 3
    assert run.steps() == [0]


def test_a_read_goes_on_while_one_journal_after_the_other_is_sealed(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in range(3):
        writer.append("losses", "training", step, [LogArray("loss", np.full(2, step), ("x",))])
    writer.close()
    run = open_run(run_path)
    names = iter(["one", "two", "three"])

    def read() -> str:
        name = next(names)
        if name != "three":
            raise FileNotFoundError(2, "gone", name)
        return name

    assert run.retry(read) == "three"
    with pytest.raises(FileNotFoundError):
        run.retry(lambda: (run_path / "lost").read_text())
