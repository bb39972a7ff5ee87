"""What of a run TensorBoard gets to see: scalars over the steps, and a few pictures.

Each part is a function of one measure × source that computes, then writes. A part whose analysis
cannot be done (its examples change from step to step, say) is left out with a warning that says
why; the others are written.
"""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import InvalidInputError, SondeError
from sonde.log import MeasureLog, Run, open_run
from sonde.visible import visible, visible_lines

from ._events import EventWriter, event_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def export(
    run: Run | str | os.PathLike[str],
    logdir: str | os.PathLike[str] | None = None,
    *,
    max_images: int = 10,
    on_part: Callable[[str], object] | None = None,
) -> Path:
    """Write a run as TensorBoard event files, in place of those an earlier export wrote.

    Tags are `stiffness/…`, `predictions/accuracy` and `predictions/loss` (mean cross-entropy in
    nats), `decision_planes/fragmentation`, `cka_to_last/LAYER` (debiased CKA of a layer with itself
    at its last recorded step), `scalars/NAME`, and `MEASURE/FIELD` for other numbers; pictures are
    `cka/last_step`, `stiffness/class_matrix` and `decision_planes/planes`. Where a measure has
    several sources, the source follows the first word. Points carry the time of their record.

    Args:
        run: The run, or its directory.
        logdir: Where the event file goes; `RUN/tensorboard` if None.
        max_images: Pictures per tag, evenly spaced over the steps; 0 draws none. TensorBoard itself
            keeps 10 unless it is started with `--samples_per_plugin images=1000`.
        on_part: Called with the name of each part before it is computed.

    Returns:
        The folder to give to `tensorboard --logdir`.

    Raises:
        InvalidInputError: If `max_images` < 0, the run has no records yet, or no `logdir` is given
            and the run cannot be written.
        SondeError: If tensorboard is not installed.

    Example::

        export("runs/seed0")  # then: tensorboard --logdir runs/seed0/tensorboard
    """
    if max_images < 0:
        raise InvalidInputError(f"`max_images` (={max_images}) must be >= 0")
    opened = run if isinstance(run, Run) else open_run(run)
    if not opened.measures:
        raise InvalidInputError(f"run '{opened.name}' has no records yet: nothing to export")
    folder = opened.path / "tensorboard" if logdir is None else Path(logdir)
    if logdir is None and not _can_write(folder):
        raise InvalidInputError(
            f"{folder} cannot be written; give another folder for the events: --logdir DIR "
            "(export(run, logdir))"
        )
    with event_file(folder) as writer:
        for measure in opened.measures:
            sources = opened.sources(measure)
            for source in sources:
                page = _Page(
                    writer,
                    source if len(sources) > 1 else None,
                    opened[measure, source],
                    max_images,
                )
                for part in [*_PARTS.get(measure, []), _write_numbers]:
                    if on_part is not None:
                        on_part(f"{measure} of {source}")
                    _write(part, opened[measure, source], page)
    return folder


def _can_write(folder: Path) -> bool:
    """Tell whether a folder can be written, or made where it is not there."""
    there = folder if folder.exists() else folder.parent
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@dataclass(frozen=True)
class _Page:
    """Where the values of one measure × source go."""

    writer: EventWriter
    source: str | None  # Named in the tag, or None where it is the only one.
    log: MeasureLog
    max_images: int

    def scalars(self, group: str, name: str, steps: Sequence[int], values: npt.ArrayLike) -> None:
        """Write a number per step; a series that is NaN throughout has nothing to show."""
        series = np.asarray(values, dtype=np.float64)
        if np.isnan(series).all():
            return
        for step, value in zip(steps, series.tolist(), strict=True):
            self.writer.scalar(self._tag(group, name), value, step, self._seconds(step))

    def pictures(
        self, group: str, name: str, steps: Sequence[int], draw: Callable[[int], Figure]
    ) -> None:
        """Draw a picture per step, evenly spaced where there are too many."""
        count = min(len(steps), self.max_images)
        # The last step counts most: it is there even if it is the only one.
        chosen = [steps[at] for at in np.linspace(len(steps) - 1, 0, count).round().astype(int)]
        for step in reversed(chosen):
            png, size = _png(draw(step))
            self.writer.image(self._tag(group, name), png, size, step, self._seconds(step))

    def _tag(self, group: str, name: str) -> str:
        parts = [group, name] if self.source is None else [group, self.source, name]
        return "/".join(visible(part) for part in parts)

    def _seconds(self, step: int) -> float:
        return self.log.time(step) or time.time()


def _write(part: Callable[[MeasureLog, _Page], None], log: MeasureLog, page: _Page) -> None:
    try:
        part(log, page)
    except SondeError as error:
        what = part.__name__.removeprefix("_write_").replace("_", " ")
        warnings.warn(
            visible_lines(
                f"{what} of '{log.source}' in run '{log.run.name}' is not exported: {error}"
            ),
            RuntimeWarning,
            stacklevel=3,
        )


def _write_cka_over_steps(log: MeasureLog, page: _Page) -> None:
    from sonde import analysis

    similarity = analysis.cka_over_steps(log.run, source=log.source)
    for layer in similarity["layer"].values.tolist():
        values = similarity.sel(layer=layer).values
        page.scalars("cka_to_last", layer or "(model)", similarity["step"].values.tolist(), values)


def _write_cka_map(log: MeasureLog, page: _Page) -> None:
    if not page.max_images:  # Nothing but a picture comes of it.
        return
    from sonde import analysis

    similarity = analysis.cka(log.run, source=log.source)
    page.pictures("cka", "last_step", log.steps[-1:], lambda _: analysis.plots.cka(similarity))


def _write_stiffness(log: MeasureLog, page: _Page) -> None:
    from sonde import analysis

    grouped = _has_classes(log.targets)
    result = analysis.stiffness(log.run, by="class" if grouped else None, source=log.source)
    steps = result["step"].values.tolist()
    for kind in ("sign", "cosine"):
        for variable in (kind, f"{kind}_within", f"{kind}_between"):
            if variable in result:
                page.scalars("stiffness", variable, steps, result[variable].values)
    page.scalars("stiffness", "zero_gradients", steps, result["num_zero_gradients"].values)
    if grouped:
        page.pictures(
            "stiffness",
            "class_matrix",
            steps,
            lambda step: analysis.plots.class_matrix(result, step=step),
        )


def _write_predictions(log: MeasureLog, page: _Page) -> None:
    targets = log.targets
    scores = [_score(log.array("logits", step), targets, step) for step in log.steps]
    page.scalars("predictions", "accuracy", log.steps, [accuracy for accuracy, _ in scores])
    page.scalars("predictions", "loss", log.steps, [loss for _, loss in scores])


def _score(
    logits: npt.NDArray[Any],  # Any: whichever float type was recorded.
    targets: npt.NDArray[Any] | None,
    step: int,
) -> tuple[float, float]:
    """Compute accuracy and mean cross-entropy of scores of classes, or of one logit per example.

    Raises:
        InvalidInputError: If there is not one class label, among the classes, per example.
    """
    from sonde.log.predictions import is_one_logit, predicted_classes

    is_classified = _has_classes(targets) and logits.ndim <= 2
    if targets is None or not is_classified or targets.shape != logits.shape[:1]:
        shape = None if targets is None else list(targets.shape)
        raise InvalidInputError(
            f"logits of shape {list(logits.shape)} at step {step} with targets of shape {shape}; "
            "expected [examples, classes] and one class label per example"
        )
    labels = targets.astype(np.int64)
    values = logits.astype(np.float64)
    if is_one_logit(logits, labels):  # The scores of classes 0 and 1, of which the first is 0.
        values = np.stack([np.zeros(len(labels)), values.reshape(-1)], axis=1)
    elif logits.ndim < 2:
        raise InvalidInputError(
            f"one logit per example at step {step} with class labels up to {labels.max()}; "
            "expected labels 0 and 1"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < values.shape[1]:
        raise InvalidInputError(
            f"class labels from {labels.min()} to {labels.max()}; "
            f"expected 0 to {values.shape[1] - 1}"
        )
    # A diverged model has infinite logits: its loss is NaN, without numpy's warnings.
    with np.errstate(invalid="ignore"):
        shifted = values - values.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(shifted).sum(axis=1))
        losses = log_sums - shifted[np.arange(len(labels)), labels]
    return float((predicted_classes(logits, labels) == labels).mean()), float(losses.mean())


def _write_decision_planes(log: MeasureLog, page: _Page) -> None:
    from sonde import analysis

    result = analysis.fragmentation(log.run, source=log.source)
    steps = result["step"].values.tolist()
    page.scalars("decision_planes", "fragmentation", steps, result["fragmentation"].values)
    page.pictures(
        "decision_planes",
        "planes",
        steps,
        lambda step: analysis.plots.decision_planes(log.run, step=step, source=log.source),
    )


def _write_numbers(log: MeasureLog, page: _Page) -> None:
    """Write every stream that is a single number per record."""
    for layer, field in log.streams:
        steps, values = _numbers(log, layer, field)
        if steps:
            page.scalars(log.measure, field if layer is None else f"{field}/{layer}", steps, values)


def _numbers(log: MeasureLog, layer: str | None, field: str) -> tuple[list[int], list[float]]:
    """Read a stream of single numbers; nothing if it is anything else."""
    # Not every record needs to have it, and the others cost nothing to look at.
    has = [step for step in log.steps if (layer, field) in log.describe(step)]
    if any(log.describe(step)[layer, field].shape != () for step in has):
        return [], []
    return has, log.stack(field, has, layer).astype(np.float64).tolist()


def _has_classes(targets: npt.NDArray[Any] | None) -> bool:
    return targets is not None and targets.ndim == 1 and targets.dtype.kind in "iub"


def _png(figure: Figure) -> tuple[bytes, tuple[int, int]]:
    """Draw a figure as PNG; width and height stand at a fixed place in every such file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    png = picture.getvalue()
    return png, (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big"))


_PARTS = {
    "activations": [_write_cka_over_steps, _write_cka_map],
    "example_gradients": [_write_stiffness],
    "predictions": [_write_predictions],
    "decision_planes": [_write_decision_planes],
}
