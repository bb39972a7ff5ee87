"""Classes and gradients of models with several outputs, wrapped or sure: right, or asked for."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError
from sonde.log import LogWriter
from sonde.log.predictions import predicted_classes

from . import checker
from .cases import MARGINS, make_setup, named
from .losses import LOSSES
from .models import CLASSIFIERS, Classifier, Hidden
from .truth import doubled, own_truth, scores_of

TOLERANCE = 1e-4  # Of the largest score: a float32 pass.
TRIPLETS = [[0, 1, 2], [3, 4, 5]]


class OneLogit(nn.Module):
    """The score of one class of two: it decides by its sign."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x)
        return scores[:, :1] - scores[:, 1:2]


FORMS = ("alone", "(hidden, scores)", "a dict", "one logit", "in bfloat16")
CASES = list(itertools.product(CLASSIFIERS, FORMS, ("plain", "sure")))


@pytest.fixture(autouse=True)
def nothing_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that seals takes longer to start than a case; readers take both forms."""
    monkeypatch.setattr("sonde.hooks.recording.recorder.LogWriter", partial(LogWriter, seal=False))


def in_form(model: nn.Module, form: str) -> nn.Module:
    """Wrap a model so that its outputs have a form."""
    assert isinstance(model, Classifier)
    if form == "one logit":
        return OneLogit(model)
    if form == "in bfloat16":  # As Accelerate does it.
        from accelerate.utils import convert_outputs_to_fp32

        autocast = torch.autocast("cpu", torch.bfloat16)
        forward = convert_outputs_to_fp32(autocast(model.forward))
        model.forward = forward  # type: ignore[method-assign] # as it is done
    return model if form in ("alone", "in bfloat16") else Hidden(model, in_dict=form == "a dict")


@pytest.mark.parametrize("case", CASES, ids=named)
def test_classes_and_gradients_of_outputs(case: tuple[str, str, str], tmp_path: Path) -> None:
    name, form, data = case
    setup = make_setup(name, "cross entropy", data, num=12)
    model = in_form(setup.model, form).eval()
    inputs, targets = setup.inputs, setup.targets
    with torch.no_grad():
        scores = scores_of(doubled(model)(doubled(inputs)))
    classes = (scores[:, 0] > 0).long() if form == "one logit" else scores.argmax(1)
    targets = classes if form == "one logit" else targets
    probe = sonde.Probe(inputs, targets)
    # As many hidden units as there are classes, or more, fit too: it has to be said.
    output = 1 if form == "(hidden, scores)" else None
    planes = sonde.DecisionPlanes(inputs, targets, triplets=TRIPLETS, resolution=6, output=output)
    gradients = sonde.ExampleGradients(probe, loss=by_class, store=sonde.Full())
    measures: list[Any] = [sonde.Predictions(probe, output=output), planes]
    measures += [] if form == "one logit" else [gradients]
    with sonde.Recorder(tmp_path / "run", model, measures, on_error="raise") as recorder:
        recorder.measure()
    run = sonde.open_run(tmp_path / "run")
    recorded = run["predictions"].array("logits", 0)
    assert np.abs(recorded - scores.numpy()).max() <= TOLERANCE * float(scores.abs().max())
    assert predicted_classes(recorded, targets.numpy()).tolist() == classes.tolist()
    labels = run["decision_planes"].array("labels", 0)
    assert wrong_planes(labels, doubled(model), doubled(inputs)) == 0
    if form != "one logit":
        truth = own_truth(model, LOSSES["cross entropy"], inputs, targets)
        assert "; ".join(wrong_gradients(run, truth.rows)) == ""


def by_class(outputs: Any, targets: Tensor) -> Tensor:
    """Cross entropy of the scores, whatever they are in."""
    return F.cross_entropy(scores_of(outputs), targets)


def wrong_gradients(run: sonde.Run, truth: dict[str, Tensor]) -> Any:
    log = run.example_gradients
    (note,) = [n for n in run.notes if n["event"] == "coverage"]
    yield from checker.wrong_coverage(note["parameters"], truth)
    covered = {
        n: v.flatten(1) for n, v in truth.items() if checker.is_covered(note["parameters"][n])
    }
    rows = {name: torch.tensor(log.array("full", 0, name)) for name in covered}
    yield from checker.wrong_rows(rows, covered)


def wrong_planes(labels: Any, model: nn.Module, inputs: Tensor) -> int:
    """Count the points with another class than by float64 scores, where two are not all but equal.

    A plane lies in x₁ + c₁ a + c₂ b, with a towards x₂ and b at right angles towards x₃; its grid
    reaches 0.1 beyond the three, and its rows run along c₂ (Somepalli et al., 2022).
    """
    wrong = 0
    for triplet, found in zip(TRIPLETS, labels, strict=True):
        first, *others = inputs[triplet]
        a = (others[0] - first) / (others[0] - first).norm()
        b = (others[1] - first) - a.dot(others[1] - first) * a
        b = b / b.norm()
        corners = torch.stack(
            [torch.stack([a.dot(x - first), b.dot(x - first)]) for x in inputs[triplet]]
        )
        low, high = corners.amin(0), corners.amax(0)
        reach = 0.1 * (high - low)
        c1, c2 = (
            torch.linspace(float(one), float(other), found.shape[0], dtype=torch.float64)
            for one, other in zip(low - reach, high + reach, strict=True)
        )
        points = first + c1[None, :, None] * a + c2[:, None, None] * b
        with torch.no_grad():
            scores = scores_of(model(points.flatten(0, 1)))
        if scores.shape[1] == 1:
            scores = torch.cat([torch.zeros_like(scores), scores], 1)
        two = scores.topk(2).values
        is_clear = two[:, 0] - two[:, 1] > TOLERANCE * two.abs().max()
        wrong += int((is_clear & (scores.argmax(1) != torch.tensor(found).flatten())).sum())
    return wrong


def test_the_check_of_planes_counts_wrong_classes() -> None:
    setup = make_setup("mlp", "cross entropy", num=12)
    zeros = np.zeros((2, 6, 6), np.int64)
    assert wrong_planes(zeros, doubled(setup.model), doubled(setup.inputs)) > 10


def test_hidden_units_that_fit_too_are_asked_for() -> None:
    setup = make_setup("mlp", "cross entropy")
    model = in_form(setup.model, "(hidden, scores)")
    # As many hidden units as 10: both have a column for each of the classes.
    with pytest.raises(InvalidInputError, match="say which one is meant by `output`"):
        sonde.Predictions(sonde.Probe(setup.inputs, setup.targets)).check(model)


def test_margins_are_those_that_cases_say() -> None:
    for data, (least, highest) in MARGINS.items():
        setup = make_setup("mlp", "cross entropy", data)
        scores = doubled(setup.model)(doubled(setup.inputs)).detach()
        two = scores.topk(2).values
        margins = two[:, 0] - two[:, 1]
        assert scores.argmax(1).tolist() == setup.targets.tolist()
        assert float(margins.min()) >= least - 1e-6
        assert float(margins.max()) <= highest + 1e-6
