"""What a launch of a worker leaves, for the tests that compare it with one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sonde
from sonde.log import Run


@dataclass(frozen=True)
class Trained:
    """What a launch left: run directories, and what every rank returned, by name.

    Attributes:
        folder: Where they are, named by the kind of parallelism and what was recorded.
        num_ranks: The number of processes.
    """

    folder: Path
    num_ranks: int

    def run(self, *name: str) -> Run:
        """Open a run."""
        return sonde.open_run(self.folder / " ".join(name))

    def results(self, kind: str, recorded: str) -> list[dict[str, Any]]:
        """Return what each rank returned."""
        loaded: list[dict[str, Any]] = torch.load(self.folder / f"{kind} {recorded}.pt")
        return loaded


def assert_same_training(trained: Trained, kind: str, recorded: str) -> None:
    """With this recorded every rank has the weights and losses it has with nothing recorded."""
    expected = trained.results(kind, "nothing")
    actual = trained.results(kind, recorded)
    assert len(actual) == trained.num_ranks
    for rank in range(trained.num_ranks):
        for name in ("weights", "losses"):
            pairs = zip(actual[rank][name], expected[rank][name], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
