"""Per-example gradients of recurrent layers and of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from sonde.hooks.losses.per_example import Loss

from .gradient_loop import LOSSES, SETTINGS, check_exact

SEEDS = st.integers(0, 999)
NUM_FEATURES = 3


class Sequences(nn.Module):
    """A recurrent layer of sequences [examples, time, features], whose last states count too."""

    def __init__(self, rnn: nn.RNNBase, *, is_packed: bool) -> None:
        super().__init__()
        self.rnn, self.is_packed = rnn, is_packed

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        given: Any = x if self.rnn.batch_first else x.transpose(0, 1)
        if self.is_packed:
            given = pack_padded_sequence(
                given, lengths, batch_first=self.rnn.batch_first, enforce_sorted=False
            )
        outputs, states = self.rnn(given)
        if self.is_packed:
            outputs, _ = pad_packed_sequence(
                outputs, batch_first=self.rnn.batch_first, total_length=x.shape[1]
            )
        outputs = outputs if self.rnn.batch_first else outputs.transpose(0, 1)
        last = states if isinstance(states, tuple) else (states,)
        every = [outputs, *(state.transpose(0, 1) for state in last)]
        return torch.cat([values.flatten(1) for values in every], 1)


@st.composite
def recurrent_layers(draw: Any) -> nn.RNNBase:
    kind = draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
    }
    if options["num_layers"] == 1:
        options["dropout"] = 0.0
    if kind is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind is nn.LSTM:
        options["proj_size"] = draw(st.sampled_from([0, 2]))
    torch.manual_seed(draw(SEEDS))
    layer: nn.RNNBase = kind(NUM_FEATURES, 4, **options)
    return layer


@SETTINGS
@given(recurrent_layers(), st.booleans(), st.integers(2, 4), st.integers(1, 4), LOSSES)
def test_recurrent_layers(
    layer: nn.RNNBase, is_packed: bool, n: int, steps: int, loss: Loss
) -> None:
    model = Sequences(layer, is_packed=is_packed)
    lengths = torch.randint(1, steps + 1, (n,))
    lengths[-1] = steps  # The longest is not the first, so a packed sequence is sorted.
    check_exact(model, (torch.randn(n, steps, NUM_FEATURES), lengths), loss, batch_size=3)


class Cells(nn.Module):
    """A cell that is called once a step."""

    def __init__(self, cell: nn.RNNCellBase, *, is_given_state: bool) -> None:
        super().__init__()
        self.cell, self.is_given_state = cell, is_given_state

    def forward(self, x: Tensor) -> Tensor:
        state = None
        if self.is_given_state:
            zeros = x.new_ones(len(x), self.cell.hidden_size)
            state = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros
        for step in x.unbind(1):
            state = self.cell(step, state)
        return torch.cat(state, 1) if isinstance(state, tuple) else torch.as_tensor(state)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_given_state", [True, False])
def test_recurrent_cells(kind: Any, bias: bool, is_given_state: bool) -> None:
    torch.manual_seed(0)
    cell = kind(NUM_FEATURES, 4, bias=bias)
    check_exact(Cells(cell, is_given_state=is_given_state), torch.randn(4, 3, NUM_FEATURES))


def test_a_relu_cell() -> None:
    torch.manual_seed(0)
    cell = nn.RNNCell(NUM_FEATURES, 4, nonlinearity="relu")
    check_exact(Cells(cell, is_given_state=True), torch.randn(4, 4, NUM_FEATURES))


class LearnedStart(nn.Module):
    """A recurrent layer whose first state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(NUM_FEATURES, 4, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.rnn(x, self.start.expand(-1, len(x), -1).contiguous())[0])


class Attending(nn.Module):
    """Attention of queries to themselves, or to other tokens."""

    def __init__(
        self, attention: nn.MultiheadAttention, mask: str, *, is_cross: bool, needs_weights: bool
    ) -> None:
        super().__init__()
        self.attention, self.mask = attention, mask
        self.is_cross, self.needs_weights = is_cross, needs_weights

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_padding: Tensor) -> Tensor:
        if not self.is_cross:
            key = value = query
        masks: dict[str, Any] = {}
        if self.mask == "padding" and key.shape[1] == is_padding.shape[1]:
            masks["key_padding_mask"] = is_padding
        elif self.mask == "bool":
            masks["attn_mask"] = query.new_ones(query.shape[1], key.shape[1]).triu(1).bool()
        elif self.mask == "float":
            masks["attn_mask"] = query.new_ones(query.shape[1], key.shape[1]).triu()
        given = [query, key, value]
        if not self.attention.batch_first:
            given = [x.transpose(0, 1) for x in given]
        outputs, weights = self.attention(*given, need_weights=self.needs_weights, **masks)
        if not self.attention.batch_first:
            outputs = outputs.transpose(0, 1)
        if weights is not None:
            outputs = torch.cat([outputs.flatten(1), weights.flatten(1)], 1)
        return torch.as_tensor(outputs)


@st.composite
def attentions(draw: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    is_cross = draw(st.booleans())
    sizes = draw(st.sampled_from([(None, None), (3, 5)])) if is_cross else (None, None)
    torch.manual_seed(draw(SEEDS))
    attention = nn.MultiheadAttention(
        4,
        draw(st.sampled_from([1, 2])),
        bias=draw(st.booleans()),
        kdim=sizes[0],
        vdim=sizes[1],
        batch_first=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
    )
    n, num_queries, num_keys = (draw(st.integers(2, 4)) for _ in range(3))
    mask = draw(st.sampled_from(["none", "padding", "bool", "float"]))
    is_padding = torch.rand(n, num_keys) < 0.3
    is_padding[:, 0] = False
    inputs = (
        torch.randn(n, num_queries, 4),
        torch.randn(n, num_keys, sizes[0] or 4),
        torch.randn(n, num_keys, sizes[1] or 4),
        is_padding,
    )
    needs_weights = draw(st.booleans())
    return Attending(attention, mask, is_cross=is_cross, needs_weights=needs_weights), inputs


@SETTINGS
@given(attentions(), LOSSES)
def test_attention(case: tuple[nn.Module, tuple[Tensor, ...]], loss: Loss) -> None:
    check_exact(*case, loss, batch_size=3)


class Encoding(nn.Module):
    """A transformer's layer of tokens [examples, time, features], whatever order it takes."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *tokens: Tensor) -> Tensor:
        if self.layer.self_attn.batch_first:
            return torch.as_tensor(self.layer(*tokens))
        return torch.as_tensor(self.layer(*(x.transpose(0, 1) for x in tokens)).transpose(0, 1))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_layers(norm_first: bool, batch_first: bool, activation: Any) -> None:
    torch.manual_seed(0)
    options: Any = {"norm_first": norm_first, "batch_first": batch_first, "activation": activation}
    encoder = nn.TransformerEncoderLayer(4, 2, 8, **options)
    decoder = nn.TransformerDecoderLayer(4, 2, 8, **options)
    # As many tokens as examples, so that sizes do not tell the axes apart.
    target, memory = torch.randn(3, 3, 4), torch.randn(3, 4, 4)
    check_exact(Encoding(encoder), (target,))
    check_exact(Encoding(decoder), (target, memory))


class LanguageModel(nn.Module):
    """A recurrent language model of (time, examples), whose decoder takes all of them as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(7, NUM_FEATURES), nn.LSTM(NUM_FEATURES, 4)
        self.decoder = nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.rnn(self.embedding(tokens.T))
        decoded = self.decoder(outputs.flatten(0, 1))
        return torch.as_tensor(decoded.view(*tokens.T.shape, -1).transpose(0, 1))


@pytest.mark.parametrize("num_tokens", [3, 4, 8])
def test_a_language_model_of_time_first(num_tokens: int) -> None:
    torch.manual_seed(0)
    check_exact(LanguageModel(), torch.randint(0, 7, (4, num_tokens)))


def test_a_first_state_that_is_a_parameter() -> None:
    torch.manual_seed(0)
    check_exact(LearnedStart(), torch.randn(4, 3, NUM_FEATURES))
