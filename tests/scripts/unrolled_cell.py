"""An LSTMCell that the model calls 40 times in a forward pass."""

import torch
from digest import print_digest
from torch import nn


class Unrolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 4)
        self.cell = nn.LSTMCell(4, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        h = c = torch.zeros(len(x), 8)
        outputs = []
        for value in self.first(x[..., None]).unbind(1):
            h, c = self.cell(value, (h, c))
            outputs.append(self.out(h))
        return torch.cat(outputs, 1)


torch.manual_seed(0)
model = Unrolled()
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(4):
    x = torch.randn(32, 40)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), x).backward()
    optimizer.step()
print_digest(model)
