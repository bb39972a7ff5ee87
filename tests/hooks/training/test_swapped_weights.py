"""Optimizers that keep two sets of weights: a record says which one a probe has seen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import sonde
from sonde.exceptions import SondeWarning

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 3
KINDS = [schedulefree.SGDScheduleFree, schedulefree.AdamWScheduleFree]


def train(kind: Any, path: Path | None, mode: str) -> tuple[nn.Module, list[Tensor]]:
    """Train for 5 steps; return the model and what it puts out in the mode that is recorded."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = kind(model.parameters(), lr=0.5)
    optimizer.train()
    recorder = None
    if path is not None:
        when = sonde.at(5) if mode == "training" else sonde.at(100)
        measures = [sonde.Predictions(INPUTS)]
        recorder = sonde.Recorder(path, model, measures, when=when).attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()
    outputs = [model(INPUTS).detach()]
    optimizer.eval()
    outputs.append(model(INPUTS).detach())
    if recorder is not None:
        if mode == "evaluation":
            recorder.measure()
        recorder.close()
    return model, outputs


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_sees_the_weights_of_training_and_says_so(kind: Any, tmp_path: Path) -> None:
    with pytest.warns(SondeWarning, match=r"probes see the weights of training, by the mode of"):
        model, (of_training, of_evaluation) = train(kind, tmp_path / "run", "training")
    bare, _ = train(kind, None, "training")
    assert all(map(torch.equal, model.parameters(), bare.parameters()))
    run = sonde.open_run(tmp_path / "run")
    log = run["predictions"]
    found = torch.tensor(log.array("logits", 5))
    torch.testing.assert_close(found, of_training)
    assert not torch.allclose(found, of_evaluation, atol=1e-4)
    assert log.attributes(5)["weights"] == f"of training, by the mode of {kind.__name__}"
    assert [note["step"] for note in run.notes if note["event"] == "weights"] == [5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_user_can_have_the_average_recorded(kind: Any, tmp_path: Path) -> None:
    _, (_, of_evaluation) = train(kind, tmp_path / "run", "evaluation")
    log = sonde.open_run(tmp_path / "run")["predictions"]
    torch.testing.assert_close(torch.tensor(log.array("logits", 5)), of_evaluation)
    assert log.attributes(5)["weights"] == f"of evaluation, by the mode of {kind.__name__}"


def test_a_moving_average_beside_the_model_is_another_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with sonde.Recorder(
        tmp_path / "run", model, [sonde.Predictions(INPUTS)], when=sonde.every(1)
    ) as recorder:
        recorder.attach(optimizer)
        F.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()
        averaged.update_parameters(model)
        expected = copy.deepcopy(model)(INPUTS).detach()
    log = sonde.open_run(tmp_path / "run")["predictions"]
    torch.testing.assert_close(torch.tensor(log.array("logits", 1)), expected)
    assert "weights" not in log.attributes(1)
