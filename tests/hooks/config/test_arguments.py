"""Values of another type: every public constructor says what was given and what is expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sonde
from sonde.exceptions import InvalidInputError

X = torch.arange(32.0).reshape(8, 4)
Y = torch.arange(8) % 2
# Any: these calls are wrong on purpose.
PROBE: Any = sonde.Probe(X, Y)
Activations: Any = sonde.Activations
DecisionPlanes: Any = sonde.DecisionPlanes
Full: Any = sonde.Full
Gram: Any = sonde.Gram
Probe: Any = sonde.Probe
Sketch: Any = sonde.Sketch
at: Any = sonde.at
log_spaced: Any = sonde.log_spaced

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: Full("float16"), "`dtype` (='float16') must be a torch.dtype, such as torch.float16"),
    (lambda: Full(np.float16), "must be a torch.dtype, such as torch.float16"),
    (lambda: Gram("float32"), "`dtype` (='float32') must be a torch.dtype, such as torch.float32"),
    (lambda: Gram(8), "`dtype` (=8) must be a torch.dtype, such as torch.float32"),
    (lambda: Full(units="3"), "`units` (='3') must be a whole number >= 1"),
    (lambda: Full(seed=None), "`seed` (=None) must be a whole number >= 0"),
    (lambda: Gram(block="8"), "`block` (='8') must be a whole number >= 4, because centring"),
    (lambda: Sketch("64"), "`dim` (='64') must be a whole number >= 1"),
    (lambda: Sketch(64.0), "`dim` (=64.0) must be a whole number >= 1"),
    (lambda: at([0, 10]), "`at` takes steps one by one: write at(*steps)"),
    (lambda: at(np.arange(3)), "`at` takes steps one by one: write at(*steps)"),
    (lambda: at("10"), "`at` ('10',) needs at least one step; steps are whole numbers >= 0"),
    (lambda: at(1.5), "`at` (1.5,) needs at least one step; steps are whole numbers >= 0"),
    (lambda: log_spaced(per_decade="8"), "`per_decade` (='8') must be a number > 0"),
    (lambda: Probe(None), "`inputs` contains a NoneType, which is no tensor"),
    (lambda: Probe(["a", "b"]), "`inputs` contains a str, which is no tensor"),
    (lambda: Probe(X.numpy().astype(object)), "`inputs` contains a ndarray of object"),
    (lambda: Probe(X, "abc"), "`targets` contains a str, which is no tensor"),
    (lambda: Probe(X, ["a"] * 8), "`targets` contains a list, which is no tensor"),
    (lambda: Probe(X, batch_size="4"), "`batch_size` (='4') must be a whole number >= 1"),
    (lambda: Probe(X, batch_dim=None), "`batch_dim` (=None) must be a whole number >= 0"),
    (lambda: Activations("probe"), "`inputs` contains a str, which is no tensor"),
    (lambda: Activations(PROBE, store="gram"), "`store` (='gram') must be a store, such as"),
    (lambda: Activations(PROBE, memory="1G"), "`memory` (='1G') must be a whole number >= 1"),
    (lambda: Activations(PROBE, when=10), "`when` (=10) must be a schedule, such as sonde.every"),
    (lambda: sonde.Predictions(PROBE, when="every(10)"), "`when` (='every(10)') must be a sched"),  # type: ignore[arg-type]  # Wrong on purpose.
    (lambda: sonde.Scalars(when=3), "`when` (=3) must be a schedule"),  # type: ignore[arg-type]  # Wrong on purpose.
    (lambda: DecisionPlanes("x", Y), "`inputs` contains a str, which is no tensor"),
    (lambda: DecisionPlanes(X, None), "`targets` contains a NoneType, which is no tensor"),
    (lambda: DecisionPlanes(X, Y, when=3), "`when` (=3) must be a schedule"),
    (lambda: DecisionPlanes(X, Y, resolution="5"), "`resolution` (='5') must be a whole number"),
    (lambda: DecisionPlanes(X, Y, margin="a"), "`margin` (='a') must be a number >= 0"),
    (lambda: DecisionPlanes(X, Y, triplets="5"), "`triplets` (='5') must be a whole number >= 1"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_a_value_of_another_type_is_refused_in_words(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": 10}, "`when` (=10) must be a schedule"),
        ({"steps_per_epoch": "10"}, "`steps_per_epoch` (='10') must be a whole number >= 1"),
        ({"model": None}, "`model` is a NoneType; expected a torch.nn.Module"),
    ],
)
def test_a_recorder_refuses_a_value_of_another_type(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"model": nn.Linear(4, 2), "measures": [sonde.Activations(PROBE)]}
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        sonde.Recorder(tmp_path / "run", **given | arguments)
    assert not (tmp_path / "run").exists()


def test_whole_numbers_of_numpy_are_taken() -> None:
    every: Any = sonde.every
    assert every(np.int64(3)).is_due(3, None)
    schedule: Any = sonde.at(*np.array([0, 4]))
    assert [step for step in range(6) if schedule.is_due(step, None)] == [0, 4]
    assert sonde.Sketch(np.int64(8)).dim == 8  # type: ignore[arg-type]  # As users have it.
