"""Small models of the kinds people train, and ways to call them with one batch of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class GPTBlock(nn.Module):
    """Causal self-attention and a perceptron, each behind a norm and beside a residual path."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(2, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return torch.as_tensor(x + self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    """A decoder [examples, tokens] → [examples, tokens, vocabulary]. Its first and last weights
    are the same parameter, and the output of `wpe` has no batch axis.

    Args:
        checkpointing: Compute blocks again in the backward pass, `reentrant` or `not reentrant`.
    """

    def __init__(
        self,
        vocabulary: int = 11,
        num_tokens: int = 6,
        width: int = 8,
        num_blocks: int = 2,
        num_heads: int = 2,
        dropout: float = 0.1,
        checkpointing: str | None = None,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(num_tokens, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(GPTBlock(width, num_heads, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x)
        return torch.as_tensor(self.lm_head(self.norm(x)))


class MixerBlock(nn.Module):
    """A perceptron over patches, then one over channels (Tolstikhin et al., 2021)."""

    def __init__(self, num_patches: int, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        gelu = nn.GELU()  # Shared, so it is called twice.
        self.patches = nn.Sequential(nn.Linear(num_patches, 8), gelu, nn.Linear(8, num_patches))
        self.channels = nn.Sequential(nn.Linear(width, 8), gelu, nn.Linear(8, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norm_1(x).mT).mT
        return torch.as_tensor(x + self.channels(self.norm_2(x)))


class Mixer(nn.Module):
    """An MLP-Mixer of images [examples, 3, 8, 8]."""

    def __init__(self, width: int = 6, num_blocks: int = 2, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, stride=2)
        self.blocks = nn.Sequential(*(MixerBlock(16, width) for _ in range(num_blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.stem(images).flatten(2).mT)
        return torch.as_tensor(self.head(self.norm(x).mean(1)))


class CallCount(nn.Module):
    """Changes a buffer in every pass, in eval mode too, and its output with it."""

    num_calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return x + 1e-3 * self.num_calls.clone()


class LSTMClassifier(nn.Module):
    """Classifies sequences [examples, time, features] by the last output of an LSTM."""

    def __init__(self, num_features: int = 4, width: int = 8, num_classes: int = 5) -> None:
        super().__init__()
        self.lstm = nn.LSTM(num_features, width, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, sequences: Tensor) -> Tensor:
        outputs, _ = self.lstm(sequences)
        return torch.as_tensor(self.head(outputs[:, -1]))


class TimeFirst(nn.Module):
    """Calls a model that takes [time, examples, …] with tensors [examples, time, …]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *sequences: Tensor) -> object:
        return self.model(*(sequence.transpose(0, 1) for sequence in sequences))


class ListOfImages(nn.Module):
    """Calls a model that takes a list of images with a tensor [examples, 3, height, width]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> object:
        return self.model(list(images))
