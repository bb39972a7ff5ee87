"""A wrapper that returns {"loss": …, "output": …}, as those of tasks do."""

import torch
from digest import print_digest
from torch import nn


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, x, target):
        output = self.net(x)
        return {"loss": nn.functional.cross_entropy(output, target), "output": output}


torch.manual_seed(0)
model = Task()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(4):
    optimizer.zero_grad()
    model(torch.randn(32, 8), torch.randint(3, (32,)))["loss"].backward()
    optimizer.step()
print_digest(model)
