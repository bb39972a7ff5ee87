"""Whether rows of examples are seen to be taken in an order that values tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sonde.hooks.model.value_orders import ValueOrders

TABLE = torch.arange(12.0).view(6, 2)
ORDER = torch.tensor([2, 0, 1])


def put(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[x[:, 0].argmax(keepdim=True)] = x[:1] + 1
    return out


def written_first(x: Tensor) -> Tensor:
    out = torch.zeros(3, 4)
    out.add_(x)
    return out.view(2, 6).sort().values


def attended(x: Tensor) -> Tensor:
    heads = x.view(3, 1, 2, 2)
    with torch.compiler.set_stance("force_eager"):  # As all our passes are run.
        return torch.as_tensor(flex_attention(heads, heads, heads)).sum()


@pytest.mark.parametrize(
    ("function", "were_taken"),
    [
        (lambda x: x[x[:, 0] > 0], True),
        (lambda x: x[ORDER], True),  # How many of each there are may differ, too.
        (lambda x: x.index_select(0, ORDER), True),
        (lambda x: x.gather(0, ORDER[:, None]), True),
        (lambda x: x.masked_select(x > 0), True),
        (lambda x: x.topk(2, 0).values, True),
        (lambda x: (x > 0).nonzero(), True),
        (lambda x: torch.zeros(6, 4).index_add(0, ORDER, x), True),
        (lambda x: torch.zeros(6, 4).scatter(0, ORDER[:, None].expand(3, 4), x), True),
        (put, True),
        (written_first, True),
        (lambda x: x.relu().roll(1, 0)[1:, 0], False),
        (lambda x: F.embedding((x[:, 0] > 0).long(), TABLE), False),
        (lambda x: x.sum() + TABLE[(x[:, 0] > 0).long()], False),
        (lambda x: x.sum() + TABLE[ORDER].sort().values.topk(1).values.sum(), False),
        (attended, False),
        (lambda x: attended(x).expand(2).sort().values, True),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_rows_that_were_taken(function: Callable[[Tensor], Tensor], were_taken: bool) -> None:
    x = torch.randn(3, 4)
    expected = function(x)
    with ValueOrders({"x": [x]}) as orders:
        found = function(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert orders.were_taken is were_taken
