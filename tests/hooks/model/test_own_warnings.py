"""Warnings of the model in passes of ours are not heard; the script hears its own as often."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.hooks.model.own_warnings import without_warnings


class Warner(nn.Module):
    """A model that warns from one line of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("deprecated", UserWarning, stacklevel=1)
        out: Tensor = self.fc(x)
        return out


def heard(path: Path | None, action: str) -> list[str]:
    """Train three steps; return the warnings of the model that are shown."""
    globals().pop("__warningregistry__", None)
    torch.manual_seed(0)
    model, x = Warner(), torch.randn(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = None
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter(action)  # type: ignore[arg-type] # one of its words
        if path is not None:
            probe = sonde.Probe(x, [0, 1] * 3)
            recorder = sonde.attach(model, optimizer, path, probe=probe, when=sonde.every(1))
        for _ in range(3):
            nn.functional.cross_entropy(model(x), torch.tensor([0, 1] * 3)).backward()
            optimizer.step()
        if recorder is not None:
            recorder.close()
    return [str(item.message) for item in shown]


@pytest.mark.parametrize("action", ["default", "always", "once"])
def test_the_script_hears_what_it_hears_without(tmp_path: Path, action: str) -> None:
    assert heard(tmp_path / "run", action) == heard(None, action)


def test_a_warning_that_is_an_error_to_the_script_fails_no_measure(tmp_path: Path) -> None:
    model = Warner()
    probe = sonde.Probe(torch.randn(4, 3))
    recorder = sonde.Recorder(tmp_path / "run", model, [sonde.Activations(probe)])
    recorder.measure()  # pytest makes errors of all warnings.
    recorder.close()
    assert sonde.open_run(tmp_path / "run").steps() == [0]


def test_warnings_of_ours_are_heard_and_the_filters_are_left_as_they_were() -> None:
    before = list(warnings.filters)
    with without_warnings():
        warnings.warn("unheard", UserWarning, stacklevel=1)
        with pytest.raises(sonde.SondeWarning, match="sonde: heard"):  # pytest makes errors of all.
            warnings.warn("sonde: heard", sonde.SondeWarning, stacklevel=1)
    assert list(warnings.filters) == before
