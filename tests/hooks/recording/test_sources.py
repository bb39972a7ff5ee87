"""The names of sources: no two are alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: [sonde.Predictions(p), sonde.Predictions(p)], "Predictions is given twice"),
        (
            lambda p: [
                sonde.Predictions(sonde.Probe(torch.ones(2), name="a")),
                sonde.Activations(sonde.Probe(torch.ones(3), name="a")),
            ],
            "two different sources are called 'a'",
        ),
        (lambda p: ["activations"], "must be a list of measures"),
        (lambda p: sonde.Activations(p), "must be a list of measures"),
    ],
)
def test_measures_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, images: Tensor, make: Callable[[sonde.Probe], Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        sonde.Recorder(tmp_path / "run", nn.Flatten(), make(sonde.Probe(images)))


def test_unnamed_probes_get_names(tmp_path: Path, images: Tensor) -> None:
    measures = [sonde.Predictions(sonde.Probe(images)), sonde.Predictions(sonde.Probe(images))]
    recorder = sonde.Recorder(tmp_path / "run", nn.Flatten(), measures)
    recorder.measure()
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run.sources("predictions") == ["probe", "probe1"]
