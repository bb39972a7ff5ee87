"""Per-example gradients of the layers of torch: linear, convolutions, embeddings, norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sonde.hooks.losses.per_example import Loss

from .gradient_loop import LOSSES, SETTINGS, check_exact

SEEDS = st.integers(0, 999)
# More and fewer examples than channels, and as many.
NUMS = st.integers(2, 5)


@SETTINGS
@given(st.lists(st.integers(1, 5), max_size=2), NUMS, st.booleans(), LOSSES, SEEDS)
def test_linear(positions: list[int], n: int, bias: bool, loss: Loss, seed: int) -> None:
    torch.manual_seed(seed)
    check_exact(nn.Linear(3, 4, bias=bias), torch.randn(n, *positions, 3), loss)


class TimeFirst(nn.Module):
    """Gives a layer [time, examples, …]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.LayerNorm(3), nn.Embedding(7, 3)])
def test_layers_that_are_given_time_first(layer: nn.Module, n: int) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (n, 5))
    check_exact(TimeFirst(layer), tokens if hasattr(layer, "padding_idx") else torch.randn(n, 5, 3))


class Rowwise(nn.Module):
    """Gives a layer the positions of all examples as rows, [examples · positions, …]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


@SETTINGS
@given(NUMS, st.integers(1, 4), st.integers(1, 4), st.integers(2, 5), SEEDS)
def test_positions_of_all_examples_in_one_axis(
    n: int, steps: int, kernel: int, width: int, seed: int
) -> None:
    # The width may be the number of examples, which is not their axis.
    torch.manual_seed(seed)
    check_exact(Rowwise(nn.Linear(3, width)), torch.randn(n, steps, 3))
    check_exact(Rowwise(nn.Conv2d(2, width, kernel)), torch.randn(n, steps, 2, 4, 5))
    check_exact(Rowwise(nn.LayerNorm(width)), torch.randn(n, steps, width))
    check_exact(Rowwise(nn.GroupNorm(1, width)), torch.randn(n, steps, width, 3))


@st.composite
def convolutions(draw: Any, *, is_transposed: bool) -> tuple[nn.Module, Tensor]:
    axes = draw(st.integers(1, 3))
    stride = draw(st.tuples(*[st.integers(1, 3)] * axes))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * axes))
    groups = draw(st.sampled_from([1, 2]))
    options: dict[str, Any] = {
        "kernel_size": draw(st.tuples(*[st.integers(1, 3)] * axes)),
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if is_transposed:
        kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        options["padding"] = draw(st.integers(0, 1))
        most = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = draw(st.tuples(*[st.integers(0, m) for m in most]))
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        options["padding"] = draw(st.sampled_from([0, 1, 2, "valid", "same"]))
        modes = ["zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        if options["padding"] == "same":
            options["stride"] = 1
    channels = groups * draw(st.integers(1, 2))
    torch.manual_seed(draw(SEEDS))
    inputs = torch.randn(draw(NUMS), channels, *([6, 5, 6][:axes]))
    return kind(channels, groups * draw(st.integers(1, 2)), **options), inputs


# PyTorch's own word on the cost of an uneven padding, not ours.
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@SETTINGS
@given(convolutions(is_transposed=False), LOSSES)
def test_convolutions(case: tuple[nn.Module, Tensor], loss: Loss) -> None:
    check_exact(*case, loss, batch_size=4)


@SETTINGS
@given(convolutions(is_transposed=True), LOSSES)
def test_transposed_convolutions(case: tuple[nn.Module, Tensor], loss: Loss) -> None:
    check_exact(*case, loss, batch_size=4)


def test_a_convolution_that_is_formed_at_once() -> None:
    torch.manual_seed(0)
    check_exact(nn.Conv2d(8, 8, 3, padding=1, dilation=2), torch.randn(5, 8, 10, 10))


class FunctionalConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, weight=self.kernel, bias=self.shift, padding=(1, 0))


def test_a_convolution_by_function() -> None:
    torch.manual_seed(0)
    check_exact(FunctionalConv(), torch.randn(5, 2, 6, 6))


@SETTINGS
@given(
    st.fixed_dictionaries(
        {
            "padding_idx": st.sampled_from([None, 0, 3, -1]),
            "max_norm": st.sampled_from([None, 0.5]),
            "sparse": st.booleans(),
        }
    ),
    st.lists(st.integers(1, 5), max_size=2),
    NUMS,
    SEEDS,
)
def test_embeddings(options: dict[str, Any], positions: list[int], n: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_exact(nn.Embedding(6, 4, **options), torch.randint(0, 6, (n, *positions)))


class FunctionalEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table, padding_idx=-1)


def test_a_negative_padding_index_of_a_function() -> None:
    check_exact(FunctionalEmbedding(), torch.arange(20).reshape(4, 5) % 6)


class Bags(nn.Module):
    """A bag per example, as rows or one behind the other, with a scale of each token."""

    def __init__(self, bag: nn.EmbeddingBag, *, offsets: bool, scaled: bool) -> None:
        super().__init__()
        self.bag, self.offsets, self.scaled = bag, offsets, scaled

    def forward(self, tokens: Tensor, scales: Tensor, lengths: Tensor) -> Tensor:
        given = scales if self.scaled else None
        if not self.offsets:
            return torch.as_tensor(self.bag(tokens, per_sample_weights=given))
        is_there = torch.arange(tokens.shape[1]) < lengths[:, None]
        ends = lengths.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        if not self.bag.include_last_offset:
            offsets = offsets[:-1]
        given = None if given is None else given[is_there]
        return torch.as_tensor(self.bag(tokens[is_there], offsets, given))


@SETTINGS
@given(
    st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["sum", "mean", "max"]),
            "padding_idx": st.sampled_from([None, 2, -1]),
            "max_norm": st.sampled_from([None, 0.5]),
            "include_last_offset": st.booleans(),
        }
    ),
    st.booleans(),
    st.booleans(),
    NUMS,
    SEEDS,
)
def test_embedding_bags(
    options: dict[str, Any], offsets: bool, scaled: bool, n: int, seed: int
) -> None:
    torch.manual_seed(seed)
    scaled = scaled and options["mode"] == "sum"
    options["include_last_offset"] &= offsets
    bag = nn.EmbeddingBag(6, 4, **options)
    inputs = (torch.randint(0, 6, (n, 4)), torch.randn(n, 4), torch.randint(0, 5, (n,)))
    check_exact(Bags(bag, offsets=offsets, scaled=scaled), inputs, batch_size=3)


def test_several_embedding_bags_per_example() -> None:
    torch.manual_seed(0)
    check_exact(Rowwise(nn.EmbeddingBag(6, 4)), torch.randint(0, 6, (3, 2, 5)))


@st.composite
def norms(draw: Any) -> tuple[nn.Module, Tensor]:
    channels, axes = 2 * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    positions = [3, 2, 4][:axes]
    torch.manual_seed(draw(SEEDS))
    inputs = torch.randn(draw(NUMS), channels, *positions) * 2 + 1
    batch: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    instance: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
    tracked = draw(st.booleans())
    norm: nn.Module = draw(
        st.sampled_from(
            [
                nn.LayerNorm(inputs.shape[-draw(st.integers(1, axes + 1)) :]),
                nn.LayerNorm(positions, bias=False),
                nn.RMSNorm(inputs.shape[-draw(st.integers(1, axes + 1)) :]),
                nn.GroupNorm(draw(st.sampled_from([1, 2])), channels),
                instance(channels, affine=True, track_running_stats=tracked),
                batch(channels),
            ]
        )
    )
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    return norm, inputs


@SETTINGS
@given(norms(), LOSSES)
def test_norms(case: tuple[nn.Module, Tensor], loss: Loss) -> None:
    check_exact(*case, loss, batch_size=4)


@SETTINGS
@given(st.booleans(), st.lists(st.integers(1, 3), max_size=2), NUMS, SEEDS)
def test_prelu(is_per_channel: bool, positions: list[int], n: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.PReLU(3 if is_per_channel else 1)
    check_exact(layer, torch.randn(n, 3, *positions))
