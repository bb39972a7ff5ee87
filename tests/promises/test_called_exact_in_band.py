"""What is recorded of a training itself: right to a stated tolerance, or named.

A record is of the micro-batches whose gradients made the update, and of no other. Its rows are
what the record says they are: gradients of single examples' losses, or contributions to the loss of
the batch times a factor. Both are held against a loop in float64 over the weights as they were.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sonde
from sonde.log import LogWriter, MeasureLog
from tests.machine import needs_bfloat16_lstm

from . import checker
from .cases import Setup, drawn, make_setup, named, pairs
from .losses import COUPLED_LOSSES
from .models import LANGUAGE_MODELS
from .trainings import NUM_STEPS, Seen, Trained, notes
from .truth import Rows, contributions, doubled, own_truth
from .ways import WAYS, train

STORES = {"Full": sonde.Full(), "Gram": sonde.Gram(), "Sketch": sonde.Sketch(4096)}
NUM_ERRORS = 12.0
# Its own passes are in bfloat16, of 8 bits, and recorded as they are.
TOLERANCES = {"in bfloat16": 0.1}
OWN = "gradient of one example's loss"


def makes_sense(model: str, loss: str, data: str, way: str) -> bool:
    """Whether a case is one: float32 keeps something of it, and bfloat16 too."""
    if way == "in bfloat16":
        return data == "plain" and model not in ("layerscale", "by hand")
    return data == "plain" or loss not in (*COUPLED_LOSSES, "focal", "squares")


CASES = drawn(
    [
        (*pair, data, way, store, tells)
        for pair in pairs()
        for data, way, store, tells in itertools.product(
            ("plain", "sure"), WAYS, STORES, ("told", "untold")
        )
        if makes_sense(*pair, data, way)
    ],
    # Every loss in every way; of losses that are not told only the sums are known.
    lambda case: case[3:4] if case[5] == "untold" else (case[0] in LANGUAGE_MODELS, *case[1:4:2]),
    each=1,
)


@pytest.fixture(autouse=True)
def nothing_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that seals takes longer to start than a case; readers take both forms."""
    monkeypatch.setattr("sonde.hooks.recording.recorder.LogWriter", partial(LogWriter, seal=False))


def expected_rows(setup: Setup, seen: list[Seen], scale: str) -> Rows | None:
    """Return what the rows of a record are, by its own words; None if it calls them unknown."""
    parts = []
    for one in seen:
        inputs, targets = setup.inputs[one.rows], setup.targets[one.rows]
        if scale.startswith(OWN):
            parts.append(own_truth(one.model, setup.loss, inputs, targets).rows)
        elif "contribution" in scale:
            loss = partial(batch_loss, setup, doubled(targets))
            rows = contributions(one.model, loss, inputs)
            number = len(one.rows) if setup.loss.reduction == "mean" else 1
            parts.append({name: number * values for name, values in rows.items()})
        else:
            return None
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def batch_loss(setup: Setup, targets: Tensor, scores: Tensor) -> Tensor:
    """The loss of a batch, as the training has it, of float64 scores."""
    if setup.returns_loss:
        labels = targets.flatten()
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels)
    return doubled(setup.loss.given)(scores, targets)  # type: ignore[no-any-return] # a loss


def wrong_record(setup: Setup, trained: Trained, step: int, tolerance: float) -> Iterator[str]:
    """Yield what a record of a training claims and is not so."""
    log = trained.run.example_gradients
    seen, about = trained.steps[step], log.attributes(step)
    ids = log.ids_at(step)
    if ids is None or ids.tolist() != torch.cat([one.rows for one in seen]).tolist():
        yield f"the examples are {ids}, those of the update {[one.rows.tolist() for one in seen]}"
        return
    yield from wrong_sums(log, step, trained.gradients[step], about, seen, tolerance)
    if about["scale"].startswith(OWN) and setup.loss.own is None:
        yield f"of a loss that couples examples it has the {about['scale']}"
        return
    rows = expected_rows(setup, seen, about["scale"])
    # Of a model that returns its loss alone it is not known, and so not said, what is saturated.
    if rows is None or (setup.is_sure and setup.returns_loss and "num_saturated" not in about):
        return
    coverage = coverage_at(trained.run, step)
    covered = {n: rows[n].flatten(1) for n, kind in coverage.items() if checker.is_covered(kind)}
    if covered:
        yield from wrong_values(log, step, covered, tolerance)


def wrong_values(log: MeasureLog, step: int, covered: Rows, tolerance: float) -> Iterator[str]:
    """Yield what is wrong of the examples that are not called saturated, or zero."""
    # What float32 has left nothing of is counted apart.
    is_named = torch.tensor(log.array("norm_total", step)) == 0
    if int(is_named.sum()) != log.attributes(step)["num_zero_gradients"]:
        yield f"{int(is_named.sum())} gradients are zero, not as many as it says"
    if (None, "is_saturated") in log.streams:
        is_named |= torch.tensor(log.array("is_saturated", step)).bool()
    covered = {name: values[~is_named] for name, values in covered.items()}

    def read(field: str, layer: str | None = None) -> Tensor:
        values = torch.tensor(log.array(field, step, layer)).double()[~is_named]
        return values[:, ~is_named] if field == "gram_total" else values

    if is_named.all():
        return
    yield from checker.wrong_norms(read("norm_total"), covered, tolerance)
    fields = {name for _, name in log.streams}
    if "full" in fields:
        yield from checker.wrong_rows({n: read("full", n) for n in covered}, covered, tolerance)
    elif "gram_total" in fields:
        yield from checker.wrong_gram(read("gram_total"), covered, 2 * tolerance)
    else:
        yield from checker.wrong_sketch(read("sketch_total"), covered, NUM_ERRORS)


def wrong_sums(
    log: MeasureLog,
    step: int,
    gradients: dict[str, Tensor],
    about: dict[str, Any],
    seen: list[Seen],
    tolerance: float,
) -> Iterator[str]:
    """Rows that are kept whole add up to the gradient with which the update was made."""
    if not about["factors"] or "full" not in {name for _, name in log.streams}:
        return
    sizes = [len(one.rows) for one in seen]
    factors = torch.tensor(np.repeat(about["factors"], sizes))
    whole = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name in log.layers:
        if name in gradients and (name, "full") in log.streams:
            rows = torch.tensor(log.array("full", step, name)).double()
            total = (rows / factors[:, None]).sum(0)
            update = gradients[name].flatten().double()
            error = (total - update).norm()
            if not error <= 5 * tolerance * update.norm() + 1e-5 * whole:
                yield f"{name}: rows add up to {float(total.norm() / update.norm()):.3g} of .grad"


def coverage_at(run: sonde.Run, step: int) -> dict[str, str]:
    """Return the coverage that stands in the log for a step: the last that was noted."""
    found = [n for n in notes(run, "coverage") if n["source"] == "training" and n["step"] <= step]
    return dict(found[-1]["parameters"])


def wrong_training(setup: Setup, trained: Trained, tolerance: float) -> Iterator[str]:
    """Yield what is claimed of a training and is not so, and what is missing without a word."""
    try:
        log = trained.run.example_gradients
    except sonde.SondeError:
        log = None
    steps = [] if log is None else log.steps
    missing = [step for step in range(NUM_STEPS) if step not in steps]
    if missing and not trained.said:
        yield f"nothing is recorded of steps {missing}, and nothing is said"
    if set(steps) - set(range(NUM_STEPS)):
        yield f"steps {steps} are recorded of {NUM_STEPS} updates"
    for step in sorted(set(steps) & set(range(NUM_STEPS))):
        yield from (f"step {step}: {w}" for w in wrong_record(setup, trained, step, tolerance))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_gradients_of_a_training(case: tuple[str, ...], tmp_path: Path) -> None:
    model, loss, data, way, store, tells = case
    if model == "lstm" and way == "in bfloat16":
        needs_bfloat16_lstm()
    setup = make_setup(model, loss, data, num=2 * 8)
    trained = train(tmp_path / "run", setup, way, STORES[store], tells_loss=tells == "told")
    tolerance = TOLERANCES.get(way, checker.TOLERANCE)
    assert "; ".join(wrong_training(setup, trained, tolerance)) == ""


def test_the_checker_complains_of_a_changed_label(tmp_path: Path) -> None:
    setup = make_setup("mlp", "cross entropy", num=2 * 8)
    trained = train(tmp_path / "run", setup, "plainly", STORES["Full"])
    assert list(wrong_training(setup, trained, checker.TOLERANCE)) == []
    setup.targets[3] = (setup.targets[3] + 1) % 4
    assert len(list(wrong_training(setup, trained, checker.TOLERANCE))) > 1


def test_the_checker_complains_of_passes_that_did_not_count(tmp_path: Path) -> None:
    setup = make_setup("mlp", "cross entropy", num=2 * 8)
    trained = train(tmp_path / "run", setup, "plainly", STORES["Full"])
    trained.steps[1] = trained.steps[0]
    wrong = list(wrong_training(setup, trained, checker.TOLERANCE))
    assert [one for one in wrong if "the examples are" in one] != []
