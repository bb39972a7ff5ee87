"""What no rule covers and torch.func cannot transform is evaluated one example after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sonde
from sonde.hooks.gradients import one_by_one

from .gradient_loop import assert_same_gradients, loop_gradients

ONE_BY_ONE = "fallback: one example after the other, because "


class Doubled(torch.autograd.Function):
    """2 x w, as functions are written that can be transformed, which this one refuses."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return delta @ weight * 2, delta.T @ x * 2


class Halved(torch.autograd.Function):
    """x w / 2, without what a transformation needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T / 2

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return delta @ weight / 2, delta.T @ x / 2


class OwnCheckpoint(torch.autograd.Function):
    """Computes again in the backward pass, and adds to `.grad` there, as some libraries do."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return torch.as_tensor(module(x))

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), delta)
        return None, x.grad


class Net(nn.Module):
    """Two layers around a third, which is called in some way."""

    def __init__(self, call: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mix = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.out = nn.Linear(4, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.call(self.mix, self.first(x).tanh()).tanh()))


def through_function(mix: nn.Linear, x: Tensor) -> Tensor:
    return torch.as_tensor(Halved.apply(x, mix.weight))


def through_doubled(mix: nn.Linear, x: Tensor) -> Tensor:
    return torch.as_tensor(Doubled.apply(x, mix.weight))


def through_own_checkpoint(mix: nn.Linear, x: Tensor) -> Tensor:
    return torch.as_tensor(OwnCheckpoint.apply(mix, x))


def by_experts(mix: nn.Linear, x: Tensor) -> Tensor:
    """Rows in the order of their sign, as experts in grouped products are given them."""
    order = torch.nonzero(x[:, 0] > 0).flatten(), torch.nonzero(x[:, 0] <= 0).flatten()
    return x.index_copy(0, torch.cat(order), torch.cat([mix(x[order[0]]), x[order[1]]]))


def problem() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3


def loop_by_backward(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The plain loop of a user: zero_grad, forward, backward."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for row in range(len(inputs)):
        model.zero_grad()
        F.cross_entropy(model(inputs[row : row + 1]), targets[row : row + 1]).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            rows[name].append(parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(of) for name, of in rows.items()}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (through_function, "it is behind the autograd function Halved"),
        (through_doubled, "it is behind the autograd function Doubled"),
        (through_own_checkpoint, "it is behind the autograd function OwnCheckpoint"),
        (by_experts, ""),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_what_nothing_else_covers_equals_the_plain_loop(
    call: Callable[[nn.Linear, Tensor], Tensor], reason: str, batch_size: int | None
) -> None:
    inputs, targets = problem()
    model = Net(call).double()
    result = sonde.example_gradients(
        model, F.cross_entropy, inputs, targets, store=sonde.Full(), batch_size=batch_size
    )
    assert result.coverage["mix.weight"].startswith(ONE_BY_ONE + reason)
    assert_same_gradients(result, loop_by_backward(model, inputs, targets))


def test_reentrant_checkpoints_are_exact_wherever_they_stand() -> None:
    inputs, targets = problem()

    def through_checkpoint(mix: nn.Linear, x: Tensor) -> Tensor:
        return torch.as_tensor(checkpoint(mix, x, use_reentrant=True))

    model = Net(through_checkpoint).double()
    result = sonde.example_gradients(
        model, F.cross_entropy, inputs, targets, store=sonde.Full(), batch_size=3
    )
    assert set(result.coverage.values()) == {"exact"}
    assert_same_gradients(result, loop_by_backward(model, inputs, targets))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_that_gives_no_gradient_gives_none_here() -> None:
    inputs, targets = problem()

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.out(checkpoint(self.mix, x, use_reentrant=True)))

    model = Cut().double()
    result = sonde.example_gradients(model, F.cross_entropy, inputs, targets, store=sonde.Full())
    expected = loop_gradients(model, F.cross_entropy, inputs, targets)
    assert float(expected["mix.weight"].norm()) == 0
    assert_same_gradients(result, expected)


def test_nothing_of_grad_or_its_hooks_is_touched() -> None:
    inputs, targets = problem()
    model = Net(through_own_checkpoint).double()
    seen: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    result = sonde.example_gradients(model, F.cross_entropy, inputs, targets)
    assert result.coverage["mix.weight"].startswith(ONE_BY_ONE)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert seen == []


@pytest.mark.parametrize("store", [sonde.Gram(), sonde.Sketch(5), sonde.Full()], ids=repr)
def test_no_more_rows_than_fit_into_memory_are_held(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, targets = problem()
    model = nn.Sequential(Net(through_function), nn.Linear(3, 4), Net(through_function)).double()
    numbers: list[int] = []
    original = one_by_one.gradients_one_by_one

    def counted(*args: Any, **kwargs: Any) -> Any:
        numbers.append(len(args[3]))
        return original(*args, **kwargs)

    monkeypatch.setattr("sonde.hooks.gradients.without_rules.gradients_one_by_one", counted)

    def gradients(memory: int) -> Any:
        return sonde.example_gradients(
            model, F.cross_entropy, inputs, targets, store=store, batch_size=4, memory=memory
        )

    at_once, few = gradients(1 << 20), gradients(1)
    assert numbers == [2, 2, 1, 1, 1, 1]
    torch.testing.assert_close(few.norms, at_once.norms)
    for name, rows in (at_once.layers or at_once.parameters).items():
        torch.testing.assert_close((few.layers or few.parameters)[name], rows)
    assert list(few.layers) == list(at_once.layers)
    assert list(few.parameters) == list(at_once.parameters)


class Noisy(nn.Module):
    """Draws in eval mode, behind a function that nothing sees through."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(Halved.apply(x * torch.rand_like(x), self.mix.weight))


def test_random_numbers_are_those_of_batches_of_one() -> None:
    inputs, targets = problem()
    model = Noisy().double()
    one, many = (
        sonde.example_gradients(
            model, F.cross_entropy, inputs, targets, store=sonde.Full(), batch_size=size
        )
        for size in (1, 7)
    )
    torch.testing.assert_close(one.parameters["mix.weight"], many.parameters["mix.weight"])


class Alone(nn.Module):
    """Fails on one example."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise ValueError("no batch of one")
        return torch.as_tensor(self.mix(x))


def test_what_fails_on_one_example_is_named_with_the_reason() -> None:
    inputs, targets = problem()
    result = sonde.example_gradients(Alone().double(), F.cross_entropy, inputs, targets)
    expected = "unsupported: one example alone fails: ValueError: no batch of one"
    assert result.coverage["mix.weight"].startswith(expected)
    assert result.coverage["mix.weight"].count("one example alone fails") == 1


class Twice(torch.autograd.Function):
    """A weight made of parameters, as some adapters make theirs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return weight.T.contiguous().T * scale

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        weight, scale = ctx.saved_tensors
        return delta * scale, (delta * weight).sum(1, keepdim=True)


class OfFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.scale = nn.Parameter(torch.rand(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.as_tensor(Twice.apply(self.weight, self.scale)))


class OfEntries(nn.Module):
    """A skew-symmetric matrix of a vector, as orthogonal adapters have."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = nn.Parameter(torch.randn(6))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(4, 4, 1)
        matrix = torch.zeros(4, 4, dtype=x.dtype)
        matrix[rows, columns] = self.entries
        return torch.as_tensor(self.out(x @ torch.linalg.inv(torch.eye(4) + matrix - matrix.T)))


class Masked(nn.Module):
    """A token that takes the place of some entries, as of examples that are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.clone()
        hidden[x > 0.5] = self.token
        return torch.as_tensor(self.out(hidden))


@pytest.mark.parametrize("model", [OfFunction, OfEntries])
def test_what_is_made_of_parameters_alone_is_followed(model: Callable[[], nn.Module]) -> None:
    inputs, targets = problem()
    made = model().double()
    result = sonde.example_gradients(made, F.cross_entropy, inputs, targets, store=sonde.Full())
    assert set(result.coverage.values()) == {"exact"}
    assert_same_gradients(result, loop_gradients(made, F.cross_entropy, inputs, targets))


def test_entries_of_examples_are_named_and_right() -> None:
    inputs, targets = problem()
    model = Masked().double()
    result = sonde.example_gradients(model, F.cross_entropy, inputs, targets, store=sonde.Full())
    assert "it is written into entries of another tensor" in result.coverage["token"]
    assert_same_gradients(result, loop_gradients(model, F.cross_entropy, inputs, targets))
