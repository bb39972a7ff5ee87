"""Whatever is called exact is right to a stated tolerance, and whatever is not is named.

Of models × losses × regimes a part is drawn, the same every day. A case holds what is recorded
against a loop over single examples in float64 (`truth.py`), by one checker (`checker.py`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks import ExampleGradientResult
from sonde.hooks.gradients.factors.outer import Outer

from . import checker
from .cases import Setup, drawn, fits, make_setup, named, pairs
from .losses import COUPLED_LOSSES
from .models import CLASSIFIERS, LANGUAGE_MODELS
from .truth import Truth, own_truth

SKETCH_DIM = 4096
STORES = {"Full": sonde.Full(), "Gram": sonde.Gram(), "Sketch": sonde.Sketch(SKETCH_DIM)}
# In standard errors. Where two large entries of a gradient meet in one sum, a count sketch is off
# by several of them; whether it is of these rows shows well within.
NUM_ERRORS = 12.0

DATA = ("plain", "sure", "very sure", "offset")
# 3: batches of unequal content and size; 4: of equal size, the first of full length.
BATCH_SIZES = (None, 3, 4)
# What float64 loses too, as 1 − p, or what is so small that float32 has no squares of it.
TOO_SMALL = {
    "sure": ("focal",),
    "very sure": ("focal", "label smoothing", "nll of log-softmax", "squares"),
}


def makes_sense(model: str, loss: str, data: str) -> bool:
    """Whether a model has such data, and its loss a gradient there in float64."""
    if data == "offset" and model in LANGUAGE_MODELS:
        return False
    return loss not in TOO_SMALL.get(data, ()) and (data, model) != ("very sure", "layerscale")


PROBES = drawn(
    [
        (*pair, *rest)
        for pair in pairs()
        for rest in itertools.product(DATA, BATCH_SIZES, STORES)
        if pair[1] not in COUPLED_LOSSES and makes_sense(*pair, rest[0])
    ],
    # Every model with every loss, and language models, of which there are fewer, with all data.
    lambda case: case[:2] if case[0] in CLASSIFIERS else case[:4],
    each=2,
)


def gradients_of(setup: Setup, batch_size: int | None, store: str) -> ExampleGradientResult:
    """Compute the gradients of a probe, as a user does."""
    options: dict[str, Any] = {"store": STORES[store], "batch_size": batch_size}
    if setup.returns_loss:
        inputs = (setup.inputs, setup.targets)
        return sonde.example_gradients(setup.model, None, inputs, **options)
    return sonde.example_gradients(
        setup.model, setup.loss.given, setup.inputs, setup.targets, **options
    )


def wrong_result(result: ExampleGradientResult, truth: Truth) -> Iterator[str]:
    """Yield what is claimed of a result and is not so."""
    yield from checker.wrong_coverage(result.coverage, truth.rows)
    covered = {
        name: rows
        for name, rows in truth.rows.items()
        if checker.is_covered(result.coverage.get(name, ""))
    }
    if not covered:
        return
    yield from checker.wrong_norms(result.norms, covered)
    if result.parameters:
        yield from checker.wrong_rows(result.parameters, covered)
        if set(result.parameters) != set(covered):
            yield f"there are rows of {sorted(result.parameters)}, covered are {sorted(covered)}"
    elif result.total is not None and result.total.shape[1] == SKETCH_DIM:
        yield from checker.wrong_sketch(result.total, covered, NUM_ERRORS)
    elif result.total is not None:
        yield from checker.wrong_gram(result.total, covered)
    for layer, norms in result.layer_norms.items():
        of_layer = {n: rows for n, rows in covered.items() if n.rpartition(".")[0] == layer}
        if of_layer:
            yield from (f"layer {layer}: {w}" for w in checker.wrong_norms(norms, of_layer))


@pytest.mark.parametrize("case", PROBES, ids=named)
def test_gradients_of_a_probe(case: tuple[str, str, str, int | None, str]) -> None:
    model, loss, data, batch_size, store = case
    setup = make_setup(model, loss, data)
    truth = own_truth(setup.model, setup.loss, setup.inputs, setup.targets)
    result = gradients_of(setup, batch_size, store)
    assert "; ".join(wrong_result(result, truth)) == ""


TWICE = [
    case
    for case in itertools.product(
        ("own loss", "own loss in a dict", "gpt"), ("its own", "token mean"), (False, True), STORES
    )
    if fits(*case[:2])
]


@pytest.mark.parametrize("case", TWICE, ids=named)
def test_what_is_known_of_some_examples_is_not_taken_for_others(
    case: tuple[str, str, bool, str],
) -> None:
    model, loss, starts_short, store = case
    setup = make_setup(model, loss)
    halves = [slice(0, 4), slice(4, 8)]
    for rows in halves[::-1] if starts_short else halves:
        part = replace(setup, inputs=setup.inputs[rows], targets=setup.targets[rows])
        truth = own_truth(part.model, part.loss, part.inputs, part.targets)
        assert "; ".join(wrong_result(gradients_of(part, None, store), truth)) == ""


COUPLED = drawn(
    itertools.product(("mlp", "cnn", "lstm"), COUPLED_LOSSES, BATCH_SIZES, STORES),
    lambda case: case[:3],
    each=1,
)


@pytest.mark.parametrize("case", COUPLED, ids=named)
def test_a_loss_that_couples_examples_has_no_gradients_on_a_probe(
    case: tuple[str, str, int | None, str],
) -> None:
    model, loss, batch_size, store = case
    setup = make_setup(model, loss)
    with contextlib.suppress(InvalidInputError):
        result = gradients_of(setup, batch_size, store)
        assert [k for k in result.coverage.values() if checker.is_covered(k)] == []


def test_the_checker_complains_of_what_is_wrong() -> None:
    setup = make_setup("mlp", "cross entropy")
    truth = own_truth(setup.model, setup.loss, setup.inputs, setup.targets)
    for store in STORES:
        assert list(wrong_result(gradients_of(setup, None, store), truth)) == []
    for factor in (1.01, 0.99, -1.0, float("nan")):
        result = gradients_of(setup, None, "Full")
        result.parameters["head.bias"] = factor * result.parameters["head.bias"]
        assert len(list(wrong_result(result, truth))) == 1
    for store, attribute in (("Gram", "total"), ("Sketch", "norms")):
        result = gradients_of(setup, None, store)
        setattr(result, attribute, 1.01 * getattr(result, attribute))
        assert len(list(wrong_result(result, truth))) == 1


def test_the_checker_complains_of_a_rule_that_is_a_little_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = make_setup("mlp", "cross entropy")
    truth = own_truth(setup.model, setup.loss, setup.inputs, setup.targets)
    form = Outer.form
    monkeypatch.setattr(Outer, "form", lambda self, rows: 1.01 * form(self, rows))
    # Their own check finds it, and others are computed; without it nothing would.
    assert list(wrong_result(gradients_of(setup, None, "Full"), truth)) == []
    monkeypatch.setattr("sonde.hooks.gradients.compute.differing", lambda *_, **__: {})
    setup = make_setup("mlp", "cross entropy")  # What is known of the other is kept.
    assert list(wrong_result(gradients_of(setup, None, "Full"), truth)) != []
