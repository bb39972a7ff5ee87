"""Two processes of DistributedDataParallel, under torchrun."""

import torch
import torch.distributed as dist
from digest import print_digest
from torch import nn

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
torch.manual_seed(dist.get_rank())
for _ in range(4):
    optimizer.zero_grad()
    model(torch.randn(20, 4)).square().mean().backward()
    optimizer.step()
print_digest(model)
dist.destroy_process_group()
