"""Gradients whose terms cancel or are far from 1, against a loop over the model in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sonde
from sonde.hooks.gradients.factors.dense import Factor
from sonde.hooks.gradients.factors.outer import Outer
from sonde.hooks.gradients.factors.rows import Rows
from sonde.hooks.gradients.factors.sums import summed

from .gradient_loop import SETTINGS, kinds, loop_gradients, rows_of

NUM_EXAMPLES, NUM_POSITIONS = 10, 6
OFFSETS = [0.0, 1.0, 30.0, 300.0, 3000.0]
# Gram matrices may be off by this much more than the formed gradients are.
ALLOWED = 2e-6


class Centered(nn.Module):
    """A layer whose outputs lose their mean over positions: their gradients add up to nothing."""

    def __init__(self, layer: nn.Module, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.axes = layer, axes

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        out: Tensor = (y - y.mean(self.axes, keepdim=True)).tanh().square().flatten(1)
        return out


class Twice(nn.Module):
    """A layer used twice, whose gradients through one use undo most of those of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        out: Tensor = (self.layer(first) - self.layer(second)).mean(1).tanh()
        return out


def embedding(offset: float) -> nn.Module:
    layer = nn.Embedding(7, 32)
    with torch.no_grad():
        layer.weight.add_(offset)
    return layer


def made(kind: str, offset: float) -> tuple[nn.Module, Tensor]:
    """A model in float32, and inputs whose mean is so many standard deviations from zero."""
    torch.manual_seed(0)
    n, t = NUM_EXAMPLES, NUM_POSITIONS
    if kind == "Linear":
        return Centered(nn.Linear(64, 64), (1,)), torch.randn(n, t, 64) + offset
    if kind == "Conv1d":
        return Centered(nn.Conv1d(16, 32, 3), (2,)), torch.randn(n, 16, t + 2) + offset
    if kind == "Conv1d in groups":
        return Centered(nn.Conv1d(32, 64, 3, groups=2), (2,)), torch.randn(n, 32, t + 2) + offset
    if kind == "Conv2d":
        return Centered(nn.Conv2d(8, 32, 3), (2, 3)), torch.randn(n, 8, 4, 4) + offset
    if kind == "ConvTranspose1d":
        return Centered(nn.ConvTranspose1d(32, 16, 3), (2,)), torch.randn(n, 32, t) + offset
    if kind == "LayerNorm":
        return Centered(nn.LayerNorm(32), (1,)), torch.randn(n, t, 32) + offset
    if kind == "Embedding":
        return Centered(embedding(offset), (1,)), torch.randint(7, (n, t))
    assert kind == "used twice"
    return Twice(), torch.randn(n, 2 * t, 24) + offset


KINDS = ["Linear", "Conv1d", "Conv1d in groups", "Conv2d", "ConvTranspose1d"]
KINDS += ["LayerNorm", "Embedding", "used twice"]


def scaled_loss(outputs: Tensor, scales: Tensor) -> Tensor:
    weights = torch.arange(1, outputs[0].numel() + 1, device=outputs.device) / outputs[0].numel()
    losses = (outputs.flatten(1) * weights).sum(1) * scales
    return losses.mean()


def far_off(gram: Tensor, rows: Tensor) -> float:
    """How far inner products are off those of rows, relative to the norms of the two."""
    norms = rows.norm(dim=1)
    return float(((gram.double() - rows @ rows.T) / (norms[:, None] * norms)).abs().max())


def truth(model: nn.Module, inputs: Tensor, scales: Tensor) -> Tensor:
    double = copy.deepcopy(model).double().eval()
    wide = inputs.double() if inputs.is_floating_point() else inputs
    return rows_of(loop_gradients(double, scaled_loss, wide, scales.double()))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_and_norms_are_as_exact_as_formed_gradients(
    kind: str, offset: float
) -> None:
    model, inputs = made(kind, offset)
    scales = torch.ones(NUM_EXAMPLES)
    rows = truth(model, inputs, scales)
    full = sonde.example_gradients(model, scaled_loss, inputs, scales, store=sonde.Full())
    gram = sonde.example_gradients(model, scaled_loss, inputs, scales)
    both = sonde.example_gradients(
        model, scaled_loss, inputs, scales, others=(inputs.clone(), scales)
    )
    sketch = sonde.example_gradients(model, scaled_loss, inputs, scales, store=sonde.Sketch(8))
    double = sonde.example_gradients(
        copy.deepcopy(model).double(),
        scaled_loss,
        inputs.double() if inputs.is_floating_point() else inputs,
        scales.double(),
        store=sonde.Sketch(8),
    )
    formed = rows_of(full.parameters).double()
    norms = rows.norm(dim=1)
    allowed = 3 * float(((formed - rows).norm(dim=1) / norms).max()) + ALLOWED
    assert kinds(gram) == kinds(full) == {}
    assert gram.total is not None
    assert far_off(gram.total, rows) < allowed
    assert both.total is not None
    assert far_off(both.total, rows) < allowed
    assert sketch.total is not None
    assert double.total is not None
    # A sketch of 8 sums may be longer than its vector.
    assert float(((sketch.total - double.total).norm(dim=1) / norms).max()) < 3 * allowed
    for result in (gram, both, sketch, full):
        assert float((result.norms / norms - 1).abs().max()) < allowed


@given(
    offset=st.floats(0, 1e4),
    num_positions=st.integers(1, 8),
    is_transposed=st.booleans(),
    exponent=st.integers(-25, 25),
    seed=st.integers(0, 1000),
)
@SETTINGS
def test_factors_multiply_as_their_formed_gradients_do(
    offset: float, num_positions: int, is_transposed: bool, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, o, i = 6, 40, 50
    delta = torch.randn(n, 1, num_positions, o, generator=generator)
    if num_positions > 1:
        delta -= delta.mean(2, keepdim=True)
    delta *= 10.0**exponent
    source = torch.randn(n, 1, num_positions, i, generator=generator) + offset
    factor = Outer(delta, source, i, lambda x: x, is_transposed)
    assert not factor.is_cheaper_formed
    rows = torch.einsum("ngto,ngti->noi", delta.double(), source.double()).flatten(1)
    assert far_off(factor.gram(), rows) < ALLOWED
    assert far_off(factor.cross(factor), rows) < ALLOWED


def test_uses_that_undo_each_other_lose_no_digits() -> None:
    torch.manual_seed(0)
    tokens, values = torch.randint(5, (4, 3)), 1e4 * torch.randn(4, 3, 8)
    opposite = -values + torch.randn(4, 3, 8)
    parts: list[Factor] = [Rows(tokens, values, 5), Rows(tokens, opposite, 5)]
    rows = sum((part.double().form(slice(0, 4)) for part in parts), torch.zeros(1))
    factor = summed(parts)
    assert far_off(factor.gram(), rows) < ALLOWED


MAGNITUDES = torch.tensor([1e-25, 1e-21, 1e-19, 1e-12, 0.0, 1.0, 1e12, 1e19, 1e21, 1e25])


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "LayerNorm", "Embedding", "used twice"])
@pytest.mark.parametrize("scales", [MAGNITUDES, MAGNITUDES.clamp(max=1e-18)], ids=["all", "small"])
def test_gradients_of_any_size_have_their_norms_and_cosines(kind: str, scales: Tensor) -> None:
    model, inputs = made(kind, 0.0)
    rows = truth(model, inputs, scales)
    norms = rows.norm(dim=1)
    is_zero = scales == 0
    gram = sonde.example_gradients(model, scaled_loss, inputs, scales).total
    assert gram is not None
    assert not gram[is_zero].any()
    others = sonde.example_gradients(
        model, scaled_loss, inputs, scales, others=(inputs.clone(), scales)
    ).total
    assert others is not None
    for products in (gram, others):
        assert far_off(products[~is_zero][:, ~is_zero], rows[~is_zero]) < ALLOWED
    for store in (sonde.Gram(), sonde.Sketch(8), sonde.Full()):
        result = sonde.example_gradients(model, scaled_loss, inputs, scales, store=store)
        assert torch.equal(result.norms == 0, is_zero)
        assert float((result.norms[~is_zero] / norms[~is_zero] - 1).abs().max()) < ALLOWED


def test_records_keep_inner_products_that_float32_does_not_hold(tmp_path: Path) -> None:
    model, inputs = made("Linear", 0.0)
    scales = torch.full((NUM_EXAMPLES,), 1e-22)
    scales[3] = 0
    rows = truth(model, inputs, scales)
    measure = sonde.ExampleGradients(sonde.Probe(inputs, scales), scaled_loss)

    recorder = sonde.Recorder(tmp_path, model, [measure])
    recorder.measure()
    recorder.close()

    log = sonde.open_run(tmp_path).example_gradients
    is_there = np.arange(NUM_EXAMPLES) != 3
    for gram in (log.gram(), log.gram(layer="layer")):
        kept = torch.from_numpy(gram[is_there][:, is_there])
        assert far_off(kept, rows[is_there]) < ALLOWED
    assert log.attributes()["num_zero_gradients"] == 1
