"""One graph: features of 30 nodes, and a matrix of which are neighbours, sparse by a flag."""

import sys

import torch
from digest import print_digest
from torch import nn


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x, neighbours):
        return self.b(neighbours @ torch.relu(self.a(neighbours @ x)))


torch.manual_seed(0)
x, y = torch.randn(30, 8), torch.randint(4, (30,))
neighbours = (torch.rand(30, 30) < 0.2).float() + torch.eye(30)
if "--sparse" in sys.argv:
    neighbours = neighbours.to_sparse()
model = GCN()
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(4):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x, neighbours), y).backward()
    optimizer.step()
print_digest(model)
