"""Measures that fail: the warning names whose hook raised, and says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import opacus
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sonde
from sonde.hooks.measures.base import Measure

ADVICE = "remove this one, or disable it while sonde measures"


def fail_in_eval(module: nn.Module, *_: Any) -> None:
    if not module.training:
        raise LookupError("no activations were kept")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def measured(path: Path, model: nn.Module, measure: Measure) -> str:
    """Return why a measure was switched off, as the log has it."""
    with sonde.Recorder(path, model, [measure], when=sonde.every(1)) as recorder:
        recorder.measure()
    (note,) = [note for note in sonde.open_run(path).notes if note["event"] == "disabled"]
    return str(note["reason"])


def probe() -> sonde.Probe:
    return sonde.Probe(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_hook_that_raises_is_named_with_what_to_do(tmp_path: Path, place: str) -> None:
    model = net()
    if place == "before":
        model[2].register_forward_pre_hook(fail_in_eval)
    else:
        model[2].register_forward_hook(fail_in_eval)
    expected = (
        "activations of 'probe' could not be recorded at step 0, so sonde switches it off; the "
        "training goes on. Reason: LookupError: no activations were kept, raised by fail_in_eval, "
        f"a hook that {__name__.partition('.')[0]} put on the model"
    )
    with pytest.warns(sonde.SondeWarning, match=re.escape(expected)):
        reason = measured(tmp_path / "run", model, sonde.Activations(probe()))
    assert reason.endswith(ADVICE)


def test_hooks_of_opacus_are_named_where_they_find_no_activations(tmp_path: Path) -> None:
    model = opacus.GradSampleModule(net())
    measure = sonde.ExampleGradients(probe(), F.cross_entropy)
    with pytest.warns(sonde.SondeWarning, match="a hook that opacus put on the model"):
        reason = measured(tmp_path / "run", model, measure)
    assert "raised by capture_backprops_hook, a hook that opacus" in reason
    assert reason.endswith(ADVICE)


def test_a_forward_pass_that_raises_is_not_called_a_hook(tmp_path: Path) -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            fail_in_eval(self)
            return x

    with pytest.warns(sonde.SondeWarning, match="so sonde switches it off"):
        reason = measured(tmp_path / "run", nn.Sequential(Strict()), sonde.Activations(probe()))
    assert reason == "LookupError: no activations were kept"
