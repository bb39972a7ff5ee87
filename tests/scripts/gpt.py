"""A small GPT trainer: accumulation, clipping, targets given to the model, compiled by a flag."""

import sys

import torch
from digest import print_digest
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True, dropout=0.1)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary=11, width=8, block_size=6):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(block_size, width)
        self.h = nn.ModuleList([Block(width) for _ in range(2)])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


torch.manual_seed(1337)
model = GPT()
raw_model = model
if "--compile" in sys.argv:
    model = torch.compile(model, backend="aot_eager")
optimizer = torch.optim.AdamW(raw_model.parameters(), lr=1e-3)
for iteration in range(6):
    for _micro_step in range(2):
        tokens = torch.randint(11, (8, 7))
        logits, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        (loss / 2).backward()
    torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"iter {iteration}: loss {loss.item():.4f}")
print_digest(raw_model)
