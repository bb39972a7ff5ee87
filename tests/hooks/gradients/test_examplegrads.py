"""Per-example gradient kernels against one backward pass per example, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sonde.exceptions import InvalidInputError, UnsupportedModelError
from sonde.hooks import Full, Probe, example_gradients
from sonde.hooks.gradients.factors import dense as factors_module
from sonde.hooks.gradients.factors.outer import Outer
from sonde.hooks.losses.per_example import Loss
from tests.hooks.conftest import loop_gram

SETTINGS = settings(max_examples=25)


def total(model: nn.Module, loss: Loss, probe: Probe) -> Tensor:
    grams = example_gradients(model, loss, probe)
    assert [name for name, kind in grams.coverage.items() if kind not in ("exact", "frozen")] == []
    assert grams.total is not None
    return grams.total


def check(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss = F.cross_entropy,
    batch_size: int = 256,
) -> None:
    """The kernel agrees with the loop, in float64 to rounding and in float32 to 1e-5."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        moved = inputs.to(dtype) if inputs.is_floating_point() else inputs
        actual = total(model.to(dtype), loss, Probe(moved, targets, batch_size=batch_size))
        exact_inputs = moved.double() if moved.is_floating_point() else moved
        expected = loop_gram(model.double(), loss, exact_inputs, targets)
        # Relative to the norms of the two gradients: an inner product may cancel to nothing.
        norms = expected.diagonal().sqrt()
        error = (actual - expected).abs() / (norms[:, None] * norms + 1e-30)
        assert float(error.max()) < tolerance


def classes_of(num_examples: int) -> Tensor:
    return torch.arange(num_examples) % 3


def head(features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Tanh(), nn.LazyLinear(3))


def materialized(model: nn.Module, inputs: Tensor) -> nn.Module:
    with torch.no_grad():
        model.eval()(inputs)
    return model


@st.composite
def conv_cases(draw: Any) -> tuple[int, dict[str, Any], int, int]:
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2]))
    padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    options = {
        "kernel_size": draw(st.tuples(*[st.integers(1, 3)] * axes)),
        "stride": 1 if padding == "same" else draw(st.integers(1, 3)),
        "padding": padding,
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    return axes, options, 2 * draw(st.integers(1, 2)), draw(st.integers(0, 1000))


# PyTorch's own word on the cost of an uneven padding, not ours.
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@SETTINGS
@given(conv_cases())
def test_convolutions_match_the_loop(case: tuple[int, dict[str, Any], int, int]) -> None:
    axes, options, channels, seed = case
    torch.manual_seed(seed)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    inputs = torch.randn(5, channels, *([6, 7, 6][:axes]))
    model = nn.Sequential(kind(channels, 4, **options), head(0))
    check(materialized(model, inputs), inputs, classes_of(5), batch_size=3)


@SETTINGS
@given(
    st.lists(st.integers(1, 4), max_size=2), st.integers(1, 6), st.booleans(), st.integers(0, 99)
)
def test_linear_layers_match_the_loop(
    positions: list[int], width: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = torch.randn(6, *positions, width)
    model = nn.Sequential(nn.Linear(width, 4, bias=bias), head(0))
    check(materialized(model, inputs), inputs, classes_of(6))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 5)),
        (nn.BatchNorm2d(4), (4, 3, 2)),
        (nn.BatchNorm3d(4), (4, 2, 3, 2)),
        (nn.GroupNorm(2, 4), (4, 3, 2)),
        (nn.InstanceNorm1d(4, affine=True), (4, 5)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 2)),
        (nn.LayerNorm(4), (4,)),
        (nn.LayerNorm([3, 4]), (2, 3, 4)),
        (nn.LayerNorm(4, bias=False), (5, 4)),
        (nn.RMSNorm(4), (3, 4)),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else str(value),
)
def test_norms_match_the_loop(norm: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, *shape) * 2 + 1
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    model = nn.Sequential(norm, head(0))
    check(materialized(model, inputs), inputs, classes_of(6), batch_size=4)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"sparse": False, "max_norm": 0.5}])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 3, 2)])
def test_embeddings_match_the_loop(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, shape)
    model = nn.Sequential(nn.Embedding(7, 4, **options), head(0))
    check(materialized(model, tokens), tokens, classes_of(6), batch_size=4)


class Reused(nn.Module):
    """A layer called three times, and an embedding tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 9, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for _ in range(3):
            hidden = self.norm(hidden + torch.relu_(self.mix(hidden)))
        return torch.as_tensor(self.out(hidden))


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum")


def test_tied_weights_and_repeated_calls_match_the_loop() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (6, 5))
    check(Reused(), tokens, tokens.roll(-1, 1), token_loss, batch_size=4)


def test_in_place_relu_after_a_norm_matches_the_loop(
    conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    check(conv_net, images, classes)


def test_in_place_operation_on_an_output_that_is_a_view_matches_the_loop() -> None:
    # Some versions of PyTorch give a view from a linear layer of a sequence.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda module, inputs, output: output.view(output.shape))
    check(model, torch.randn(6, 4), classes_of(6), batch_size=4)


def test_a_layer_that_does_not_reach_the_loss_has_no_gradient() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return torch.as_tensor(self.used(x))

    check(Aside(), torch.randn(6, 4), classes_of(6))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_both_forms_of_a_sum_of_outer_products_agree(is_transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(7, 2, 5, 3, generator=generator, dtype=torch.float64)
    inputs = torch.randn(7, 2, 5, 4, generator=generator, dtype=torch.float64)
    order = "ngto,ngti->ngio" if is_transposed else "ngto,ngti->ngoi"
    gradients = torch.einsum(order, delta, inputs).flatten(1)
    factor = Outer(delta, inputs, 4, lambda source: source, is_transposed)
    torch.testing.assert_close(factor.form(slice(0, 7)), gradients)
    torch.testing.assert_close(factor.sum(), gradients.sum(0))
    products, terms = factor.factored()
    torch.testing.assert_close(products, gradients @ gradients.T)
    of_terms = torch.einsum("ngto,ngti->ngtoi", delta, inputs)
    torch.testing.assert_close(terms, of_terms.flatten(1).square().sum(1))
    torch.testing.assert_close(factor.gram(), gradients @ gradients.T)
    torch.testing.assert_close(factor.squared_norms(), (gradients**2).sum(1))


@pytest.mark.parametrize("block_bytes", [1, 300, 3000])
def test_small_blocks_change_nothing(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors_module, "_BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    inputs = torch.randn(5, 2, 6, 6)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(16, 3), head(0))
    check(materialized(model, inputs), inputs, classes_of(5))
    tokens = torch.randint(0, 9, (6, 5))
    check(Reused(), tokens, tokens.roll(-1, 1), token_loss)


def test_softmax_regression_at_zero_weights_is_known_in_closed_form() -> None:
    # The cosine is cos(x, x') within a class and −cos(x, x')/(C − 1) between classes.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    targets = torch.arange(40) % 4
    model = nn.Linear(12, 4, bias=False).double()
    nn.init.zeros_(model.weight)
    gram = total(model, F.cross_entropy, Probe(inputs, targets))
    norms = gram.diagonal().sqrt()
    unit = F.normalize(inputs)
    same = targets[:, None] == targets
    expected = (same.double() - (~same).double() / 3) * (unit @ unit.T)
    assert float((gram / (norms[:, None] * norms) - expected).abs().max()) < 1e-10


def test_last_layer_kernel_factors_into_errors_and_features() -> None:
    # ⟨gᵢ, gⱼ⟩ = ⟨pᵢ − yᵢ, pⱼ − yⱼ⟩ (⟨hᵢ, hⱼ⟩ + 1) for a linear layer with bias.
    torch.manual_seed(0)
    features = torch.randn(9, 5, dtype=torch.float64)
    targets = classes_of(9)
    model = nn.Linear(5, 3).double()
    errors = (model(features).softmax(1) - F.one_hot(targets, 3)).detach()
    expected = (errors @ errors.T) * (features @ features.T + 1)
    torch.testing.assert_close(total(model, F.cross_entropy, Probe(features, targets)), expected)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(targets, 3).to(outputs.dtype))


def sum_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    errors = outputs - F.one_hot(targets, 3).to(outputs.dtype)
    return (errors**2).sum() / errors.shape[1]


def test_the_reduction_over_the_batch_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    probe = Probe(torch.randn(6, 4, dtype=torch.float64), classes_of(6))
    torch.testing.assert_close(total(model, mean_loss, probe), total(model, sum_loss, probe))


def branching_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    scale = 2.0 if float(outputs.detach().sum()) > 0 else 1.0
    return scale * F.cross_entropy(outputs, targets)


def test_a_loss_that_vmap_cannot_transform_is_looped() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 4)
    check(nn.Sequential(nn.Linear(4, 3)), inputs, classes_of(6), branching_loss)


def test_layer_kernels_add_up_and_name_their_owner(
    conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    grams = example_gradients(conv_net, F.cross_entropy, Probe(images, classes))
    assert list(grams.layers) == ["0", "1", "6"]


def test_frozen_parameters_are_left_out_and_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].weight.requires_grad_(False)
    inputs = torch.randn(6, 4)
    check(model, inputs, classes_of(6))
    grams = example_gradients(model.float(), F.cross_entropy, Probe(inputs, classes_of(6)))
    assert grams.coverage["0.weight"] == "frozen"
    assert grams.coverage["0.bias"] == "exact"


class Odd(nn.Module):
    """Parameters that are used in odd ways."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.unused = nn.Linear(4, 4)
        self.turned = nn.Linear(4, 4)
        self.frequency = nn.Embedding(3, 4, scale_grad_by_freq=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        x = self.turned(x.T.contiguous().T[:, None].transpose(0, 1)).squeeze(0)
        x = x + self.frequency((x[:, 0] > 0).long())
        return torch.as_tensor(self.out(x))


def test_every_parameter_is_covered_or_has_a_reason() -> None:
    probe = Probe(torch.randn(5, 4), classes_of(5))
    coverage = example_gradients(Odd(), F.cross_entropy, probe).coverage
    assert coverage == {
        "scale": "exact",
        "unused.weight": "fallback: it was never used in the forward pass",
        "unused.bias": "fallback: it was never used in the forward pass",
        "turned.weight": "exact",
        "turned.bias": "exact",
        "frequency.weight": (
            "fallback: embedding: scale_grad_by_freq makes a gradient depend on the other examples"
        ),
        "out.weight": "exact",
        "out.bias": "exact",
    }


class TimeFirst(nn.Module):
    """Layers that see (time, batch); with as many steps as examples the sizes tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.mix(x.transpose(0, 1)).cumsum(0)[-1]))


class TiedByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embedding(tokens), self.embedding.weight).mean(1)[:, :3]


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return torch.as_tensor(self.out(self.mix(x[order])[order.argsort()]))


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 2)
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.norm(self.conv(x[:, None])).square().sum(2))


class CalledTwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.mix.forward(self.mix(x).tanh())))


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [
        (Odd(), "turned.weight", "exact"),
        (TimeFirst(), "mix.weight", "exact"),
        (TiedByFunction(), "embedding.weight", "exact"),
        (Sorting(), "mix.weight", "fallback: it depends on the examples which of its rows"),
        (Coupled(), "conv.weight", "fallback: the gradient of one example alone differs: batch"),
        (CalledTwoWays(), "mix.weight", "exact"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_odd_uses_are_exact_or_fall_back_or_are_named(
    model: nn.Module, name: str, kind: str
) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(5, 4, dtype=torch.float64)
    if isinstance(model, TiedByFunction):
        inputs = torch.randint(0, 7, (5, 4))
    if isinstance(model, TimeFirst):
        inputs = torch.randn(5, 5, 4, dtype=torch.float64)
    result = example_gradients(model.double(), F.cross_entropy, inputs, classes_of(5))
    assert result.coverage[name].startswith(kind)
    for other, covered in result.coverage.items():
        model.get_parameter(other).requires_grad_(not covered.startswith("unsupported"))
    expected = loop_gram(model, F.cross_entropy, inputs, classes_of(5))
    assert result.total is not None
    torch.testing.assert_close(result.total, expected, rtol=1e-10, atol=1e-12)


def test_a_layer_selection_keeps_all_places_of_a_tied_weight() -> None:
    torch.manual_seed(0)
    model, tokens = Reused().double(), torch.randint(0, 9, (6, 5))
    probe = Probe(tokens, tokens.roll(-1, 1))
    chosen = example_gradients(model, token_loss, probe, layers="out")
    whole = example_gradients(model, token_loss, probe)
    assert list(chosen.layers) == ["embedding"]
    torch.testing.assert_close(chosen.layers["embedding"], whole.layers["embedding"])


def test_half_precision_kernels_are_formed_in_float32() -> None:
    torch.manual_seed(0)
    inputs, model = torch.randn(8, 6, 64), nn.Sequential(nn.Linear(64, 32), head(0))
    materialized(model, inputs)
    halved = model.bfloat16()
    actual = total(halved, F.cross_entropy, Probe(inputs.bfloat16(), classes_of(8)))
    expected = loop_gram(
        halved.double(), F.cross_entropy, inputs.bfloat16().double(), classes_of(8)
    )
    norms = expected.diagonal().sqrt()
    # What is left is the rounding of the forward and backward pass themselves, 2^-8 an operation.
    assert float(((actual - expected).abs() / (norms[:, None] * norms)).max()) < 0.03


@dataclass
class Output:
    logits: Tensor
    state: tuple[Tensor, Tensor]
    scale: Tensor


class WithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Output:
        state = (torch.zeros(1, len(x), 2), torch.zeros(1, len(x), 2))
        return Output(self.out(x), state, torch.ones(()))


@pytest.mark.parametrize("is_loopy", [False, True])
def test_nested_outputs_are_taken_apart_by_example(is_loopy: bool) -> None:
    def loss(output: Output, targets: Tensor) -> Tensor:
        scale = float(output.scale) if is_loopy else output.scale
        return scale * F.cross_entropy(output.logits, targets)

    torch.manual_seed(0)
    check(WithState(), torch.randn(6, 4), classes_of(6), loss)


def test_outputs_without_a_row_per_example_are_refused() -> None:
    probe = Probe(torch.randn(6, 4), classes_of(6))
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(0))
    with pytest.raises(
        InvalidInputError, match=r"outputs \[\[18\]\] have no row for each of the 6"
    ):
        example_gradients(model, F.cross_entropy, probe)


def test_no_gradient_of_the_training_is_touched(
    conv_net: nn.Module, images: Tensor, classes: Tensor
) -> None:
    example_gradients(conv_net, F.cross_entropy, Probe(images, classes))
    assert [name for name, p in conv_net.named_parameters() if p.grad is not None] == []


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    def per_class(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs

    probe = Probe(torch.randn(5, 4), classes_of(5))
    with pytest.raises(InvalidInputError, match=r"`loss` of one example gave \[1, 3\]"):
        example_gradients(nn.Linear(4, 3), per_class, probe)


class Changing(nn.Module):
    """It changes its inputs [examples, steps, features], and has as many steps as examples."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.5)
        hidden = torch.tanh(self.hidden(x.transpose(0, 1)))
        return torch.as_tensor(self.head(hidden.mean(0)))


def test_a_model_that_changes_its_inputs_gets_them_anew_each_time() -> None:
    torch.manual_seed(0)
    check(Changing(), torch.randn(9, 9, 6), classes_of(9))


def test_parameters_without_elements_have_gradients_without_elements() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none, self.head = nn.Parameter(torch.zeros(0)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(x) + self.none.sum())

    result = example_gradients(
        Empty(), F.cross_entropy, torch.randn(5, 4), classes_of(5), store=Full()
    )
    assert result.parameters["none"].shape == (5, 0)
    assert result.parameters["head.weight"].shape == (5, 3, 4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_part_is_refused_and_the_model_left_as_it_was() -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    model = nn.Sequential(torch.jit.script(inner), nn.Linear(6, 3)).train()
    with pytest.raises(UnsupportedModelError, match="ScriptModule"):
        example_gradients(model, F.cross_entropy, torch.randn(9, 6), classes_of(9))
    assert all(module.training for module in model.modules())
