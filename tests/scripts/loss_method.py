"""The loss is a method of the model: its parts are called, the model itself never is."""

import torch
from digest import print_digest
from torch import nn


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16))

    def loss(self, x):
        return nn.functional.mse_loss(self.decoder(self.encoder(x)), x)


torch.manual_seed(0)
model = AutoEncoder()
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(4):
    optimizer.zero_grad()
    model.loss(torch.randn(32, 16)).backward()
    optimizer.step()
print_digest(model)
