"""The classic example: argparse, a Net, train and test functions, a scheduler, a checkpoint."""

import argparse
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from digest import print_digest
from sklearn.datasets import load_digits
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, 1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(36, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = self.dropout1(F.max_pool2d(x, 2))
        return F.log_softmax(self.fc1(torch.flatten(x, 1)), dim=1)


def train(args, model, device, train_loader, optimizer, epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % args.log_interval == 0:
            print(f"Train Epoch: {epoch} [{batch_idx}]\tLoss: {loss.item():.6f}")


def test(model, device, test_loader):
    model.eval()
    correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            output = model(data.to(device))
            correct += output.argmax(dim=1).eq(target.to(device)).sum().item()
    print(f"\nTest set: Accuracy: {correct}/{len(test_loader.dataset)}\n")


def main():
    parser = argparse.ArgumentParser(description="MNIST Example")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-interval", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--start-method", default=None)
    parser.add_argument("--save-model", default=None)
    parser.add_argument("--every", action="store_true", help="an option sonde has, too")
    args = parser.parse_args()
    print(args, sys.argv[0], __name__, __file__, sys.path[0])
    torch.manual_seed(args.seed)
    images, classes = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(classes))
    train_set, test_set = torch.utils.data.random_split(data, [640, len(data) - 640])
    train_loader = DataLoader(
        train_set,
        batch_size=64,
        shuffle=True,
        num_workers=args.workers,
        multiprocessing_context=args.start_method,
    )
    model = Net().to("cpu")
    optimizer = optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    for epoch in range(1, args.epochs + 1):
        train(args, model, "cpu", train_loader, optimizer, epoch)
        test(model, "cpu", DataLoader(test_set, batch_size=1000))
        scheduler.step()
    if args.save_model:
        torch.save(model, args.save_model)
    print_digest(model)


if __name__ == "__main__":
    main()
