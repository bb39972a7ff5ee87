"""Attaching under Accelerate: what is refused, and how it is said."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sonde
from sonde.exceptions import InvalidInputError

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def accelerator() -> Iterator[Any]:
    made = accelerate.Accelerator(cpu=True)
    yield made
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_only_an_accelerator_is_attached_to(model: nn.Module, tmp_path: Path) -> None:
    from sonde.integrations.accelerate import attach

    with pytest.raises(InvalidInputError, match="`accelerator` is a Linear; expected an accel"):
        attach(model, tmp_path / "run", model, sgd(model))


def test_options_beside_a_recorder_are_refused(
    accelerator: Any, model: nn.Module, tmp_path: Path
) -> None:
    from sonde.integrations.accelerate import attach

    with sonde.Recorder(tmp_path / "run", model, [sonde.Scalars()]) as recorder:
        with pytest.raises(InvalidInputError, match="`planes`, `probe` beside a recorder, which"):
            attach(accelerator, recorder, model, sgd(model), probe=torch.ones(2, 3), planes=1)


def test_nothing_is_left_behind_by_a_closed_recorder(
    accelerator: Any, model: nn.Module, tmp_path: Path
) -> None:
    from sonde.integrations.accelerate import attach

    before = dict(vars(accelerator))
    optimizer = sgd(model)
    recorder = attach(accelerator, tmp_path / "run", model, optimizer, id_key="id")
    assert "backward" in vars(accelerator)
    recorder.close()
    assert vars(accelerator) == before
    assert not accelerator._save_model_state_pre_hook
    assert not accelerator._load_model_state_pre_hook
    assert not optimizer._optimizer_step_post_hooks
    assert not model._forward_pre_hooks


def test_a_probe_is_in_float32_under_bf16(accelerator: Any, tmp_path: Path) -> None:
    from sonde.integrations.accelerate import attach

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    half = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(0)
    raw = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    plain, x = copy.deepcopy(raw), torch.randn(6, 3)
    model, optimizer = half.prepare(raw, sgd(raw))
    measures = [sonde.Activations(sonde.Probe(x), store=sonde.Full())]
    recorder = attach(half, tmp_path / "run", model, optimizer, measures=measures)
    forward = model.forward
    recorder.measure()
    recorder.close()
    assert model.forward is forward
    log = sonde.open_run(tmp_path / "run")["activations"]
    with torch.no_grad():
        np.testing.assert_array_equal(log.features("0", 0), plain[0](x))
        np.testing.assert_array_equal(log.features("2", 0), plain(x))
    assert log.attributes(0)["precision"] == ["float32"]


def test_a_damaged_state_does_not_end_the_training(
    accelerator: Any, model: nn.Module, tmp_path: Path
) -> None:
    from sonde.integrations.accelerate import attach

    model, optimizer = accelerator.prepare(model, sgd(model))
    recorder = attach(accelerator, tmp_path / "run", model, optimizer)
    accelerator.save_state(str(tmp_path / "saved"))
    (tmp_path / "saved" / "sonde-rank0.json").write_text("{")
    with pytest.warns(sonde.SondeWarning, match=r"does not go on from .*: JSONDecodeError"):
        accelerator.load_state(str(tmp_path / "saved"))
    recorder.close()
