"""A language model with 20,000 words: its logits are far larger than all else."""

import torch
from digest import print_digest
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(20_000, 4), nn.Linear(4, 20_000))
optimizer = torch.optim.SGD(model.parameters(), 1e-1)
for _ in range(4):
    words = torch.randint(20_000, (16, 17))
    optimizer.zero_grad()
    logits = model(words[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten()).backward()
    optimizer.step()
print_digest(model)
