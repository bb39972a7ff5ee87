"""LBFGS: one optimizer step runs many forward passes, on the same batch."""

import torch
from digest import print_digest
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
x = torch.linspace(-1, 1, 12, dtype=torch.double)[:, None]
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.8, max_iter=5)
for step in range(4):

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.sin())
        loss.backward()
        return loss

    print(f"step {step}: loss {optimizer.step(closure).item():.6f}")
print_digest(model)
