"""Checks of gradients that are small or cancel, in band and on probes: right ones, and wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks.gradients.rules.functions import RULES, Rule
from sonde.hooks.gradients.sum_checks import SumChecks, Terms

N = 12


class Tiny(nn.Module):
    """A branch that is scaled by nearly nothing, as LayerScale scales it in a new model."""

    def __init__(self, scale: float = 1e-7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch = nn.Conv1d(8, 8, 1)
        self.scale = nn.Parameter(torch.full((8, 1), scale))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x + self.scale * self.branch(x)).mean(2))
        return logits


class Attention(nn.Module):
    """Attention, whose softmax does not see what is added to all keys alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.key_bias = nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(x, x + self.key_bias, x)[0]
        logits: Tensor = self.head((x + attended).mean(1))
        return logits


class Separate(nn.Module):
    """Attention with a layer of its own for the keys, so that its bias is a parameter by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        logits: Tensor = self.head((x + attended).mean(1))
        return logits


class Tied(nn.Module):
    """A weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embedding(tokens).tanh().mean(1), self.embedding.weight)


def convolution() -> nn.Module:
    """A convolution whose bias the batch's statistics take away again, so that examples cancel."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 28, 5)
    )


def sequences() -> Tensor:
    return torch.randn(N, 8, 30, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(0, 9, (N, 5), generator=torch.Generator().manual_seed(1))


def coverage(
    path: Path,
    model: nn.Module,
    inputs: Tensor,
    *,
    num_parts: int = 1,
    autocast: bool = False,
) -> dict[str, str]:
    """Train one step and return how each parameter is covered."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    measure = sonde.ExampleGradients(sonde.TRAINING)
    recorder = sonde.Recorder(path, model, [measure], when=sonde.at(0), on_error="raise")
    recorder.attach(optimizer)
    targets = torch.arange(N) % 5
    for rows in torch.arange(N).split(N // num_parts):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(inputs[rows])
        loss = F.cross_entropy(outputs.float(), targets[rows])
        recorder.batch(loss=loss, reduction="mean")
        (loss / num_parts).backward()
    optimizer.step()
    recorder.close()
    notes = [note for note in sonde.open_run(path).notes if note["event"] == "coverage"]
    found: dict[str, str] = notes[-1]["parameters"]
    return found


def spoil(patch: pytest.MonkeyPatch, factor: float, func: Callable[..., Any]) -> None:
    """Let the rule of a function give wrong gradients of the first of its parameters."""
    rule = RULES[func]

    def weights(layout: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return rule(layout, input * factor, *args, **kwargs)

    patch.setitem(RULES, func, Rule(weights))


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_wrong_gradient_is_found_however_small_it_is(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tiny()
    F.cross_entropy(model(sequences()), torch.arange(N) % 5).backward()
    norms = {
        name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None
    }
    assert norms["branch.weight"] < 1e-6 * max(norms.values())
    model.zero_grad()
    spoil(monkeypatch, factor, F.conv1d)
    with pytest.warns(sonde.SondeWarning, match="do not add up to the gradient"):
        found = coverage(tmp_path / "run", model, sequences())
    wrong = [name for name, verdict in found.items() if verdict != "exact"]
    assert wrong == ["branch.weight"]


def test_the_bias_of_keys_is_not_taken_for_wrong_as_its_gradient_cancels() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(N, 300, 8, generator=generator)
    delta -= delta.mean(1, keepdim=True)  # As a softmax makes it: nothing is left but rounding.
    bias = nn.Parameter(torch.zeros(8))
    rows = delta.flip(1).sum(1)
    terms = [Terms([delta], [torch.randn(N, 300, 8, generator=generator)])]
    checks = SumChecks()
    checks.add(bias, delta.sum((0, 1)), rows.sum(0), terms, [])
    assert not checks.failed()
    # Sums of other terms differ by more, although they are small beside the terms.
    checks.add(bias, delta.sum((0, 1)), rows.sum(0) + 1e-3 * delta.norm(), terms, [])
    assert list(checks.failed()) == [bias]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (Attention, lambda: sequences().transpose(1, 2)),
        (Separate, lambda: sequences().transpose(1, 2)),
        (convolution, sequences),
        (Tiny, sequences),
        (Tied, tokens),
    ],
)
def test_right_gradients_pass_also_where_they_cancel(
    make: Callable[[], nn.Module],
    data: Callable[[], Tensor],
    num_parts: int,
    autocast: bool,
    tmp_path: Path,
) -> None:
    found = coverage(tmp_path / "run", make(), data(), num_parts=num_parts, autocast=autocast)
    assert set(found.values()) == {"exact"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("make", "data", "func", "name"),
    [
        (Separate, lambda: sequences().transpose(1, 2), F.linear, "key.weight"),
        (convolution, sequences, F.conv1d, "0.weight"),
        (Tied, tokens, F.linear, "embedding.weight"),
    ],
)
def test_wrong_scales_are_found_whatever_the_precision(
    make: Callable[[], nn.Module],
    data: Callable[[], Tensor],
    func: Callable[..., Any],
    name: str,
    autocast: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, 1.25 if autocast else 1.01, func)
    with pytest.warns(sonde.SondeWarning, match="do not add up to the gradient"):
        found = coverage(tmp_path / "run", make(), data(), autocast=autocast)
    assert found[name] != "exact"


@pytest.mark.parametrize("make", [Attention, Separate])
def test_on_a_probe_a_gradient_that_cancels_is_exact(make: Callable[[], nn.Module]) -> None:
    inputs, targets = sequences().transpose(1, 2), torch.arange(N) % 5
    result = sonde.example_gradients(make(), F.cross_entropy, inputs, targets)
    assert set(result.coverage.values()) == {"exact"}


@pytest.mark.parametrize(
    ("make", "data", "func", "name"),
    [
        (Separate, lambda: sequences().transpose(1, 2), F.linear, "key.weight"),
        (Tiny, sequences, F.conv1d, "branch.weight"),
    ],
)
def test_on_a_probe_a_wrong_scale_is_found(
    make: Callable[[], nn.Module],
    data: Callable[[], Tensor],
    func: Callable[..., Any],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, 1.02, func)
    result = sonde.example_gradients(make(), F.cross_entropy, data(), torch.arange(N) % 5)
    assert result.coverage[name].startswith("fallback: the gradient of one example alone differs")
