"""A moving average of the model, in training mode like the model itself, made during training."""

import copy

import torch
from digest import print_digest
from torch import nn
from torch.optim.swa_utils import AveragedModel

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
average, best = AveragedModel(model), None
for _ in range(8):
    loss = nn.functional.cross_entropy(model(torch.randn(32, 5)), torch.randint(3, (32,)))
    best = copy.deepcopy(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update_parameters(model)
    average(torch.randn(32, 5))
print(f"loss {loss.item():.5f}")
print_digest(model, average, best)
