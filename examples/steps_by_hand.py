"""No optimizer at all: the loop changes the weights itself, and says when a step is done."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import sonde
from sonde.analysis import stiffness


def main(path: Path) -> None:
    """Train a small network by hand-made steps, record it into a path, and read the log."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    config = sonde.Config(
        path,
        probe=sonde.Probe(x[:60], y[:60]),
        when=sonde.every(50),
        options={"overwrite": True},
    )
    with config.recorder(model) as recorder:
        recorder.start()  # Measures what is due at step 0.
        for batch in torch.randperm(5 * len(x)).remainder(len(x)).split(64):
            loss = cross_entropy(model(x[batch]), y[batch])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.sub_(gradient, alpha=0.3)
            recorder.step()

    found = stiffness(sonde.open_run(path), steps=[0, -1]).cosine_within.values
    print(f"stiffness within classes: {found[0]:.2f} at first, {found[1]:.2f} at last")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/by_hand"), help="run directory")
    main(parser.parse_args().out)
