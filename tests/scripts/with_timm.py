"""timm: a model with an EMA copy of it, and a scheduler of its own."""

import timm
import torch
from digest import print_digest
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

torch.manual_seed(0)
model = timm.create_model("resnet18", num_classes=4)
model_ema = ModelEmaV3(model, decay=0.9)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
loss_fn = LabelSmoothingCrossEntropy(0.1)
for update in range(3):
    model.train()
    loss = loss_fn(model(torch.randn(16, 3, 32, 32)), torch.randint(4, (16,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model_ema.update(model, step=update)
    with torch.no_grad():
        model_ema.module(torch.randn(2, 3, 32, 32))
    print(f"loss {loss.item():.4f}")
print_digest(model, model_ema)
