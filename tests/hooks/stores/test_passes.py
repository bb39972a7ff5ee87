"""Passes over a probe: every pair of batches once, within a budget of memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks.stores.passes import plan_passes


@settings(max_examples=1000)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50), min_size=1),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 400),
    st.integers(0, 100),
)
def test_each_batch_of_each_layer_is_held_once_and_within_the_budget(
    held_bytes: dict[str, int], sizes: list[int], memory: int, kept: int
) -> None:
    passes = plan_passes(held_bytes, sizes, memory, dict.fromkeys(held_bytes, kept))
    held = [(layer, batch) for p in passes for layer, batches in p.items() for batch in batches]
    assert sorted(held) == sorted((layer, b) for layer in held_bytes for b in range(len(sizes)))
    needed = [
        [held_bytes[layer] * sizes[b] for layer in p for b in p[layer] if b < len(sizes) - 1]
        for p in passes
    ]
    # What is kept of the layers that have been begun is there besides.
    begun = [len({layer for p in passes[: at + 1] for layer in p}) for at in range(len(passes))]
    free = [max(memory - kept * num_layers, memory // 4) for num_layers in begun]
    for amounts, allowed in zip(needed, free, strict=True):
        assert sum(amounts) <= allowed or len([amount for amount in amounts if amount]) == 1
    # Two neighbouring passes would not have fitted into one.
    for at, (one, other) in enumerate(pairwise(passes)):
        first, batches = next(iter(other.items()))
        would_begin = begun[at] + (first not in one)
        allowed = max(memory - kept * would_begin, memory // 4)
        assert sum(needed[at]) + held_bytes[first] * sizes[batches.start] > allowed


def test_a_probe_of_one_batch_takes_one_pass() -> None:
    assert plan_passes({"a": 1 << 40, "b": 1 << 40}, [256], 1) == [{"a": range(1), "b": range(1)}]


@pytest.mark.parametrize(("memory", "most_seen"), [(1 << 30, 50), (100_000, 150), (1, 3 * 5 * 50)])
def test_grams_are_the_same_however_little_memory_there_is(
    tmp_path: Path, memory: int, most_seen: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 7)
    )
    sizes: list[int] = []
    model.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    images = torch.randn(50, 1, 8, 8)
    probe = sonde.Probe(images, batch_size=11)
    recorder = sonde.Recorder(tmp_path / "run", model, [sonde.Activations(probe, memory=memory)])
    recorder.measure()
    recorder.close()
    # Two more are run to find the axis of the batch.
    assert 50 <= sum(sizes) - 2 <= most_seen
    outputs, x = {}, images.double()
    model.double()
    for name, layer in model.named_children():
        x = layer(x)
        outputs[name] = x.flatten(1)
    run = sonde.open_run(tmp_path / "run")
    for name in ("1", "2", "3"):
        gram = torch.tensor(run.activations[name].gram())
        exact = outputs[name] @ outputs[name].T
        torch.testing.assert_close(gram, exact.detach(), rtol=1e-5, atol=1e-4)


def test_a_budget_below_one_byte_is_refused(images: Tensor) -> None:
    with pytest.raises(
        InvalidInputError, match=r"`memory` \(=0\) must be a whole number >= 1, in bytes"
    ):
        sonde.Activations(sonde.Probe(images), memory=0)


class Noisy(nn.Module):
    """It draws random numbers, in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(6, 6), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        return torch.as_tensor(self.last(hidden + torch.randn_like(hidden)))


def test_a_model_that_draws_random_numbers_draws_the_same_in_each_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, probe = Noisy(), sonde.Probe(torch.randn(20, 6), batch_size=5)
    grams = []
    for memory in (1 << 30, 400):
        measures = [sonde.Activations(probe, ["last"], memory=memory)]
        with sonde.Recorder(tmp_path / str(memory), model, measures) as recorder:
            recorder.measure()
        grams.append(
            torch.tensor(sonde.open_run(tmp_path / str(memory)).activations["last"].gram())
        )
    torch.testing.assert_close(grams[0], grams[1], rtol=1e-5, atol=1e-5)
    assert torch.linalg.eigvalsh(grams[1]).min() > -1e-4
