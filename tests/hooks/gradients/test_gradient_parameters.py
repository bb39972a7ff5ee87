"""Per-example gradients of parameters that are used by functions, shared, or parametrized."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .gradient_loop import SETTINGS, check_exact

SEEDS = st.integers(0, 999)

Use = Callable[["Bare", Tensor], Tensor]


class Bare(nn.Module):
    """A parameter, and a function that uses it with tokens [examples, time, features]."""

    def __init__(self, shape: tuple[int, ...], use: Use) -> None:
        super().__init__()
        self.parameter, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def prepend(m: Bare, x: Tensor) -> Tensor:
    return torch.cat([m.parameter.expand(len(x), -1, -1), x], 1)


def mask(m: Bare, x: Tensor) -> Tensor:
    return torch.where((x[..., :1] > 0), m.parameter, x)


def in_place(m: Bare, x: Tensor) -> Tensor:
    x = x.tanh()
    x *= m.parameter
    x += m.parameter
    return x


def time_first(m: Bare, x: Tensor) -> Tensor:
    first = x.transpose(0, 1) + m.parameter
    return torch.cat([m.parameter.expand(-1, len(x), -1), first]).transpose(0, 1)


# T = 3 and D = 4; the examples are as many as either, and neither.
USES: dict[str, tuple[tuple[int, ...], Use]] = {
    "position embedding [1, T, D]": ((1, 3, 4), lambda m, x: x + m.parameter),
    "position embedding [T, D]": ((3, 4), lambda m, x: m.parameter + x),
    "part of a longer position embedding": (
        (1, 9, 4),
        lambda m, x: x + m.parameter[:, : x.shape[1]],
    ),
    "position embedding of time first": ((3, 1, 4), time_first),
    "class token": ((1, 1, 4), prepend),
    "class token by expand_as": (
        (1, 1, 4),
        lambda m, x: torch.cat([m.parameter.expand_as(x[:, :1]), x], 1),
    ),
    "class token by repeat": (
        (1, 2, 4),
        lambda m, x: torch.cat([x, m.parameter.repeat(len(x), 1, 1)], dim=-2),
    ),
    "layer scale": ((4,), lambda m, x: x + m.parameter * x.tanh()),
    "scalar": ((), lambda m, x: x * m.parameter.exp()),
    "scalar [1]": ((1,), lambda m, x: x - m.parameter),
    "reversed difference": ((4,), lambda m, x: m.parameter - 2 * x),
    "scaled sum": ((4,), lambda m, x: torch.add(x, m.parameter, alpha=0.5)),
    "scaled difference": ((3, 1), lambda m, x: torch.sub(m.parameter, x, alpha=2)),
    "bias of windows": ((1, 4), lambda m, x: (x.flatten(0, 1) + m.parameter).view_as(x)),
    "power of windows": (
        (4,),
        lambda m, x: (x.flatten(0, 1).abs() ** m.parameter).view_as(x),
    ),
    "gate": ((1, 3, 1), lambda m, x: x * m.parameter.sigmoid()),
    "in place": ((4,), in_place),
    "quotient": ((4,), lambda m, x: x / m.parameter),
    "power": ((4,), lambda m, x: x.abs() ** m.parameter),
    "lerp": ((4,), lambda m, x: torch.lerp(x, m.parameter, 0.3)),
    "addcmul": ((4,), lambda m, x: torch.addcmul(x, m.parameter, x)),
    "mask token [D]": ((4,), mask),
    "mask token [1, 1, D]": ((1, 1, 4), mask),
    "matrix product": ((4, 5), lambda m, x: x @ m.parameter),
    "matrix from the left": ((2, 3), lambda m, x: m.parameter @ x),
    "bmm": ((4, 2), lambda m, x: torch.bmm(x, m.parameter.expand(len(x), -1, -1))),
    "vector product": ((4,), lambda m, x: x @ m.parameter),
    "einsum of features": ((4, 5), lambda m, x: torch.einsum("btd,de->bte", x, m.parameter)),
    "einsum of time": ((3, 2), lambda m, x: torch.einsum("btd,ts->bsd", x, m.parameter)),
    "einsum of heads": (
        (2, 2, 5),
        lambda m, x: torch.einsum("bthd,hde->bte", x.unflatten(2, (2, 2)), m.parameter),
    ),
    "bilinear form": ((5, 4, 4), lambda m, x: F.bilinear(x, x.tanh(), m.parameter)),
    "addmm, as a Conv1D of GPT-2": (
        (4, 4),
        lambda m, x: torch.addmm(m.parameter[0], x.flatten(0, 1), m.parameter).view(x.shape),
    ),
    "distances to prototypes": ((5, 4), lambda m, x: torch.cdist(x, m.parameter)),
    "queries of attention": (
        (1, 2, 4),
        lambda m, x: F.scaled_dot_product_attention(m.parameter.expand(len(x), -1, -1), x, x),
    ),
    "queries that attention broadcasts": (
        (1, 2, 4),
        lambda m, x: F.scaled_dot_product_attention(m.parameter, x, x),
    ),
    "bias of attention": (
        (1, 3, 3),
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.parameter),
    ),
    "rows by index": ((4, 4), lambda m, x: m.parameter[(x[..., 0] > 0).long()]),
    "masked fill of its sum": ((4,), lambda m, x: (x + m.parameter).masked_fill(x > 0, 0.0)),
    "stack": ((3, 4), lambda m, x: torch.stack([x, m.parameter.expand_as(x)], 1)),
    "normalized weights": (
        (5, 4),
        lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.parameter)),
    ),
    "maximum": ((4,), lambda m, x: torch.maximum(x, m.parameter)),
    "weighted by softmax": ((3,), lambda m, x: (x * m.parameter.softmax(0)[:, None]).sum(1)),
}


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("name", USES)
def test_bare_parameters(name: str, n: int) -> None:
    torch.manual_seed(0)
    check_exact(Bare(*USES[name]), torch.randn(n, 3, 4))


class Tied(nn.Module):
    """An embedding that is the output layer too, by a module or by a function."""

    def __init__(self, *, by_module: bool) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(6, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False) if by_module else None
        if self.out is not None:
            self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.mix(self.embedding(tokens)).tanh()
        hidden = hidden + self.mix(hidden)
        if self.out is not None:
            return torch.as_tensor(self.out(hidden))
        return F.linear(hidden, self.embedding.weight)


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")


@SETTINGS
@given(st.booleans(), st.integers(2, 6), st.integers(1, 5), SEEDS)
def test_tied_weights_and_repeated_calls(by_module: bool, n: int, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    tokens = torch.randint(0, 6, (n, steps))
    check_exact(Tied(by_module=by_module), tokens, token_loss, tokens.roll(1, 0), batch_size=4)


class Positions(nn.Module):
    """An embedding of positions, looked up once, or once for each example."""

    def __init__(self, *, is_expanded: bool, sparse: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(6, 4), nn.Embedding(5, 4, sparse=sparse)
        self.is_expanded = is_expanded

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if self.is_expanded:
            positions = positions.expand(len(tokens), -1)
        return torch.as_tensor(self.tokens(tokens) + self.positions(positions))


@pytest.mark.parametrize("is_expanded", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("n", [3, 4])
def test_embeddings_of_positions(is_expanded: bool, sparse: bool, n: int) -> None:
    torch.manual_seed(0)
    check_exact(Positions(is_expanded=is_expanded, sparse=sparse), torch.randint(0, 6, (n, 4)))


PARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm over all": lambda layer: parametrizations.weight_norm(layer, dim=None),  # type: ignore[arg-type] # None is documented
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal by matrix_exp": lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map="matrix_exp"
    ),
    "orthogonal by cayley": lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map="cayley"
    ),
    "orthogonal by householder": lambda layer: parametrizations.orthogonal(
        layer, orthogonal_map="householder"
    ),
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("kind", [lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 3)])
def test_parametrized_weights(name: str, kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = PARAMETRIZATIONS[name](kind())
    for _ in range(3):
        model(torch.randn(2, 4, 4))  # In training mode, which turns the vectors of spectral norm.
    check_exact(model, torch.randn(5, 4, 4))


def test_a_parametrized_convolution() -> None:
    torch.manual_seed(0)
    model = parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    check_exact(model, torch.randn(5, 4, 6))
