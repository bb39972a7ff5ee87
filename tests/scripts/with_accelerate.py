"""Accelerate: prepare, accumulate, a checkpoint saved and loaded again."""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digest import print_digest
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

set_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
data = TensorDataset(torch.randn(96, 5), torch.randint(3, (96,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 16, shuffle=True))
with tempfile.TemporaryDirectory() as folder:
    for _epoch in range(2):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(folder)
        accelerator.load_state(folder)
print(f"loss {loss.item():.5f}")
print_digest(accelerator.unwrap_model(model))
