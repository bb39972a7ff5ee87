"""The training calls `.forward`; with a flag, the model itself is called after it."""

import sys

import torch
from digest import print_digest
from torch import nn

torch.manual_seed(0)
model = nn.Linear(8, 8)
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(4):
    optimizer.zero_grad()
    model.forward(torch.randn(32, 8)).square().mean().backward()
    optimizer.step()
if "--score" in sys.argv:
    print(model(torch.randn(32, 8)).sum().item().hex())
print_digest(model)
