"""What is kept of activations, and CKA of it: right to a stated tolerance, or named."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.analysis import cka
from sonde.log import LogWriter

from .cases import named

NUM_EXAMPLES, NUM_UNITS = 12, 24
# Features that lie 3,000 standard deviations from zero have 2e-4 of one in their own rounding, in
# another order of sums in another batch.
TOLERANCE = 2e-3
SHIFTS = {"none": 0.0, "of 30 standard deviations": 30.0, "of 3,000": 3000.0}
MASSIVE = 15_000.0  # One activation of a language model, of all examples.
STORES = {
    "Gram": sonde.Gram(),
    "Gram in float64": sonde.Gram(torch.float64),
    "Full": sonde.Full(),
    "Gram in blocks": sonde.Gram(block=6),
}

NUM_SKETCHES = 24

Array = npt.NDArray[np.float64]


class Shifted(nn.Module):
    """Two layers that are alike, whose features have a large part in common, and another one."""

    def __init__(self, shift: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, NUM_UNITS), nn.Linear(6, NUM_UNITS)
        self.third = nn.Linear(NUM_UNITS, 5)
        turned = torch.linalg.qr(torch.randn(NUM_UNITS, NUM_UNITS)).Q
        with torch.no_grad():
            self.second.weight.copy_(turned @ self.first.weight)  # Alike up to a rotation.
            for layer in (self.first, self.second):
                if shift == "massive":
                    layer.bias[3] = MASSIVE
                else:
                    layer.bias.add_(SHIFTS[shift])

    def forward(self, x: Tensor) -> Tensor:
        centred: Tensor = self.third((self.first(x) - self.first.bias).tanh())
        return torch.add(centred, self.second(x).sum(-1, keepdim=True), alpha=0)


@pytest.fixture(autouse=True)
def nothing_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that seals takes longer to start than a case; readers take both forms."""
    monkeypatch.setattr("sonde.hooks.recording.recorder.LogWriter", partial(LogWriter, seal=False))


def examples() -> Tensor:
    return torch.randn(NUM_EXAMPLES, 6, generator=torch.Generator().manual_seed(1))


def record(
    path: Path, model: nn.Module, source: str, batch_size: int | None, **stores: Any
) -> sonde.Run:
    """Record activations of a probe, or of one step of a training."""
    probe = sonde.Probe(examples(), batch_size=batch_size or NUM_EXAMPLES)
    subject: Any = probe if source == "probe" else sonde.TRAINING
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    measures = [sonde.Activations(subject, store=store) for store in stores.values()]
    with sonde.Recorder(path, model, measures, when=sonde.at(0)).attach(optimizer) as recorder:
        for rows in torch.arange(NUM_EXAMPLES).split(batch_size or NUM_EXAMPLES):
            loss = model(examples()[rows]).square().mean()
            recorder.batch(ids=rows, loss=loss)
            loss.backward()
        optimizer.step()
    return sonde.open_run(path)


def features_of(model: nn.Module) -> dict[str, Array]:
    """The features of each layer, as the model computes them in float32, in float64."""
    found: dict[str, Array] = {}

    def keep(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        found[name] = output.detach().double().numpy()

    handles = [m.register_forward_hook(partial(keep, n)) for n, m in model.named_children()]
    with torch.no_grad():
        model(examples())
    for handle in handles:
        handle.remove()
    return found


def hsic(left: Array, right: Array) -> float:
    """HSIC₁ of Song et al. (2012), written out, of features that are centred."""
    n = len(left)
    k, l = left @ left.T, right @ right.T  # noqa: E741 # the names of the paper
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    last = one @ k @ one * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return float((np.trace(k @ l) + last) / (n * (n - 3)))


def true_cka(left: Array, right: Array, block: int | None = None) -> float:
    """Debiased CKA of features; of blocks the ratio of the means over blocks."""
    starts = range(0, len(left), block or len(left))

    def mean(a: Array, b: Array) -> float:
        parts = [slice(start, start + (block or len(left))) for start in starts]
        return sum(hsic(a[p] - a[p].mean(0), b[p] - b[p].mean(0)) for p in parts)

    return mean(left, right) / math.sqrt(mean(left, left) * mean(right, right))


def largest_error(actual: Any, features: dict[str, Array], block: int | None = None) -> float:
    """How far the entries of a CKA matrix are off."""
    pairs = itertools.product(features, features)
    return max(
        abs(
            float(actual.sel(layer=one, other_layer=other))
            - true_cka(features[one], features[other], block)
        )
        for one, other in pairs
    )


CASES = [
    case
    for case in itertools.product((*SHIFTS, "massive"), STORES, ("probe", "training"), (None, 6))
    if case[1] != "Full" or case[3] is None
]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_cka_of_what_a_store_keeps(case: tuple[str, str, str, int | None], tmp_path: Path) -> None:
    shift, store, source, batch_size = case
    model = Shifted(shift)
    features = features_of(model)
    run = record(tmp_path / "run", model, source, batch_size, store=STORES[store])
    similarity = cka(run, source=source)
    block = 6 if "blocks" in store else None
    assert similarity.estimator == "unbiased"
    assert largest_error(similarity, features, block) < TOLERANCE
    if not block:
        for name, of_layer in features.items():
            centred = of_layer - of_layer.mean(0)
            gram = run["activations", source].gram(0, name, relative=True)
            gram = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
            error = np.abs(gram - centred @ centred.T).max()
            assert error < TOLERANCE * (centred**2).sum(1).max(), name


def test_the_check_of_cka_complains_of_what_is_wrong(tmp_path: Path) -> None:
    model = Shifted("none")
    features = features_of(model)
    run = record(tmp_path / "run", model, "probe", None, store=sonde.Gram())
    similarity = cka(run)
    assert largest_error(similarity, features) < TOLERANCE
    similarity[0, 1] += 0.01
    assert largest_error(similarity, features) > TOLERANCE
    features["third"][0] += 1.0
    assert largest_error(cka(run), features) > TOLERANCE


@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("shift", ["none", "of 3,000"])
def test_cka_of_a_sketch_is_as_near_as_it_says(shift: str, dim: int, tmp_path: Path) -> None:
    model = Shifted(shift)
    features = features_of(model)
    values = []
    for seed in range(NUM_SKETCHES):
        store = sonde.Sketch(dim, seed)
        values.append(cka(record(tmp_path / f"run{seed}", model, "probe", None, store=store)))
    assert "sketch" in values[0].attrs["estimator"]
    assert values[0].attrs["estimator"] != "unbiased"
    for one, other in itertools.product(features, features):
        truth = true_cka(features[one], features[other])
        pairs = [value.sel(layer=one, other_layer=other) for value in values]
        misses = [abs(float(p) - truth) > 2 * float(p.standard_error) + TOLERANCE for p in pairs]
        assert np.mean(misses) <= 0.15, (one, other)
