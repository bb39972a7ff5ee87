"""ImageNet-style: torchvision, FakeData, DataParallel where there is one device or none."""

import torch
import torchvision
from digest import print_digest
from torch import nn
from torchvision import models, transforms

torch.manual_seed(0)
dataset = torchvision.datasets.FakeData(32, (3, 32, 32), 5, transforms.ToTensor())
loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
model = nn.DataParallel(models.resnet18(num_classes=5))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
for images, target in loader:
    loss = criterion(model(images), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.4f}")
print_digest(model)
