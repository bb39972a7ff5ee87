"""Copies to the host: what was there when they were started is what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sonde
from sonde.hooks.stores.host_copies import empty_on_host, on_host, start_copy, wait_for_copies
from tests.hooks.devices import DEVICES, needs_gpu


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_copy_holds_what_was_there_when_it_was_started(device: str, dtype: torch.dtype) -> None:
    values = torch.randn(300, 1000, device=device)
    expected = values.to("cpu", dtype, copy=True)
    copy = empty_on_host(values.shape, dtype, values.device)
    start_copy(copy, values)
    values.zero_()
    wait_for_copies()
    assert torch.equal(copy, expected)


@needs_gpu
def test_a_copy_is_started_while_the_device_still_works() -> None:
    values = torch.randn(1000, 1000, device="cuda")
    copy = empty_on_host(values.shape, values.dtype, values.device)
    start_copy(copy, values)
    wait_for_copies()
    expected = copy.clone()
    # Cycles: a second, or as long as a busy machine needs to come to the copy meanwhile.
    assert any(is_started_meanwhile(copy, values, 10**9 * 2**turn) for turn in range(1, 7))
    assert torch.equal(copy, expected)


def is_started_meanwhile(copy: torch.Tensor, values: torch.Tensor, cycles: int) -> bool:
    """Start a copy behind much work; tell whether that was not done yet, nor the copy."""
    copy.zero_()
    torch.cuda._sleep(cycles)
    start_copy(copy, values)
    is_meanwhile = not torch.cuda.current_stream().query() and not copy.any()
    wait_for_copies()
    return is_meanwhile


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_of_a_tensor_arrives_whole(device: str) -> None:
    values = torch.randn(30, 40, device=device)
    host = on_host(values[:, ::3])
    wait_for_copies()
    assert torch.equal(host, values.cpu()[:, ::3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("store", [sonde.Gram(), sonde.Full(torch.float16)])
def test_a_record_holds_the_outputs_before_the_next_operation_in_place(
    device: str, store: Any, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)).to(device)
    inputs = torch.randn(10, 6)
    probe = sonde.Probe(inputs, batch_size=4)
    with sonde.Recorder(
        tmp_path / "run", model, [sonde.Activations(probe, store=store)], on_error="raise"
    ) as recorder:
        recorder.measure()
    log = sonde.open_run(tmp_path / "run").activations["0"]
    outputs = model[0](inputs.to(device)).detach().cpu()
    recorded = torch.as_tensor(log.gram(step=0)).float()
    # Of products, and of features of half precision.
    tolerance = 1e-2 if isinstance(store, sonde.Full) else 1e-5
    torch.testing.assert_close(recorded, outputs @ outputs.T, rtol=tolerance, atol=tolerance)
