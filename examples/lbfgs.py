"""LBFGS: the optimizer runs the passes itself, many to a step; the first of each is recorded."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sonde
from sonde.analysis import stiffness


def main(path: Path) -> None:
    """Fit a small network to some digits, record it into a path, and read the log."""
    x, y = (torch.tensor(array[:500]) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, line_search_fn="strong_wolfe")
    recorder = sonde.attach(
        model,
        optimizer,
        path,
        probe=sonde.Probe(x[:60], y[:60]),
        when=sonde.every(1),
        overwrite=True,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        recorder.log(loss=loss)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    recorder.close()

    found = stiffness(sonde.open_run(path), steps=[0, 5]).cosine_within.values
    print(f"stiffness within classes: {found[0]:.2f} at first, {found[1]:.2f} after 5 steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/lbfgs"), help="run directory")
    main(parser.parse_args().out)
