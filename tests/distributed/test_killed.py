"""A rank that is killed takes nothing along that any rank has recorded."""

from __future__ import annotations

from pathlib import Path

import sonde

from .conftest import RunRanks
from .workers.killed import NUM_STEPS


def test_a_run_is_readable_after_a_rank_was_killed(run_ranks: RunRanks, tmp_path: Path) -> None:
    done = run_ranks("killed.py", tmp_path / "run", returncode=None)
    assert done.returncode != 0
    assert "exitcode  : -9" in done.stderr
    run = sonde.open_run(tmp_path / "run")
    # The rank that is left is told by torch, or is ended with the first one.
    assert run.state in ("interrupted", "ended by RuntimeError")
    assert run.damage == []
    assert run.ranks == [0, 1]
    log = run["activations", "training"]
    assert log.steps[:NUM_STEPS] == list(range(NUM_STEPS))
    for step in range(NUM_STEPS):
        ids = log.ids_at(step)
        assert ids is not None
        assert ids.tolist() == list(range(4 * step, 4 * step + 4))
        assert log.features("2", step).shape == (4, 3)
    assert run["activations", "probe"].steps == list(range(NUM_STEPS + 1))
    assert run["activations", "probe"].gram(NUM_STEPS, "2").shape == (9, 9)
