"""Probes of models that take [time, examples, …] against the same ones, examples first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks import Probe

TIME, EXAMPLES, FEATURES, CLASSES = 5, 7, 4, 3


class Square(torch.autograd.Function):
    """An operation that only `torch.func` can go through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return delta * weight**2, (delta * x * 2 * weight).flatten(0, -2).sum(0)


class Tagger(nn.Module):
    """A recurrent network; of every step, or of the last one, it gives scores."""

    def __init__(self, *, is_time_first: bool, of_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(FEATURES, 6, batch_first=not is_time_first)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.rand(6))
        self.head = nn.Linear(6, CLASSES)
        self.time, self.of_last = int(not is_time_first), of_last

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        hidden = self.norm(self.lstm(x)[0])
        hidden = Square.apply(hidden, self.scale)
        if offset is not None:
            hidden = hidden + offset.unsqueeze(self.time)[..., None]
        hidden = hidden.select(self.time, -1) if self.of_last else hidden
        return torch.as_tensor(self.head(hidden))


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="sum")


def recorded(path: Path, model: nn.Module, probe: Probe, loss: Any) -> sonde.log.run.Run:
    measures = [
        sonde.Activations(probe),
        sonde.Predictions(probe),
        sonde.ExampleGradients(probe, loss),
    ]
    with sonde.Recorder(path, model, measures, on_error="raise") as recorder:
        recorder.measure()
    return sonde.open_run(path)


@pytest.mark.parametrize("of_last", [False, True])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_time_first_model_is_recorded_as_if_examples_came_first(
    tmp_path: Path, of_last: bool, batch_size: int | None
) -> None:
    x = torch.randn(EXAMPLES, TIME, FEATURES, generator=torch.manual_seed(1))
    offset = torch.randn(EXAMPLES, generator=torch.manual_seed(2))
    y = torch.randint(CLASSES, (EXAMPLES, TIME), generator=torch.manual_seed(3))
    y = y[:, 0] if of_last else y
    loss = F.cross_entropy if of_last else token_loss
    first = recorded(
        tmp_path / "examples first",
        Tagger(is_time_first=False, of_last=of_last),
        Probe((x, offset), y, batch_size=batch_size),
        loss,
    )
    other = recorded(
        tmp_path / "time first",
        Tagger(is_time_first=True, of_last=of_last),
        Probe(
            (x.transpose(0, 1), offset),
            y if of_last else y.T,
            batch_size=batch_size,
            batch_dim=1,
        ),
        loss,
    )
    targets = [run.predictions.targets for run in (first, other)]
    assert targets[0] is not None
    assert targets[1] is not None
    assert np.array_equal(targets[0], targets[1])
    np.testing.assert_allclose(
        other.predictions.array("logits"), first.predictions.array("logits"), rtol=1e-4, atol=1e-6
    )
    assert other.activations.layers == first.activations.layers
    for layer in first.activations.layers:
        np.testing.assert_allclose(
            other.activations[layer].gram(), first.activations[layer].gram(), rtol=1e-4, atol=1e-5
        )
    gradients = first.example_gradients
    assert set(gradients.layers) == {"", "lstm", "norm", "head"}
    for layer in gradients.layers:
        np.testing.assert_allclose(
            other.example_gradients[layer].gram(), gradients[layer].gram(), rtol=1e-3, atol=1e-6
        )


def test_the_fallback_takes_examples_of_another_axis() -> None:
    x = torch.randn(TIME, EXAMPLES, FEATURES)
    y = torch.randint(CLASSES, (TIME, EXAMPLES))
    model = Tagger(is_time_first=True)
    result = sonde.example_gradients(
        model, token_loss, Probe(x, y, batch_dim=1), store=sonde.Full()
    )
    assert result.coverage["scale"].startswith("fallback")
    for row in range(EXAMPLES):
        loss = token_loss(model(x[:, row : row + 1]), y[:, row : row + 1])
        for name, parameter in model.named_parameters():
            (exact,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            torch.testing.assert_close(
                result.parameters[name][row], exact, rtol=1e-4, atol=1e-6, msg=name
            )


def test_a_dataset_may_collate_time_first() -> None:
    x, y = torch.randn(EXAMPLES, TIME, FEATURES), torch.randint(CLASSES, (EXAMPLES, TIME))

    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in items], 1), torch.stack([y for _, y in items], 1)

    loader = DataLoader(TensorDataset(x, y), batch_size=3, collate_fn=collate)
    for in_memory in (True, False):
        probe = Probe(loader, batch_dim=1, in_memory=in_memory)
        assert probe.num_examples == EXAMPLES
        inputs, targets = probe.rows(slice(3, 6), torch.device("cpu"))
        assert isinstance(inputs, Tensor)
        assert targets is not None
        assert torch.equal(inputs, x[3:6].transpose(0, 1))
        assert torch.equal(targets, y[3:6].T)


def test_as_many_steps_as_examples_are_told_apart_by_a_run_on_fewer() -> None:
    x, y = torch.randn(6, 6, FEATURES), torch.randint(CLASSES, (6, 6))
    model = Tagger(is_time_first=True)
    result = sonde.example_gradients(model, token_loss, Probe(x, y, batch_dim=1))
    for row in range(6):
        loss = token_loss(model(x[:, row : row + 1]), y[:, row : row + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        torch.testing.assert_close(result.norms[row].float(), norm, rtol=1e-4, atol=1e-6)


def test_as_many_steps_as_examples_are_refused_where_the_model_takes_no_fewer() -> None:
    class Six(Tagger):
        def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
            assert x.shape[1] == 6
            return super().forward(x)

    x, y = torch.randn(6, 6, FEATURES), torch.randint(CLASSES, (6, 6))
    with pytest.raises(InvalidInputError, match=r"axes 0 and 1 of an output \[6, 6, 3\]"):
        sonde.example_gradients(Six(is_time_first=True), token_loss, Probe(x, y, batch_dim=1))


def test_where_examples_are_is_found_for_each_axis_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    square, its_targets = torch.randn(4, 4, 4).double(), torch.randn(4, 4, 3).double()
    x, y = torch.randn(4, 10, 4).double(), torch.randn(4, 10, 3).double()
    sonde.example_gradients(model, F.mse_loss, Probe(square, its_targets))
    probe = Probe(x, y, batch_dim=1, batch_size=6)  # The last batch has 4 examples of 4 steps.

    result = sonde.example_gradients(model, F.mse_loss, probe)
    crossed = sonde.example_gradients(
        model, F.mse_loss, Probe(square, its_targets), others=Probe(x, y, batch_dim=1, batch_size=6)
    )

    rows = torch.stack([_gradient(model, x[:, i], y[:, i]) for i in range(10)])
    others = torch.stack([_gradient(model, square[i], its_targets[i]) for i in range(4)])
    assert set(result.coverage.values()) == {"exact"}
    torch.testing.assert_close(result.total, rows @ rows.T)
    torch.testing.assert_close(crossed.total, others @ rows.T)


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    gradients = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


class Attending(nn.Module):
    """Logits [time, examples, classes], and attention [examples, time, time]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.linear(x)
        scores = torch.einsum("tbi,sbi->bts", hidden, hidden)
        return {"logits": hidden, "attention": torch.softmax(scores, -1)}


def attending_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    of_logits = F.cross_entropy(outputs["logits"].permute(1, 2, 0), targets.T)
    return of_logits + outputs["attention"].pow(2).mean()


def test_each_output_has_an_axis_of_its_own() -> None:
    x, y = torch.randn(4, 9, 4), torch.randint(3, (4, 9))
    model = Attending()
    expected = sonde.example_gradients(model, attending_loss, Probe(x, y, batch_dim=1))
    # The last batch has 4 examples of 4 steps.
    probe = Probe(x, y, batch_dim=1, batch_size=5)
    result = sonde.example_gradients(model, attending_loss, probe)
    assert set(result.coverage.values()) == {"exact"}
    torch.testing.assert_close(result.total, expected.total, rtol=1e-4, atol=1e-6)


def test_a_single_example_of_a_single_step_has_one_place() -> None:
    x, y = torch.randn(1, 5, FEATURES), torch.randint(CLASSES, (1, 5))
    probe = Probe(x, y, batch_dim=1, batch_size=1)
    result = sonde.example_gradients(Tagger(is_time_first=True), token_loss, probe)
    assert len(result.norms) == 5


def test_a_pair_of_others_is_like_the_first_examples() -> None:
    x, y = torch.randn(TIME, EXAMPLES, FEATURES), torch.randint(CLASSES, (TIME, EXAMPLES))
    model = Tagger(is_time_first=True)
    both = Probe(x, y, batch_dim=1)
    result = sonde.example_gradients(model, token_loss, both, others=(x[:, :3], y[:, :3]))
    expected = sonde.example_gradients(model, token_loss, both)
    assert result.total is not None
    assert expected.total is not None
    torch.testing.assert_close(result.total, expected.total[:, :3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "targets", "batch_dim", "message"),
    [
        (torch.zeros(5, 7, 2), torch.zeros(5, 6), 1, "`targets` has 6 examples, `inputs` 7"),
        ((torch.zeros(5, 7), torch.zeros(6)), None, 1, "tensors with axis 1 of the same number"),
        (torch.zeros(5, 7), None, -1, r"`batch_dim` \(=-1\) must be a whole number >= 0"),
    ],
)
def test_what_does_not_fit_the_axis_is_refused(
    inputs: Any, targets: Tensor | None, batch_dim: int, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Probe(inputs, targets, batch_dim=batch_dim)
