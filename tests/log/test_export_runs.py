"""Export of attempts, ranks and runs that go on, and of chosen steps, layers and measures."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonde import analysis
from sonde.exceptions import (
    InvalidInputError,
    LayerNotFoundError,
    MeasureNotFoundError,
    StepNotFoundError,
)
from sonde.log import LogArray, LogWriter, open_run
from sonde.log.export import export_run
from sonde.log.sealing.seal import seal_run

from .alike import assert_alike, export_and_open
from .conftest import Open, write_records
from .doomed import record_of
from .files import frame_bounds
from .test_ranks import write_rank


def test_superseded_records_are_left_out_and_attempts_are_not(run_path: Path) -> None:
    for attempt, (steps, resume_step) in enumerate([(range(8), 0), (range(5, 9), 5), ([], 3)]):
        writer = LogWriter(
            run_path, attempt=attempt, about={"resume_step": resume_step}, seal=False
        )
        writer.note("missing", attempt, layer="fc")
        for step in steps:
            writer.append("activations", "probe", step, record_of(10 * attempt + step))
        writer.close()
    run = export_and_open(run_path)
    assert_alike(run, open_run(run_path))
    assert [about["attempt"] for about in run.attempts] == [0, 1, 2]
    assert b'"sequences":[2,3,4,5,6,2,3,4,5]' in run.path.read_bytes()


def test_an_attempt_of_which_nothing_is_left_still_supersedes(run_path: Path) -> None:
    table = {"input_digest": "a"}
    for rank in (0, 1):
        write_rank(run_path, rank, [0, 1], range(0, 8), table=table)
    for attempt, resume_step, steps in ((1, 5, [8]), (2, 8, [9])):
        about = {"resume_step": resume_step}
        write_rank(run_path, 0, [0, 1], steps, attempt=attempt, about=about, table=table)
    expected = open_run(run_path)
    assert expected.activations.steps == [0, 1, 2, 3, 4, 9]
    assert expected.rank(1).activations.steps == list(range(5))
    assert_alike(export_and_open(run_path), expected)


def test_what_supersedes_a_chosen_step_need_not_be_chosen(run_path: Path) -> None:
    for rank in range(3):
        write_rank(run_path, rank, range(rank, 6, 3), [0, 10, 20], about={"world_size": 3})
    for rank in range(2):
        about = {"resume_step": 20, "world_size": 2}
        write_rank(run_path, rank, range(rank, 6, 2), [30], attempt=1, about=about)
    assert open_run(run_path).activations.steps == [0, 10, 30]
    run = export_and_open(run_path, steps=[10])
    assert run.activations.steps == [10]
    assert run.rank(2).activations.steps == [10]
    assert run.notes == open_run(run_path).notes


def test_where_an_attempt_resumed_is_kept_if_it_cannot_say_so(run_path: Path) -> None:
    table = {"input_digest": "a"}
    for rank in (0, 1):
        write_rank(run_path, rank, [0, 1], [0, 10, 17, 20], table=table)
    write_rank(run_path, 0, [0, 1], [15, 20, 30], attempt=1, table=table)
    journal = run_path / "attempt1-rank0" / "000000000000.journal"
    content = bytearray(journal.read_bytes())
    content[frame_bounds(journal)[0][0]] ^= 1
    journal.write_bytes(content)
    expected = open_run(run_path)
    assert [about.get("pid") for about in expected.attempts][-1] is None
    assert expected.activations.steps == [0, 10, 15, 20, 30]
    out = run_path.with_name("out.h5")
    export_run(expected, out)
    assert_alike(open_run(out), expected)
    export_run(expected, out, overwrite=True, steps=[10, 20, 30])
    assert open_run(out).activations.steps == [10, 20, 30]


@pytest.mark.parametrize(
    "divisions",
    [
        [[[0, 3], [1, 2]]],  # Examples of its own on each rank.
        [[[0, 1], [0, 1]]],  # The same ones.
        [[[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]],  # Fewer ranks resume.
        [[[0, 1, 2]], [[2, 0, 1]]],  # Another order.
        [[[0, 1, 2]], [[0, 1, 9]]],  # Other examples.
    ],
    ids=["own", "same", "fewer", "order", "others"],
)
def test_ranks_are_exported_as_each_recorded(
    run_path: Path, opened: Open, divisions: list[list[list[int]]]
) -> None:
    for attempt, division in enumerate(divisions):
        about = {"resume_step": 20 * attempt, "world_size": len(division)}
        steps = range(20 * attempt, 20 * attempt + 30, 10)
        for rank, ids in enumerate(division):
            write_rank(run_path, rank, ids, steps, attempt=attempt, about=about)
    expected = opened(run_path)
    assert assert_alike(export_and_open(run_path), expected) > 12


def test_records_of_other_examples_are_set_apart(run_path: Path) -> None:
    import h5py

    for attempt, ids in enumerate([[0, 1, 2], [5, 1, 0]]):
        about = {"resume_step": 10 * attempt}
        write_rank(run_path, 0, ids, [10 * attempt], attempt=attempt, about=about)
    with h5py.File(export_and_open(run_path).path) as file:
        assert file["activations/probe/example"][:].tolist() == [5, 1, 0]
        assert file["activations/probe/step"][:].tolist() == [10]
        assert file["attempt0/activations/probe/example"][:].tolist() == [0, 1, 2]
        assert file["attempt0/tables/probe/id"][:].tolist() == [0, 1, 2]


def test_live_examples_are_exported(run_path: Path) -> None:
    for rank in (0, 1):
        writer = LogWriter(run_path, rank=rank, seal=False)
        for step in range(3):
            ids = np.arange(rank, 2 * step + 2, 2)
            arrays = [
                LogArray("id", ids, ("example",)),
                LogArray("full", np.outer(ids, [1, 2]), ("example", "feature"), "fc"),
            ]
            writer.append("activations", "training", step, arrays)
        writer.close()
    assert assert_alike(export_and_open(run_path), open_run(run_path)) == 18


def test_one_rank_can_be_exported_alone(run_path: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        write_rank(run_path, rank, range(rank, 6, 2))
    view = open_run(run_path).rank(1)
    export_run(view, tmp_path / "out.h5")
    assert assert_alike(open_run(tmp_path / "out.h5"), view) == 18


def test_analyses_give_the_same(run_path: Path) -> None:
    write_rank(run_path, 0, range(12))
    run = export_and_open(run_path)
    one, two = (analysis.cka(r, layers=["fc", "head"]) for r in (run, open_run(run_path)))
    assert one.values.tolist() == two.values.tolist()
    assert analysis.cka(run, open_run(run_path), layers="fc").values.item() == pytest.approx(1)


def test_a_run_that_is_recorded_is_exported_as_it_is_now(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for number in range(3):
        writer.append("activations", "probe", number, record_of(number))
    writer.flush()
    run = export_and_open(run_path)
    assert assert_alike(run, open_run(run_path)) > 3
    assert run.state == "interrupted"
    writer.close()


def test_a_journal_that_is_sealed_meanwhile_is_found_again(run_path: Path, tmp_path: Path) -> None:
    write_records(run_path, range(20), segment_bytes=3000)
    expected = open_run(run_path)
    parts: list[str] = []

    def seal_amid(part: str) -> None:
        parts.append(part)
        if len(parts) == 3:
            assert seal_run(run_path)

    export_run(open_run(run_path), tmp_path / "out.h5", on_part=seal_amid)
    assert parts == [f"activations/probe, {number} of 5" for number in range(1, 6)]
    assert_alike(open_run(tmp_path / "out.h5"), expected)


def test_an_attempt_that_starts_meanwhile_is_left_out(run_path: Path, tmp_path: Path) -> None:
    write_records(run_path, range(12), segment_bytes=3000)
    before = Path(shutil.copytree(run_path, tmp_path / "before"))
    parts: list[str] = []

    def resume_amid(part: str) -> None:
        parts.append(part)
        if len(parts) == 2:
            write_records(run_path, range(3, 5), resume_step=3)
            assert seal_run(run_path)

    export_run(open_run(run_path), tmp_path / "out.h5", on_part=resume_amid)
    assert_alike(open_run(tmp_path / "out.h5"), open_run(before))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"steps": [0, 7, -1]}, {"often": [0, 7, 9], "rarely": [0, 8]}),
        ({"steps": [-10]}, {"often": [0]}),
        ({"steps": slice(2, 9, 3)}, {"often": [2, 5, 8], "rarely": [2, 8]}),
        ({"steps": slice(8, None)}, {"often": [8, 9], "rarely": [8]}),
        ({"steps": slice(None, 3)}, {"often": [0, 1, 2], "rarely": [0, 2]}),
        ({"steps": slice(7, 8)}, {"often": [7]}),
        ({"measures": ["rarely"]}, {"rarely": [0, 2, 4, 6, 8]}),
        ({"measures": ["rarely"], "steps": [4]}, {"rarely": [4]}),
    ],
)
def test_chosen_steps_and_measures_are_exported(
    run_path: Path, options: dict[str, Any], steps: dict[str, list[int]]
) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in range(10):
        for measure in ("often", "rarely")[: 1 + (step % 2 == 0)]:
            writer.append(measure, "probe", step, [LogArray("a", np.array(step), ())])
    writer.close()
    run = export_and_open(run_path, **options)
    assert {measure: run[measure].steps for measure in run.measures} == steps
    assert all(run[m].stack("a").tolist() == steps[m] for m in steps)


@pytest.mark.parametrize(
    ("layers", "kept"),
    [("conv1", ["conv1"]), (["h*", "rare"], ["head", "rare"]), (["rare"], ["rare"])],
)
def test_chosen_layers_are_exported_and_what_belongs_to_none(
    run_path: Path, layers: str | list[str], kept: list[str]
) -> None:
    write_records(run_path, range(4))
    writer = LogWriter(run_path, attempt=1, about={"resume_step": 4}, seal=False)
    writer.append("predictions", "probe", 4, [LogArray("logits", np.ones(3), ("n",), "out")])
    writer.close()
    run = export_and_open(run_path, layers=layers)
    expected = open_run(run_path)
    assert run.measures == ["activations"]
    assert run.layers == kept
    assert run.activations.fields() == ["ids", "loss"]
    for step in range(4):
        wanted = {
            key: stream
            for key, stream in expected.activations.describe(step).items()
            if key[0] in (None, *kept)
        }
        assert run.activations.describe(step) == wanted


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": "conv2"}, LayerNotFoundError, "run 'seed0' matches 'conv2'; .* 'conv1'.*head"),
        ({"layers": []}, LayerNotFoundError, "no layers selected; layers: 'conv1', 'head'"),
        (
            {"steps": [0, 5]},
            StepNotFoundError,
            "of run 'seed0' has step 5; near it: 2, 3; rec.*0, 1",
        ),
        ({"steps": [-5]}, StepNotFoundError, "no measure of run 'seed0' has step -5; recorded"),
        ({"steps": []}, InvalidInputError, "`steps` is empty"),
        ({"steps": slice(4, 9)}, StepNotFoundError, "no step of run 'seed0' lies in 4:9; .*: 0, 1"),
        ({"steps": slice(-2, None)}, InvalidInputError, r"`steps` \(=-2:\) takes steps by their"),
        ({"steps": slice(0, 4, 0)}, InvalidInputError, r"\(=0:4:0\) .* a stride >= 1"),
        ({"measures": ["loss"]}, MeasureNotFoundError, "no records of 'loss'; it has: activations"),
        ({"compression": "lzma"}, InvalidInputError, "'lzma'.* must be 'zstd', 'gzip' or 'none'"),
    ],
)
def test_what_matches_nothing_is_refused_and_leaves_no_file(
    run_path: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_records(run_path, range(4))
    with pytest.raises(error, match=message):
        export_run(open_run(run_path), tmp_path / "out.h5", **options)
    assert os.listdir(tmp_path) == ["seed0"]
