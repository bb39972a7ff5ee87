"""Language models that return their loss, of sequences of unequal length: no parameter is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sonde

from .gradient_loop import assert_same_gradients

transformers = pytest.importorskip("transformers")

_COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
_EXPERTS = {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(  # type: ignore[no-any-return] # transformers is untyped
        transformers.LlamaConfig(**_COMMON, num_key_value_heads=1)
    )


def mixtral(**options: Any) -> nn.Module:
    return transformers.MixtralForCausalLM(  # type: ignore[no-any-return] # the same
        transformers.MixtralConfig(**_COMMON, **_EXPERTS, **options)
    )


def mixtral_with_router_loss() -> nn.Module:
    return mixtral(output_router_logits=True)


def deberta() -> nn.Module:
    return transformers.DebertaV2ForMaskedLM(  # type: ignore[no-any-return] # the same
        transformers.DebertaV2Config(
            **_COMMON, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4
        )
    )


def bloom() -> nn.Module:
    return transformers.BloomForCausalLM(  # type: ignore[no-any-return] # the same
        transformers.BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2)
    )


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, 32, (4, 7))
    is_there = torch.arange(7) < torch.tensor([7, 3, 5, 6])[:, None]
    return {
        "input_ids": tokens.where(is_there, 0),
        "attention_mask": is_there.long(),
        "labels": tokens.where(is_there, -100),
    }


def loop(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for at in range(len(given["input_ids"])):
        value = model(**{name: x[at : at + 1] for name, x in given.items()}).loss
        found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), found, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(of) for name, of in rows.items()}


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (llama, {"exact"}),
        (bloom, {"exact"}),
        (mixtral, {"exact", "fallback"}),
        (mixtral_with_router_loss, {"fallback"}),
        (deberta, {"exact", "fallback"}),
    ],
)
def test_every_parameter_equals_the_loop(make: Callable[[], nn.Module], kinds: set[str]) -> None:
    torch.manual_seed(0)
    model = make().eval()  # Not in float64, which grouped products of experts do not take.
    given = batch()
    result = sonde.example_gradients(model, None, given, store=sonde.Full(), batch_size=3)
    assert {coverage.partition(":")[0] for coverage in result.coverage.values()} == kinds
    expected = loop(model, given)
    # Rounding of float32 alone; what a loss weighs otherwise is off by tenths.
    assert_same_gradients(result, expected, 1e-4)
