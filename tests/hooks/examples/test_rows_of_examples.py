"""Rows of examples in band: each example has its own gradients, or a reason why it has none.

The sum over examples is right whichever rows are taken for an example's, so it shows nothing here.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sonde

N, STEPS, WIDTH, CLASSES = 6, 4, 5, 3

Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, inputs, targets) to the loss of each example."""


def losses_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), targets, reduction="none")


def record(path: Path, model: nn.Module, inputs: Tensor, targets: Tensor, **ids: Any) -> sonde.Run:
    """Train one step, and record the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    measure = sonde.ExampleGradients(sonde.TRAINING, store=sonde.Full())
    recorder = sonde.Recorder(path, model, [measure], when=sonde.at(0), on_error="raise")
    recorder.attach(optimizer)
    loss = losses_of(model, inputs, targets).mean()
    recorder.batch(loss=loss, **ids)
    loss.backward()
    optimizer.step()
    recorder.close()
    return sonde.open_run(path)


def coverage_of(run: sonde.Run) -> dict[str, str]:
    notes = [note for note in run.notes if note["event"] == "coverage"]
    verdicts: dict[str, str] = notes[-1]["parameters"]
    return verdicts


def assert_own_rows(run: sonde.Run, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """What is called exact is the gradient of each example's own loss in the same batch."""
    named = dict(model.named_parameters())
    losses = losses_of(model, inputs, targets)
    rows = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for loss in losses]
    for at, (name, verdict) in enumerate(coverage_of(run).items()):
        if verdict == "exact":
            expected = torch.stack([row[at].flatten() for row in rows]).numpy()
            found = np.asarray(run.example_gradients.features(name, 0))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=name)


class Tokens(nn.Module):
    """A layer that sees the tokens of all examples as rows: one example's behind another's, or
    all first ones, then all second ones."""

    def __init__(self, num_outputs: int, *, is_time_major: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, num_outputs)
        self.out = nn.Linear(num_outputs, CLASSES)
        self.is_time_major = is_time_major

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.is_time_major else x
        mixed = self.mix(x.reshape(-1, x.shape[2])).tanh().unflatten(0, x.shape[:2])
        weights = torch.arange(mixed.shape[int(not self.is_time_major)]) + 1.0
        mixed = mixed.transpose(0, 1) if self.is_time_major else mixed
        return torch.as_tensor(self.out((mixed * weights[:, None]).mean(1)))


@settings(max_examples=30)
@given(
    st.integers(2, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_rows_of_tokens_are_those_of_their_example(
    tmp_path_factory: pytest.TempPathFactory,
    num_examples: int,
    num_steps: int,
    num_outputs: int,
    is_time_major: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = Tokens(num_outputs, is_time_major=is_time_major)
    inputs = torch.randn(num_examples, num_steps, WIDTH)
    targets = torch.arange(num_examples) % CLASSES
    run = record(tmp_path_factory.mktemp("rows") / "run", model, inputs, targets)
    assert set(coverage_of(run).values()) == {"exact"}
    assert_own_rows(run, model, inputs, targets)


class Routed(nn.Module):
    """Experts that take the tokens with the largest weights for them, of whichever example."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights = self.router(tokens).softmax(-1)
        mixed = torch.zeros_like(tokens)
        for at, expert in enumerate(self.experts):
            weight, taken = weights[:, at].topk(len(tokens) // 2)
            mixed = mixed.index_add(0, taken, expert(tokens[taken]).tanh() * weight[:, None])
        return torch.as_tensor(self.out(mixed.view(x.shape).mean(1)))


class Masked(nn.Module):
    """A layer that sees only some tokens of each example."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        is_there = torch.arange(STEPS) <= torch.tensor([1, 0, 2, 0, 3, 0])[: len(x), None]
        mixed = x.new_zeros(*x.shape[:2], 4)
        mixed[is_there] = self.mix(x[is_there]).tanh()
        return torch.as_tensor(self.out(mixed.sum(1)))


class Shuffled(nn.Module):
    """A layer that sees the examples in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x)).flip(0)
        mixed = self.mix(x.mean(1)[order]).tanh()
        return torch.as_tensor(self.out(mixed[order]))


class Ragged(nn.Module):
    """A layer that sees as many tokens of an example as its first feature says."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        is_there = torch.arange(STEPS) < x[:, :1, 0].detach()
        mixed = x.new_zeros(*x.shape[:2], 4)
        mixed[is_there] = self.mix(x[is_there]).tanh()
        return torch.as_tensor(self.out(mixed.sum(1)))


class SortedInside(nn.Module):
    """A model that sorts its examples by their first feature, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0, 0].detach().sort(descending=True, stable=True).indices
        mixed = self.mix(x[order].mean(1)).tanh()
        return torch.as_tensor(self.out(mixed[order.argsort()]))


class ShuffledInTraining(nn.Module):
    """A layer that sees the examples in a random order, but not in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        if not self.training:
            return torch.as_tensor(self.out(self.mix(x).tanh()))
        order = torch.randperm(len(x))
        return torch.as_tensor(self.out(self.mix(x[order]).tanh()[order.argsort()]))


@pytest.mark.parametrize("make", [Ragged, SortedInside])
@pytest.mark.parametrize("counts", [[2, 2, 2, 1, 3, 2], [1, 1, 1, 2, 0, 1], [2, 2, 2, 2, 1, 3]])
def test_a_few_examples_do_not_speak_for_all_where_values_tell_the_order(
    make: Callable[[], nn.Module], counts: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(N, STEPS, WIDTH), torch.arange(N) % CLASSES
    inputs[:, 0, 0] = torch.tensor(counts)
    model = make()
    with pytest.warns(sonde.SondeWarning, match="it is not known which rows"):
        run = record(tmp_path / "run", model, inputs, targets)
    assert coverage_of(run)["mix.weight"] != "exact"
    if run.measures:
        assert_own_rows(run, model, inputs, targets)


def test_an_even_batch_says_nothing_of_the_next_where_values_tell_the_order(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model, inputs, targets = Ragged(), torch.randn(N, STEPS, WIDTH), torch.arange(N) % CLASSES
    inputs[:, 0, 0] = 2
    run = record(tmp_path / "even", model, inputs, targets)
    assert set(coverage_of(run).values()) == {"exact"}
    assert_own_rows(run, model, inputs, targets)
    inputs[:, 0, 0] = torch.tensor([1, 3, 2, 4, 1, 1])
    with pytest.warns(sonde.SondeWarning, match="it is not known which rows"):
        run = record(tmp_path / "uneven", model, inputs, targets)
    assert coverage_of(run)["mix.weight"] != "exact"


def test_an_order_of_training_mode_alone_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(N, STEPS, WIDTH), torch.arange(N) % CLASSES
    with pytest.warns(sonde.SondeWarning, match="in another order than in eval mode"):
        run = record(tmp_path / "run", ShuffledInTraining(), inputs, targets)
    assert run.measures == []


class Trimmed(nn.Module):
    """A model that cuts padding off, so that one example tells the length of all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.embed, self.out = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        longest = int((tokens > 0).sum(1).max())
        is_padding = tokens[:, :longest] == 0
        hidden = self.layer(self.embed(tokens[:, :longest]), src_key_padding_mask=is_padding)
        return torch.as_tensor(self.out(hidden[:, 0]))


def test_examples_of_other_lengths_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([7, 2, 3, 1, 4, 2])
    tokens = torch.randint(1, 9, (N, 9)) * (torch.arange(9) < lengths[:, None])
    model, targets = Trimmed(), torch.arange(N) % CLASSES
    run = record(tmp_path / "run", model, tokens, targets)
    assert set(coverage_of(run).values()) == {"exact"}
    assert_own_rows(run, model, tokens, targets)


def test_nothing_of_a_batch_or_a_model_is_kept(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(4, track_running_stats=False)  # It couples the examples, so none is seen.
    model = nn.Sequential(nn.Linear(WIDTH, 4), norm, nn.Linear(4, CLASSES))
    inputs, targets = torch.randn(N, WIDTH), torch.arange(N) % CLASSES
    alive: list[weakref.ref[Any]] = [weakref.ref(model), weakref.ref(inputs)]
    for name in ("first", "again"):
        record(tmp_path / name, model, inputs, targets)
    del model, norm, inputs
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (Routed, {"experts.0.weight", "experts.0.bias", "experts.1.weight", "experts.1.bias"}),
        (Masked, {"mix.weight", "mix.bias"}),
        (Shuffled, {"mix.weight", "mix.bias"}),
    ],
)
def test_rows_that_are_not_known_to_be_whose_are_refused(
    make: Callable[[], nn.Module], refused: set[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, inputs, targets = make(), torch.randn(N, STEPS, WIDTH), torch.arange(N) % CLASSES
    with pytest.warns(sonde.SondeWarning, match="it is not known which rows"):
        run = record(tmp_path / "run", model, inputs, targets)
    coverage = coverage_of(run)
    assert refused <= {name for name, verdict in coverage.items() if verdict != "exact"}
    assert "exact" in coverage.values()
    assert_own_rows(run, model, inputs, targets)


def test_examples_that_are_alike_show_nothing_but_the_next_batch_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tokens(2, is_time_major=False)
    inputs, targets = torch.randn(N, STEPS, WIDTH), torch.arange(N) % CLASSES
    alike = inputs[:1].expand(N, -1, -1).clone()
    with pytest.warns(sonde.SondeWarning, match="its examples are alike"):
        run = record(tmp_path / "alike", model, alike, targets)
    assert coverage_of(run)["out.weight"] == "exact"
    assert coverage_of(run)["mix.weight"] != "exact"
    run = record(tmp_path / "next", model, inputs, targets)
    assert set(coverage_of(run).values()) == {"exact"}
    assert_own_rows(run, model, inputs, targets)


def test_a_layer_may_see_examples_in_two_ways(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.mix(x.reshape(-1, WIDTH)).tanh().view(x.shape)
            return torch.as_tensor(self.out(self.mix(rows).mean(1)))

    torch.manual_seed(0)
    model, inputs, targets = Twice(), torch.randn(N, STEPS, WIDTH), torch.arange(N) % CLASSES
    run = record(tmp_path / "run", model, inputs, targets)
    assert set(coverage_of(run).values()) == {"exact"}
    assert_own_rows(run, model, inputs, targets)


def test_two_views_of_each_example_take_an_id_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES)
    views, targets = torch.randn(2 * N, WIDTH), torch.arange(2 * N) % CLASSES
    with pytest.warns(sonde.SondeWarning, match="6 examples were named of a pass over 12"):
        run = record(tmp_path / "fewer", model, views, targets, ids=torch.arange(N))
    assert run.measures == []
    run = record(tmp_path / "each", model, views, targets, ids=torch.arange(2 * N))
    assert_own_rows(run, model, views, targets)


def test_views_of_examples_named_ahead_are_not_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES)
    measure = sonde.ExampleGradients(sonde.TRAINING)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = sonde.Recorder(tmp_path / "run", model, [measure], when=sonde.at(0))
    recorder.attach(optimizer)
    with recorder.batch(ids=torch.arange(N)):
        model(torch.randn(2 * N, WIDTH)).square().sum().backward()
    with pytest.warns(sonde.SondeWarning, match="not known which of several rows"):
        optimizer.step()
    recorder.close()
    reasons = {
        note["reason"] for note in sonde.open_run(tmp_path / "run").notes if "reason" in note
    }
    assert any("nothing it is called with has the 6 examples" in reason for reason in reasons)


def test_complex_parameters_are_named(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(WIDTH, 4, dtype=torch.complex64)
            self.out = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.out(self.mix(x.to(torch.complex64)).abs()))

    torch.manual_seed(0)
    model, inputs, targets = Complex(), torch.randn(N, WIDTH), torch.arange(N) % CLASSES
    result = sonde.example_gradients(model, F.cross_entropy, inputs, targets)
    with pytest.warns(sonde.SondeWarning, match="mix.weight"):
        run = record(tmp_path / "run", model, inputs, targets)
    for coverage in (result.coverage, coverage_of(run)):
        assert coverage["mix.weight"].startswith("unsupported: it is complex")
        assert coverage["out.weight"] == "exact"
    assert_own_rows(run, model, inputs, targets)
