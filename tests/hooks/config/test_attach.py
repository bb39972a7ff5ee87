"""The one-line form: what it records, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError
from tests.hooks.conftest import train


def test_attach_records_what_the_probe_allows(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    found = {}
    for name, probe in {"all": sonde.Probe(images, classes), "inputs": sonde.Probe(images)}.items():
        planes = 2 if probe.targets is not None else 0
        recorder = sonde.attach(
            conv_net, optimizer, tmp_path / name, probe=probe, planes=planes, resolution=4
        )
        train(conv_net, optimizer, images, classes, num_steps=1)
        recorder.close()
        found[name] = sorted(sonde.open_run(tmp_path / name).measures)
    assert found["all"] == [
        "activations",
        "decision_planes",
        "example_gradients",
        "predictions",
        "scalars",
    ]
    assert found["inputs"] == ["activations", "predictions", "scalars"]


def test_attach_refuses_planes_the_probe_does_not_allow(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match="`planes` needs a probe of one input tensor with"):
        sonde.attach(conv_net, optimizer, tmp_path / "run", probe=images, planes=2)


def test_an_idle_model_carries_no_hooks(
    tmp_path: Path, conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    recorder = sonde.attach(
        conv_net, optimizer, tmp_path / "run", probe=sonde.Probe(images, classes), planes=2
    )
    train(conv_net, optimizer, images, classes, num_steps=2)
    assert [m for m in conv_net.modules() if m._forward_hooks or m._forward_pre_hooks] == []
    recorder.close()
