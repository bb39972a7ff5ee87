"""What stores keep of per-example gradients, in how many passes, and what is checked again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde
from sonde.hooks.gradients.factors import dense as factors_module
from sonde.hooks.stores.stores import Store

from .gradient_loop import assert_same_gradients, assert_same_gram, kinds, loop_gradients, rows_of


class Net(nn.Module):
    """Embedded tokens, a convolution, a norm, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(5, 4))
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        x = x + self.conv(x.mT).mT
        return F.linear(self.mix(self.norm(x)).tanh(), self.embedding.weight)


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 7, (9, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def expected(model: Net, tokens: Tensor) -> dict[str, Tensor]:
    return loop_gradients(model, token_loss, tokens, tokens)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
@pytest.mark.parametrize("memory", [1, 3000, 1 << 30])
def test_batches_and_memory_change_no_kernel(
    model: Net, tokens: Tensor, expected: dict[str, Tensor], batch_size: int, memory: int
) -> None:
    result = sonde.example_gradients(
        model, token_loss, tokens, tokens, batch_size=batch_size, memory=memory
    )
    assert kinds(result) == {}
    assert_same_gram(result.total, expected)
    torch.testing.assert_close(result.norms, rows_of(expected).norm(dim=1))


@pytest.mark.parametrize("block_bytes", [1, 500])
@pytest.mark.parametrize("batch_size", [2, 9])
def test_kernels_of_two_sets_match_the_loop(
    model: Net,
    tokens: Tensor,
    expected: dict[str, Tensor],
    batch_size: int,
    block_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors_module, "_BLOCK_BYTES", block_bytes)
    others = tokens[:4].flip(1)
    result = sonde.example_gradients(
        model, token_loss, tokens, tokens, others=(others, others), batch_size=batch_size
    )
    assert_same_gram(result.total, expected, loop_gradients(model, token_loss, others, others))
    torch.testing.assert_close(result.norms, rows_of(expected).norm(dim=1))


def test_layers_add_up_and_have_their_own_norms(
    model: Net, tokens: Tensor, expected: dict[str, Tensor]
) -> None:
    result = sonde.example_gradients(model, token_loss, tokens, tokens)
    assert list(result.layers) == ["", "embedding", "conv", "norm", "mix"]
    torch.testing.assert_close(torch.stack(list(result.layers.values())).sum(0), result.total)
    for layer in ("embedding", "conv", "norm", "mix"):
        own = {name: g for name, g in expected.items() if name.startswith(layer)}
        assert_same_gram(result.layers[layer], own)
        torch.testing.assert_close(result.layer_norms[layer], rows_of(own).norm(dim=1))


def test_little_memory_takes_more_passes(model: Net, tokens: Tensor) -> None:
    calls: list[nn.Module] = []
    model.register_forward_hook(lambda called, *_: calls.append(called))

    def num_calls(memory: int) -> int:
        calls.clear()
        sonde.example_gradients(model, token_loss, tokens, tokens, batch_size=3, memory=memory)
        return len(calls)

    num_calls(1 << 30)  # The first call checks examples alone.
    parameters = len(list(model.parameters()))
    assert num_calls(1 << 30) == 3
    assert num_calls(1) == 3 * parameters


@pytest.mark.parametrize("batch_size", [2, 4, 9])
def test_full_gradients_match_the_loop(
    model: Net, tokens: Tensor, expected: dict[str, Tensor], batch_size: int
) -> None:
    result = sonde.example_gradients(
        model, token_loss, tokens, tokens, store=sonde.Full(), batch_size=batch_size
    )
    assert_same_gradients(result, expected)
    assert result.total is None


def test_full_gradients_of_another_type(model: Net, tokens: Tensor) -> None:
    store = sonde.Full(torch.float16)
    result = sonde.example_gradients(model, token_loss, tokens, tokens, store=store)
    assert {g.dtype for g in result.parameters.values()} == {torch.float16}


def test_gradients_are_those_of_each_example_s_own_loss() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1)
    result = sonde.example_gradients(model, F.mse_loss, inputs, targets, store=sonde.Full())
    # d/dw (w·x − 1)² = −2x, and no half of it for two examples.
    assert result.parameters["weight"].tolist() == [[[-2.0, 0.0]], [[0.0, -4.0]]]


class Twins(nn.Module):
    """Two layers with the same gradients, which one projection for both would add up."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.left(x) + self.right(x))


def test_sketches_are_unbiased_and_add_up() -> None:
    torch.manual_seed(0)
    model, inputs = Twins().double(), torch.randn(5, 6, dtype=torch.float64)
    targets = torch.arange(5) % 3
    grams = []
    for seed in range(100):
        store = sonde.Sketch(8, seed)
        result = sonde.example_gradients(model, F.cross_entropy, inputs, targets, store=store)
        assert result.total is not None
        torch.testing.assert_close(result.total, torch.stack(list(result.layers.values())).sum(0))
        grams.append(result.total.double() @ result.total.double().T)
    rows = rows_of(loop_gradients(model, F.cross_entropy, inputs, targets))
    samples = torch.stack(grams)
    standard_error = samples.std(0) / len(samples) ** 0.5
    # Of 15 numbers: a chance of one in 1,000 for the seeds, which are fixed.
    assert float(((samples.mean(0) - rows @ rows.T).abs() / standard_error).max()) < 4


@pytest.mark.parametrize("batch_size", [2, 9])
def test_a_sketch_is_the_same_for_the_same_seed(
    model: Net, tokens: Tensor, batch_size: int
) -> None:
    def sketch(seed: int, batch_size: int) -> Tensor:
        store = sonde.Sketch(8, seed)
        result = sonde.example_gradients(
            model, token_loss, tokens, tokens, store=store, batch_size=batch_size
        )
        assert result.total is not None
        return result.total

    torch.testing.assert_close(sketch(3, batch_size), sketch(3, 9))
    assert not torch.allclose(sketch(4, 9), sketch(3, 9))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.mix(x.transpose(0, 1)).tanh().sum(0))


@pytest.mark.parametrize("batch_sizes", [(6, 5), (5, 6), (6, None), (None, 6)])
def test_each_shape_of_a_batch_is_checked(batch_sizes: tuple[int | None, ...]) -> None:
    # Eleven examples of five steps: of a batch of five, the sizes do not tell the axes apart.
    torch.manual_seed(0)
    model, inputs = TimeFirst().double(), torch.randn(11, 5, 4, dtype=torch.float64)
    targets = torch.randn(11, 4, dtype=torch.float64)
    expected = loop_gradients(model, F.mse_loss, inputs, targets)
    for batch_size in batch_sizes:
        result = sonde.example_gradients(
            model, F.mse_loss, inputs, targets, store=sonde.Full(), batch_size=batch_size
        )
        assert_same_gradients(result, expected)
        assert kinds(result) == {}


def test_a_loss_that_uses_parameters_is_checked_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + next(model.parameters()).square().sum()

    plain = sonde.example_gradients(model, F.cross_entropy, inputs, targets, store=sonde.Full())
    assert kinds(plain) == {}
    result = sonde.example_gradients(model, decayed, inputs, targets, store=sonde.Full())
    for name, gradients in loop_gradients(model, decayed, inputs, targets).items():
        assert name in result.parameters or result.coverage[name].startswith("unsupported")
        if name in result.parameters:
            torch.testing.assert_close(result.parameters[name], gradients)
    assert list(kinds(result)) == ["0.weight"]


class Product(torch.autograd.Function):
    """x w, which neither a rule nor a transformation sees through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return delta @ weight.T, x.T @ delta


class SometimesRefused(nn.Module):
    """Nothing covers a batch with a large number in it, nor such an example alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not bool((x > 9).any()):
            return torch.as_tensor(self.out(self.mix(x)))
        if len(x) == 1:
            raise ValueError("no batch of one")
        return torch.as_tensor(self.out(Product.apply(x, self.mix.weight)))


@pytest.mark.parametrize(
    "store", [sonde.Gram, lambda: sonde.Sketch(8), sonde.Full], ids=["gram", "sketch", "full"]
)
def test_what_a_later_batch_does_not_support_is_left_out(store: Callable[[], Store]) -> None:
    torch.manual_seed(0)
    model, inputs = SometimesRefused(), torch.randn(6, 4)
    inputs[5] = 10
    result = sonde.example_gradients(
        model, F.cross_entropy, inputs, torch.arange(6) % 3, store=store(), batch_size=3
    )
    reason = result.coverage["mix.weight"]
    assert reason.startswith("unsupported: it is behind the autograd function Product")
    assert reason.endswith("one example alone fails: ValueError: no batch of one")
    assert result.coverage["out.weight"] == "exact"
    assert list(result.layer_norms) == ["out"]
    assert [name for name in result.parameters if name.startswith("mix")] == []
    assert list(result.layers) == ([] if store is sonde.Full else ["out"])


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": sonde.Gram(block=4)}, "`store` must be Gram.., without blocks"),
        (
            {"store": sonde.Full(pool="mean")},
            "`store` must be Full.. or Full.dtype. of gradients",
        ),
        ({"store": "gram"}, "`store` .='gram'. must be Gram.., Sketch.dim. or Full"),
        ({"others": torch.zeros(3, 4)}, "`others` must be a Probe, or a pair"),
        (
            {"others": (torch.zeros(3, 4), torch.zeros(3)), "store": sonde.Sketch(4)},
            "`others` takes inner products, which Sketch.* does not keep",
        ),
        ({"layers": "convolution"}, "convolution"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    model, inputs, targets = linear()
    with pytest.raises(sonde.SondeError, match=message):
        sonde.example_gradients(model, F.cross_entropy, inputs, targets, **options)  # type: ignore[arg-type] # wrong ones


def test_a_probe_brings_its_own_targets() -> None:
    model, inputs, targets = linear()
    probe = sonde.Probe(inputs, targets)
    with pytest.raises(sonde.SondeError, match="a Probe brings its own targets and batch size"):
        sonde.example_gradients(model, F.cross_entropy, probe, targets)


def test_a_model_that_returns_no_loss_is_refused() -> None:
    model, inputs, _ = linear()
    with pytest.raises(sonde.SondeError, match="returned Tensor without a scalar loss"):
        sonde.example_gradients(model, None, inputs)


class Penalized:
    """A loss that adds a penalty on the weights, or none."""

    def __init__(self, model: nn.Linear, factor: float) -> None:
        self.weight, self.factor = model.weight, factor

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        return loss + self.factor * self.weight.square().sum() if self.factor else loss


def test_a_loss_made_where_another_was_is_checked_by_itself() -> None:
    model = nn.Linear(4, 3).double()
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    loss = Penalized(model, 0.0)
    place = id(loss)
    coverage = sonde.example_gradients(model, loss, inputs, targets).coverage
    assert coverage["weight"] == "exact"
    del loss
    tried = [Penalized(model, 0.3)]
    while id(tried[-1]) != place and len(tried) < 10_000:
        tried.append(Penalized(model, 0.3))
    coverage = sonde.example_gradients(model, tried[-1], inputs, targets).coverage
    assert coverage["weight"].startswith(("fallback", "unsupported"))
