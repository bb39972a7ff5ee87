"""What a reader of a run sees: measures, steps, layers, tables, states, attempts and messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sonde.exceptions import (
    FormatError,
    InvalidInputError,
    LayerNotFoundError,
    MeasureNotFoundError,
    RunNotFoundError,
    StepNotFoundError,
)
from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.layout import find_runs, write_run_file
from sonde.log.seal import seal_run

from .conftest import (
    assert_identical,
    assert_intact,
    journals_of,
    new_run,
    segments_of,
    write_records,
)
from .doomed import record_of

GRAM_DIMS = ("example", "other_example")
STEPS = [0, 10, 20, 30]
IDS = np.array([7, 5, 9])


def gram_of(step: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(step).normal(size=(3, 3)).astype(np.float32)


def features_of(step: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(step + 1).normal(size=(3, 4)).astype(np.float32)


def write_example_run(path: Path, *, segment_bytes: int = 64 << 20) -> None:
    """Write every kind of store; layer `late` appears at step 20 only, `loss` has no layer."""
    writer = LogWriter(path, seal=False, segment_bytes=segment_bytes)
    target = LogArray("target", np.array([0, 1, 0]), ("example",))
    writer.add_table("train", [LogArray("id", IDS, ("example",)), target])
    writer.add_table("test", [LogArray("id", IDS + 1, ("example",))])
    for step in STEPS:
        gram, features = gram_of(step), features_of(step)
        arrays = [
            LogArray("gram", gram, GRAM_DIMS, "conv1"),
            LogArray("full", features, ("example", "feature"), "fc"),
            LogArray("sketch", features[:, :2], ("example", "feature"), "head"),
            LogArray("gram_total", 2 * gram, GRAM_DIMS),
        ]
        if step == 20:
            arrays.append(LogArray("gram", gram, GRAM_DIMS, "late"))
        writer.append("activations", "train", step, arrays, {"batch": step // 10})
        writer.append("activations", "test", step, arrays[:1])
        writer.append("scalars", "training", step, [LogArray("loss", np.array(step / 2), ())])
    writer.note("missing", 5, layer="fc9", reason="never called")
    writer.close()


@pytest.fixture(params=["journal", "segments", "both"])
def run(request: pytest.FixtureRequest, run_path: Path) -> Run:
    """Open the example run from one journal, from segments, and from segments and a journal."""
    write_example_run(run_path, segment_bytes=64 << 20 if request.param == "journal" else 1500)
    if request.param == "segments":
        seal_run(run_path)
        assert len(segments_of(run_path)) > 1
        assert journals_of(run_path) == []
    if request.param == "both":
        seal_run(run_path, before=int(journals_of(run_path)[-2].stem))
        assert segments_of(run_path)
        assert journals_of(run_path)
    return open_run(run_path)


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


def test_measure_lists_what_it_holds(run: Run) -> None:
    log = run["activations", "train"]
    assert log.steps == STEPS
    assert log.layers == ["conv1", "fc", "head", "late"]
    assert log.fields("fc") == ["full"]
    assert log.fields() == ["gram_total"]
    assert log.attributes(20) == {"batch": 2}
    # Per record 3·3 + 3·4 + 3·2 + 3·3 float32, and one layer more of 3·3.
    assert log.num_bytes == 4 * (4 * (9 + 12 + 6 + 9) + 9)
    described = log.describe(20)
    keys = [("conv1", "gram"), ("fc", "full"), ("head", "sketch"), (None, "gram_total")]
    assert list(described) == [*keys, ("late", "gram")]
    assert described["fc", "full"].dims == ("example", "feature")
    assert described["fc", "full"].shape == (3, 4)


def test_step_may_count_from_the_end(run: Run) -> None:
    log = run.scalars
    assert log.array("loss").item() == 15
    assert [log.array("loss", step).item() for step in (-1, -2, -4, 0, 20)] == [15, 10, 0, 0, 10]
    assert log.resolve_step(-3) == 10


def test_gram_comes_from_whichever_store_was_kept(run: Run) -> None:
    log = run["activations", "train"]
    features = features_of(10).astype(np.float64)
    assert_identical(log.gram(10, "conv1"), gram_of(10).astype(np.float64))
    assert_identical(log.gram(10), 2 * gram_of(10).astype(np.float64))
    # Rounding in float64 is some 1e-15 of these values of about 1.
    np.testing.assert_allclose(log.gram(10, "fc"), features @ features.T, atol=1e-12)
    np.testing.assert_allclose(
        log["head"].gram(10), features[:, :2] @ features[:, :2].T, atol=1e-12
    )


def test_features_are_those_that_were_stored(run: Run) -> None:
    log = run["activations", "train"]
    assert_identical(log.features("fc", 10), features_of(10))
    assert_identical(log["head"].features(), features_of(30)[:, :2])
    assert_identical(log["fc"].array("full", 20), features_of(20))


def test_layer_knows_its_steps_and_fields(run: Run) -> None:
    log = run["activations", "train"]
    assert log["late"].steps == [20]
    assert log["conv1"].steps == STEPS
    assert log["head"].fields == ["sketch"]


def test_stack_goes_across_files_in_order_of_steps(run: Run) -> None:
    log = run["activations", "train"]
    assert_identical(log.stack("gram", layer="conv1"), np.stack([gram_of(s) for s in STEPS]))
    assert_identical(
        log.stack("gram", [30, 0, -3], "conv1"), np.stack([gram_of(s) for s in (30, 0, 10)])
    )
    assert run.scalars.stack("loss").tolist() == [0, 5, 10, 15]


def test_stack_takes_the_steps_that_have_the_array(run: Run) -> None:
    log = run["activations", "train"]
    assert_identical(log.stack("gram", layer="late"), gram_of(20)[np.newaxis])


def test_tables_belong_to_their_source(run: Run) -> None:
    train, test = run["activations", "train"], run["activations", "test"]
    assert train.ids is not None
    assert test.ids is not None
    assert train.targets is not None
    assert train.ids.tolist() == [7, 5, 9]
    assert test.ids.tolist() == [8, 6, 10]
    assert train.targets.tolist() == [0, 1, 0]
    assert (test.targets, run.scalars.ids) == (None, None)


def test_table_written_again_replaces_the_one_before(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for value in (1, 2):
        writer.add_table("probe", [LogArray("id", np.full(3, value), ("example",))])
    writer.append("m", "probe", 0, [])
    writer.close()
    for _ in range(2):
        assert open_run(run_path).m.table("id").tolist() == [2, 2, 2]
        seal_run(run_path)


def test_step_recorded_twice_counts_as_it_was_last(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for value in (1, 2):
        writer.append("m", "s", 0, [LogArray("a", np.array(value), ())])
    writer.close()
    for _ in range(2):
        assert open_run(run_path).m.stack("a").tolist() == [2]
        seal_run(run_path)


def test_steps_recorded_out_of_order_are_sorted(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in (20, 0, 10):
        writer.append("m", "s", step, [LogArray("a", np.array(step), ())])
    writer.close()
    for _ in range(2):
        assert open_run(run_path).m.steps == [0, 10, 20]
        assert open_run(run_path).m.stack("a").tolist() == [0, 10, 20]
        seal_run(run_path)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda run: run["gradients"],
            MeasureNotFoundError,
            "run 'seed0' has no records of 'gradients'; it has: activations, scalars",
        ),
        (
            lambda run: run.gradients,
            AttributeError,
            "run 'seed0' has no records of 'gradients'; it has: activations, scalars",
        ),
        (
            lambda run: run.activations,
            MeasureNotFoundError,
            r"'activations' of run 'seed0' has several sources; name one, as in "
            r"run\['activations', 'train'\]: train, test",
        ),
        (
            lambda run: run["activations", "val"],
            KeyError,
            "'activations' of run 'seed0' has no source 'val'; it has: train, test",
        ),
        (
            lambda run: run.steps("activations", "val"),
            MeasureNotFoundError,
            "has no source 'val'; it has: train, test",
        ),
        (
            lambda run: run.to_xarray(["gradients"]),
            MeasureNotFoundError,
            "has no records of 'gradients'; it has: activations, scalars",
        ),
        (
            lambda run: run.scalars.array("loss", 15),
            StepNotFoundError,
            "step 15 of 'scalars' was not recorded in run 'seed0'; recorded steps: 0, 10, 20, 30",
        ),
        (
            lambda run: run.scalars.attributes(-5),
            StepNotFoundError,
            "step -5 of 'scalars' was not recorded",
        ),
        (
            lambda run: run["activations", "train"]["fc9"],
            LayerNotFoundError,
            "layer 'fc9' of 'activations' was not recorded in run 'seed0'; "
            "recorded layers: conv1, fc, head, late",
        ),
        (
            lambda run: run["activations", "train"].array("gram", 0, "fc9"),
            LayerNotFoundError,
            "layer 'fc9' of 'activations' was not recorded",
        ),
        (
            lambda run: run["activations", "train"].array("full", 0, "conv1"),
            LayerNotFoundError,
            "'activations' of run 'seed0' has no 'full' for layer 'conv1' at step 0; "
            "there is: gram",
        ),
        (
            lambda run: run["activations", "train"]["late"].gram(0),
            LayerNotFoundError,
            "has no 'gram' for layer 'late' at step 0; there is: nothing",
        ),
        (
            lambda run: run["activations", "train"].stack("gram", [20, 0], "late"),
            LayerNotFoundError,
            "has no 'gram' for layer 'late' at step 0; there is: nothing",
        ),
        (
            lambda run: run.scalars.stack("accuracy"),
            LayerNotFoundError,
            "'scalars' of run 'seed0' has no 'accuracy' for the record at step 0; there is: loss",
        ),
        (
            lambda run: run.scalars.gram(),
            LayerNotFoundError,
            "has no 'gram_total' for the record at step 30; there is: loss",
        ),
        (
            lambda run: run["activations", "train"].features("conv1"),
            LayerNotFoundError,
            r"'activations' kept only gram of layer 'conv1'; record it with store=Full\(\) or "
            r"Sketch\(\) to have features",
        ),
        (
            lambda run: run["activations", "train"].table("triplet"),
            InvalidInputError,
            "source 'train' has no table 'triplet'; it has: id, target",
        ),
        (
            lambda run: run.scalars.table("id"),
            InvalidInputError,
            "source 'training' has no table 'id'; it has: none",
        ),
    ],
)
def test_message_says_what_there_is(
    run: Run, ask: Callable[[Run], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask(run)


def test_message_shortens_a_long_listing(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in range(20):
        writer.append("m", "s", step, [])
    writer.close()
    with pytest.raises(
        StepNotFoundError, match=r"steps: 0, 1, 2, 3, 4, 5, 6, 7, 8, … \(9 more\), 18, 19$"
    ):
        open_run(run_path).m.resolve_step(20)


def test_private_names_are_not_measures(run: Run) -> None:
    with pytest.raises(AttributeError, match=r"^_ipython_display_$"):
        _ = run._ipython_display_


def test_tree_has_names_and_coordinates(run: Run) -> None:
    tree = run.to_xarray()
    assert set(tree.groups) == {
        "/", "/activations", "/activations/train", "/activations/test",
        "/scalars", "/scalars/training",
    }  # fmt: skip
    train = tree["activations/train"].to_dataset()
    assert train["conv1:gram"].dims == ("step", "example", "other_example")
    assert train["step"].values.tolist() == STEPS
    assert train["target"].sel(example=5).item() == 1
    values = train["conv1:gram"].sel(step=10, example=7).values
    assert_identical(values, gram_of(10)[0])
    assert tree["scalars/training"].to_dataset()["loss"].values.tolist() == [0, 5, 10, 15]
    assert tree.attrs["state"] == "finished"


def test_record_without_a_stream_reads_as_nan_in_a_tree(run: Run) -> None:
    late = run.to_xarray()["activations/train"]["late:gram"]
    assert late.notnull().all(("example", "other_example")).values.tolist() == [
        False, False, True, False
    ]  # fmt: skip
    assert_identical(late.sel(step=20).values, gram_of(20))


def test_tree_can_be_restricted(run: Run) -> None:
    tree = run.to_xarray(["activations"], layers=["fc"], steps=[10, 30])
    train = tree["activations/train"].to_dataset()
    assert set(train.data_vars) == {"fc:full", "gram_total"}
    assert train["step"].values.tolist() == [10, 30]
    assert "scalars" not in tree.children


def test_second_size_of_a_dimension_gets_a_name_of_its_own_in_a_tree(run: Run) -> None:
    train = run.to_xarray()["activations/train"].to_dataset()
    assert train["fc:full"].dims == ("step", "example", "feature")
    assert train["head:sketch"].dims == ("step", "example", "feature_2")


def test_tree_names_ragged_streams(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for step in range(3):
        writer.append("m", "s", step, [LogArray("a", np.arange(step), ("n",), "fc")])
    writer.close()
    dataset = open_run(run_path).to_xarray()["m/s"].to_dataset()
    assert dataset.attrs["ragged"] == ["fc:a"]
    assert list(dataset.data_vars) == []


def test_tree_takes_streams_named_like_dimensions(run_path: Path) -> None:
    names = ["step", "example", "target", "feature"]
    writer = LogWriter(run_path, seal=False)
    writer.add_table("s", [LogArray(name, IDS, ("example",)) for name in ("id", "target")])
    arrays = [LogArray(name, np.arange(3), ("example",)) for name in names]
    arrays.append(LogArray("wide", np.zeros((3, 5)), ("step", "feature")))
    for step in range(2):
        writer.append("m", "s", step, arrays)
    writer.close()
    dataset = open_run(run_path).to_xarray()["m/s"].to_dataset()
    assert {f"{name}::data" for name in names} | {"wide"} == set(dataset.data_vars)
    assert dataset["step"].values.tolist() == [0, 1]
    assert dataset["step::data"].values.tolist() == [[0, 1, 2]] * 2


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
        writer.append("activations", "probe", number, record_of(number))
        writer.flush()
        seal_run(run_path, before=int(journals_of(run_path)[-1].stem))
        assert run.steps() == list(range(number))
        run.refresh()
        assert run.steps() == list(range(number + 1))
    writer.close()
    assert len(segments_of(run_path)) > 1
    assert_intact(run_path, range(8))


def record_and_flush(writer: LogWriter, number: int) -> None:
    assert writer.append("activations", "probe", number, record_of(number))
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


@pytest.mark.parametrize("are_sealed", [False, True])
def test_resumed_attempt_hides_what_it_supersedes(run_path: Path, are_sealed: bool) -> None:
    for attempt, (steps, about) in enumerate(
        [
            (range(0, 100, 10), {}),
            (range(50, 80, 10), {"resume_step": 50}),
            (range(65, 90, 5), {"resume_step": 65}),
        ]
    ):
        writer = LogWriter(run_path, attempt=attempt, about=about, seal=False)
        for step in steps:
            writer.append("m", "s", step, [LogArray("attempt", np.array(attempt), ())])
        writer.close()
    if are_sealed:
        seal_run(run_path)
    log = open_run(run_path).m
    assert dict(zip(log.steps, log.stack("attempt").tolist(), strict=True)) == {
        **dict.fromkeys(range(0, 50, 10), 0),
        **dict.fromkeys(range(50, 65, 10), 1),
        **dict.fromkeys(range(65, 90, 5), 2),
    }


def test_attempt_that_started_afresh_hides_everything_before(run_path: Path) -> None:
    write_records(run_path, range(5))
    write_records(run_path, [1])
    assert open_run(run_path).steps() == [1]
    assert open_run(run_path).attempts[1]["attempt"] == 1


def test_attempt_that_lost_its_resume_step_hides_from_its_first_record_on(run_path: Path) -> None:
    write_records(run_path, range(7))
    write_records(run_path, range(5, 9), resume_step=None)
    run = assert_intact_except_copies(run_path, range(9))
    assert [about.get("resume_step", 0) for about in run.attempts] == [0, None]


def test_attempt_whose_resume_step_is_damaged_hides_from_its_first_record_on(
    run_path: Path,
) -> None:
    write_records(run_path, range(5))
    write_records(run_path, range(3, 7), resume_step=3)
    journal = run_path / "attempt1-rank0" / "000000000000.journal"
    content = bytearray(journal.read_bytes())
    content[100] ^= 1
    journal.write_bytes(content)
    run = assert_intact_except_copies(run_path, range(7))
    assert len(run.damage) == 1


def assert_intact_except_copies(path: Path, numbers: range) -> Run:
    run = open_run(path)
    assert run.steps() == list(numbers)
    for number in numbers:
        assert_identical(run.activations.array("loss", number), record_of(number)[3].values)
    return run


def test_attempts_are_ordered_by_number(run_path: Path) -> None:
    for attempt in (2, 10, 9):
        LogWriter(run_path, attempt=attempt, about={"host": str(attempt)}, seal=False).close()
    assert [about["host"] for about in open_run(run_path).attempts] == ["2", "9", "10"]


def test_run_of_a_newer_format_is_refused(run_path: Path) -> None:
    (run_path / "run.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(
        FormatError,
        match=r"seed0 has log format 2; this sonde reads up to 1\. Install a newer sonde\.",
    ):
        open_run(run_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "new"}', '{"format": null}'])
def test_damaged_run_file_is_refused(run_path: Path, text: str) -> None:
    (run_path / "run.json").write_text(text)
    with pytest.raises(FormatError, match=r"run\.json is damaged: "):
        open_run(run_path)


def test_run_file_is_replaced_as_a_whole(run_path: Path) -> None:
    write_run_file(run_path, {"name": "new", "layers": ["größe"]})
    assert open_run(run_path).info == {"format": 1, "name": "new", "layers": ["größe"]}
    assert [path.name for path in run_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path / "none", "none does not exist; expected a run directory"),
        (lambda path: path / "seed0" / "run.json", "run.json is a file; expected a run directory"),
        (lambda path: path / "seed0" / "empty", r"empty is no run directory: it has no run\.json$"),
        (lambda path: path, r"is no run directory, but holds some: .*seed0, .*seed1$"),
    ],
)
def test_path_without_a_run_says_what_is_there(
    tmp_path: Path, prepare: Callable[[Path], Path], message: str
) -> None:
    for name in ("seed1", "seed0"):
        new_run(tmp_path / name)
    (tmp_path / "seed0" / "empty").mkdir()
    with pytest.raises(RunNotFoundError, match=message):
        open_run(prepare(tmp_path))


def test_runs_below_a_folder_are_found(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    paths = [new_run(tmp_path / "sweep" / "b"), new_run(tmp_path / "sweep" / "a")]
    assert find_runs(tmp_path) == sorted(paths)
    assert find_runs(paths[0]) == paths[:1]


def test_path_may_be_a_string(run_path: Path) -> None:
    write_records(run_path, range(2))
    assert open_run(str(run_path)).steps() == [0, 1]


def test_moved_run_reads_the_same(run_path: Path, tmp_path: Path) -> None:
    write_records(run_path, range(6), segment_bytes=3000)
    seal_run(run_path, before=1)
    moved = tmp_path / "moved"
    shutil.move(run_path, moved)
    assert assert_intact(moved, range(6)).name == "moved"


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


def test_tree_takes_measures_and_sources_of_any_name(run_path: Path) -> None:
    writer = LogWriter(run_path, seal=False)
    for measure, source in (("", ".."), ("a/b", "."), ("..", "")):
        writer.append(measure, source, 0, [LogArray("a", np.array(1.0), ())])
    writer.close()
    tree = open_run(run_path).to_xarray()
    assert {node.path for node in tree.leaves} == {"/%/%2E%2E", "/a%2Fb/%2E", "/%2E%2E/%"}


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

    assert run._retry(read) == "three"
    with pytest.raises(FileNotFoundError):
        run._retry(lambda: (run_path / "lost").read_text())
