import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # ships no types
    EventAccumulator,
)

from sonde import analysis
from sonde.exceptions import InvalidInputError, SondeError
from sonde.integrations.tensorboard import export
from sonde.log import LogArray, LogWriter, open_run
from sonde.log.format.files import write_run_file

STEPS = [0, 10, 20]
TARGETS = np.array([0, 1, 2, 0, 1, 2, 0, 1])
LOGITS = np.random.default_rng(5).normal(size=(3, 8, 3)).astype(np.float32)
SCALAR_TAGS = [
    "cka_to_last/conv1",
    "cka_to_last/fc",
    "decision_planes/fragmentation",
    "predictions/accuracy",
    "predictions/loss",
    "scalars/learning_rate",
    "scalars/train/loss",
    "stiffness/cosine",
    "stiffness/cosine_between",
    "stiffness/cosine_within",
    "stiffness/sign",
    "stiffness/sign_between",
    "stiffness/sign_within",
    "stiffness/zero_gradients",
]


def write_run(path: Path, sources: Sequence[str] = ("probe",)) -> Path:
    """Write every measure at three steps: 8 examples of 3 classes, 2 layers, 2 planes."""
    path.mkdir(parents=True)
    write_run_file(path, {})
    writer = LogWriter(path, seal=False)
    for source in sources:
        ids = LogArray("id", np.arange(8), ("example",))
        writer.add_table(source, [ids, LogArray("target", TARGETS, ("example",))])
    writer.add_table(
        "planes",
        [
            LogArray("triplet_target", np.zeros((2, 3), np.int64), ("triplet", "corner")),
            LogArray("coordinates", np.zeros((2, 3, 2)), ("triplet", "corner", "axis")),
            LogArray("extent", np.tile([-1.0, 1.0], (2, 2, 1)), ("triplet", "axis", "bound")),
        ],
    )
    rng = np.random.default_rng(0)
    for index, step in enumerate(STEPS):
        for source in sources:
            grams = [gram(rng, "conv1"), gram(rng, "fc")]
            writer.append("activations", source, step, grams)
            writer.append("example_gradients", source, step, [gram(rng, None)])
            logits = LogArray("logits", LOGITS[index], ("example", "class"))
            writer.append("predictions", source, step, [logits])
        labels = rng.integers(0, 3, (2, 5, 5)).astype(np.uint8)
        planes = LogArray("labels", labels, ("triplet", "row", "column"))
        writer.append("decision_planes", "planes", step, [planes], {"digest": "d"})
        scalars = [LogArray("train/loss", np.array(step / 4), ())]
        if step:
            scalars.append(LogArray("learning_rate", np.array(0.5), ()))
        writer.append("scalars", "training", step, scalars)
    writer.close()
    return path


def gram(rng: np.random.Generator, layer: str | None) -> LogArray:
    features = rng.normal(size=(8, 4))
    dims = ("example", "other_example")
    return LogArray("gram" if layer else "gram_total", features @ features.T, dims, layer)


def read(folder: Path) -> EventAccumulator:
    """Read event files as TensorBoard does, keeping every event."""
    return EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()


def scalars(folder: Path, tag: str) -> dict[int, float]:
    return {event.step: event.tensor_proto.float_val[0] for event in read(folder).Tensors(tag)}


def tags(folder: Path, plugin: str) -> list[str]:
    return sorted(read(folder).PluginTagToContent(plugin))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("tensorboard") / "run")


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return export(run)


def test_default_folder_is_inside_the_run(run: Path, exported: Path) -> None:
    assert exported == run / "tensorboard"


def test_scalar_tags(exported: Path) -> None:
    assert tags(exported, "scalars") == SCALAR_TAGS


def test_image_tags(exported: Path) -> None:
    assert tags(exported, "images") == [
        "cka/last_step",
        "decision_planes/planes",
        "stiffness/class_matrix",
    ]


def test_loss_and_accuracy_are_those_of_the_logits(exported: Path) -> None:
    for index, step in enumerate(STEPS):
        logits = LOGITS[index].astype(np.float64)
        slow = [
            -np.log(np.exp(row[target]) / np.exp(row).sum())
            for row, target in zip(logits, TARGETS, strict=True)
        ]
        # The event file holds float32.
        assert scalars(exported, "predictions/loss")[step] == pytest.approx(np.mean(slow), rel=1e-6)
        accuracy = np.mean(logits.argmax(axis=1) == TARGETS)
        assert scalars(exported, "predictions/accuracy")[step] == pytest.approx(accuracy)


def test_scalars_are_those_of_the_analyses(run: Path, exported: Path) -> None:
    opened = open_run(run)
    stiffness = analysis.stiffness(opened)
    expected: dict[str, npt.NDArray[Any]] = {
        "stiffness/cosine_within": stiffness["cosine_within"].values,
        "stiffness/sign_between": stiffness["sign_between"].values,
        "decision_planes/fragmentation": analysis.fragmentation(opened)["fragmentation"].values,
        "cka_to_last/fc": analysis.cka_over_steps(opened).sel(layer="fc").values,
    }
    for tag, values in expected.items():
        points = scalars(exported, tag)
        assert list(points) == STEPS
        np.testing.assert_allclose(list(points.values()), values, rtol=1e-6)


def test_recorded_scalars_have_the_steps_that_have_them(exported: Path) -> None:
    assert scalars(exported, "scalars/train/loss") == {0: 0.0, 10: 2.5, 20: 5.0}
    assert scalars(exported, "scalars/learning_rate") == {10: 0.5, 20: 0.5}


def test_images_are_png_of_the_stated_size(exported: Path) -> None:
    (event,) = read(exported).Tensors("cka/last_step")
    width, height, png = event.tensor_proto.string_val
    assert event.step == 20
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24]) == (int(width), int(height))


def test_points_carry_the_time_of_their_record(run: Path, tmp_path: Path) -> None:
    copied = write_run(tmp_path / "run")
    (journal,) = copied.rglob("*.journal")
    written = journal.stat().st_mtime
    for event in read(export(copied, max_images=0)).Tensors("predictions/loss"):
        assert written - 60 < event.wall_time <= written + 1


def test_number_of_images_is_bounded(run: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path, max_images=2)
    assert [event.step for event in read(folder).Tensors("decision_planes/planes")] == [0, 20]


def test_no_images_on_request(run: Path, tmp_path: Path) -> None:
    assert tags(export(run, tmp_path, max_images=0), "scalars") == SCALAR_TAGS
    assert len(read(tmp_path).Tags()["tensors"]) == len(SCALAR_TAGS)


def test_second_export_replaces_the_first(run: Path, tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.other").write_bytes(b"")
    for _ in range(2):
        export(run, tmp_path, max_images=0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.endswith(".sonde") for name in names] == [False, True]
    assert scalars(tmp_path, "scalars/train/loss") == {0: 0.0, 10: 2.5, 20: 5.0}


def test_failed_export_keeps_the_one_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run, tmp_path, max_images=0)
    before = list(tmp_path.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(analysis, "fragmentation", fail)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path, max_images=0)
    assert list(tmp_path.iterdir()) == before


def test_several_sources_are_named_in_the_tags(tmp_path: Path) -> None:
    folder = export(write_run(tmp_path / "run", sources=("train", "test")), max_images=0)
    assert [tag for tag in tags(folder, "scalars") if tag.endswith("accuracy")] == [
        "predictions/test/accuracy",
        "predictions/train/accuracy",
    ]


def test_part_that_cannot_be_computed_is_left_out_with_its_reason(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    writer = LogWriter(tmp_path, seal=False)
    writer.append("predictions", "live", 0, [LogArray("logits", np.ones((4, 2)), ("e", "c"))])
    writer.append("scalars", "training", 0, [LogArray("loss", np.array(1.0), ())])
    writer.close()
    with pytest.warns(RuntimeWarning, match="predictions of 'live' .* not exported: .*class label"):
        folder = export(tmp_path)
    assert tags(folder, "scalars") == ["scalars/loss"]


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    writer = LogWriter(tmp_path, seal=False)
    writer.add_table("probe", [LogArray("target", np.array([0, 7]), ("example",))])
    logits = LogArray("logits", np.ones((2, 2)), ("example", "class"))
    writer.append("predictions", "probe", 0, [logits])
    writer.close()
    with pytest.warns(RuntimeWarning, match="class labels from 0 to 7; expected 0 to 1"):
        export(tmp_path)


def test_infinite_logits_give_a_loss_that_is_not_a_number(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    writer = LogWriter(tmp_path, seal=False)
    writer.add_table("probe", [LogArray("target", np.array([0, 1]), ("example",))])
    for step, value in ((0, 1.0), (1, np.inf)):
        logits = np.array([[value, 0], [0, 1]])
        writer.append("predictions", "probe", step, [LogArray("logits", logits, ("e", "c"))])
    writer.close()
    losses = scalars(export(tmp_path), "predictions/loss")
    assert np.isfinite(losses[0])
    assert np.isnan(losses[1])


def test_run_without_records_is_refused(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    with pytest.raises(InvalidInputError, match="has no records yet: nothing to export"):
        export(tmp_path)


def test_negative_number_of_images_is_refused(run: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"`max_images` \(=-1\) must be >= 0"):
        export(run, max_images=-1)


def test_missing_tensorboard_names_the_extra(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SondeError, match=r'pip install "sonde\[tensorboard\]"'):
        export(run, tmp_path)
