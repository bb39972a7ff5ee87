"""The run directory of a recorder: whose run is in it, and one attempt for all ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sonde
from sonde.exceptions import InvalidInputError, MismatchError, RunExistsError, RunNotFoundError
from sonde.hooks.recording import run_directory
from sonde.log import LogWriter
from sonde.log.format.files import write_run_file, writer_folders
from tests.limits import LIMIT_SECONDS

Make = Callable[..., sonde.Recorder]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> Make:
    """Make a recorder as one rank of several, whose probe is that rank's part of the images."""

    def as_rank(rank: int, *, world_size: int = 2, **options: Any) -> sonde.Recorder:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        own = slice(rank, None, world_size)
        probe = sonde.Probe(images[own], ids=range(len(images))[own])
        store = sonde.Full(torch.float32)
        measure = sonde.Activations(probe, "", store=store)
        return sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure], **options)

    return as_rank


def attempts(path: Path) -> list[tuple[int, int]]:
    return [(attempt, rank) for attempt, rank, _ in writer_folders(path)]


def test_ranks_record_one_attempt_each_time_they_resume(tmp_path: Path, make: Make) -> None:
    for attempt in range(3):
        recorders = [make(rank, resume=True) for rank in (0, 1)]
        assert attempts(tmp_path / "run")[-2:] == [(attempt, 0), (attempt, 1)]
        for recorder in recorders:
            recorder.close()


def test_a_rank_that_missed_an_attempt_comes_back_into_that_of_the_others(
    tmp_path: Path, make: Make
) -> None:
    make(0).close()
    first = make(0, resume=True)
    make(1, resume=True).close()
    first.close()
    assert attempts(tmp_path / "run") == [(0, 0), (1, 0), (1, 1)]


def test_a_rank_waits_for_the_first(tmp_path: Path, make: Make) -> None:
    waiting = threading.Thread(target=lambda: made.append(make(1)))
    made: list[sonde.Recorder] = []
    waiting.start()
    while not (tmp_path / "run").exists():
        time.sleep(0.001)
    made.append(make(0))
    waiting.join(LIMIT_SECONDS)
    assert attempts(tmp_path / "run") == [(0, 0), (0, 1)]
    for recorder in made:
        recorder.close()


def test_a_rank_whose_first_never_comes_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(run_directory, "_PATIENCE_SECONDS", 0.0)
    with (
        pytest.warns(sonde.SondeWarning, match="rank 1 waits for rank 0 to record into"),
        pytest.raises(RunNotFoundError, match="rank 1 waited 0 seconds for rank 0 to record into"),
    ):
        make(1)


def test_an_attempt_of_an_earlier_launch_is_not_joined(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(0, world_size=1).close()
    monkeypatch.setattr(run_directory, "_WAIT_SECONDS", 0.2)
    with pytest.raises(RunNotFoundError, match="rank 1 waited"):
        make(1, resume=True)


def test_a_run_that_another_rank_still_writes_is_not_resumed(make: Make) -> None:
    first, second = make(0), make(1)
    first.close()
    # In this process it is closed; the lock of another process would stay.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sonde.hooks.recording.closing.still_open", list)
        with pytest.raises(RunExistsError, match="is being written by another process"):
            make(0, resume=True)
    second.close()


def test_each_ranks_part_of_a_probe_is_joined(tmp_path: Path, make: Make, images: Tensor) -> None:
    recorders = [make(rank, world_size=3) for rank in range(3)]
    for recorder in recorders:
        recorder.measure()
        recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run.activations.ids is not None
    assert run.activations.ids.tolist() == list(range(len(images)))
    assert torch.equal(torch.tensor(run.activations.features("")), images.flatten(1))
    assert run.notes == [note for note in run.notes if note["event"] == "layers"]


SCRIPT = """if True:
    import os, sys, torch, sonde
    import torch.distributed as dist
    from torch import nn

    path, num_steps, resumed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[4]}",
        world_size=world_size, rank=rank)
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = sonde.Probe(x[rank::world_size], ids=range(rank, 8, world_size))
    recorder = sonde.Recorder(
        path,
        model,
        [sonde.Activations(probe, store=sonde.Full(torch.float32)), sonde.Predictions(probe)],
        when=sonde.every(1),
        resume=True,
    ).attach(optimizer)
    if resumed >= 0:
        recorder.load_state_dict({"version": 1, "num_steps": resumed, "num_epochs": 0})
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(x).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    recorder.sync()
    os._exit(0) if rank == 1 else recorder.close()
    dist.destroy_process_group()
"""


def test_processes_that_resume_leave_each_step_once(
    tmp_path: Path, is_full: bool, counts: Counter[str]
) -> None:
    path, world_size = tmp_path / "run", 4 if is_full else 2
    launches = [(4, -1), (4, 2), (3, 5), (2, 6)] if is_full else [(4, -1), (6, 2)]
    environ = {**os.environ, "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    for num_steps, resumed in launches:
        meeting = tmp_path / f"meeting{resumed}"
        # The last one comes first.
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, *map(str, (path, num_steps, resumed, meeting))],
                env={**environ, "RANK": str(rank)},
            )
            for rank in reversed(range(world_size))
        ]
        assert [process.wait(300) for process in ranks] == [0] * world_size
    run = sonde.open_run(path)
    assert attempts(path) == [(a, r) for a in range(len(launches)) for r in range(world_size)]
    for measure in ("activations", "predictions"):
        assert run[measure].steps == list(range(9))
        assert run[measure].ids_at(5).tolist() == list(range(8))  # type: ignore[union-attr]  # has ids
        for rank in range(world_size):
            assert run.rank(rank)[measure].steps == list(range(9))
            counts["(step, rank, measure) of resumed trainings, each read once"] += 9
    assert run.damage == []


def test_a_run_is_not_overwritten_unless_asked(tmp_path: Path, images: Tensor) -> None:
    def make(**options: Any) -> sonde.Recorder:
        measure = sonde.Predictions(sonde.Probe(images))
        return sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure], **options)

    first = make()
    first.measure()
    first.close()
    with pytest.raises(
        RunExistsError, match=r"already holds a run; .* resume=True, .* overwrite=True"
    ):
        make()
    make(overwrite=True).close()
    assert sonde.open_run(tmp_path / "run").steps() == []


def test_a_recorder_of_an_earlier_try_is_closed_before_its_run_is_overwritten(
    tmp_path: Path, images: Tensor
) -> None:
    def make() -> sonde.Recorder:
        measure = sonde.Predictions(sonde.Probe(images))
        return sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure], overwrite=True)

    first = make()
    second = make()
    first.measure()
    second.measure()
    first.close()
    assert sonde.open_run(tmp_path / "run").state == "recording"
    second.close()
    assert sonde.open_run(tmp_path / "run").steps() == [0]


def test_a_run_that_another_process_writes_is_not_overwritten(
    tmp_path: Path, images: Tensor
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    write_run_file(path, {})
    writer = LogWriter(path, seal=False)
    measure = sonde.Predictions(sonde.Probe(images))
    with pytest.raises(RunExistsError, match="is being written by another process"):
        sonde.Recorder(path, nn.Flatten(), [measure], overwrite=True)
    writer.close()


def test_other_examples_or_measures_are_not_mixed_into_a_run(
    tmp_path: Path, images: Tensor
) -> None:
    def make(data: Tensor, **options: Any) -> sonde.Recorder:
        measure = sonde.Activations(sonde.Probe(data), "", **options)
        return sonde.Recorder(tmp_path / "run", nn.Flatten(), [measure], resume=True)

    make(images).close()
    with pytest.raises(MismatchError, match=r"other examples as 'probe' \(input_digest"):
        make(images * 2)
    with pytest.raises(MismatchError, match="was recorded with other measures"):
        make(images, store=sonde.Sketch(4))


def test_digests_of_batches_of_another_size_do_not_end_a_run(tmp_path: Path) -> None:
    x, y = torch.arange(8.0).reshape(4, 2), torch.zeros(4, 3)

    def make(x: Tensor, batch_size: int) -> sonde.Recorder:
        items = TensorDataset(x, y)
        loader = DataLoader(items, batch_size, collate_fn=_two_inputs)
        probe = sonde.Probe(loader, in_memory=False)
        measure = sonde.Activations(probe, "", store=sonde.Gram())
        return sonde.Recorder(tmp_path / "run", _Sum(), [measure], resume=True)

    make(x, 2).close()
    make(x, 3).close()
    with pytest.raises(MismatchError, match=r"other examples as 'probe' \(input_digest"):
        make(x + 1, 3)


def _two_inputs(rows: list[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    x = torch.stack([row for row, _ in rows])
    return (x, 2 * x), torch.zeros(len(rows))


class _Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def record_flat(path: Path, images: Tensor, **options: Any) -> sonde.Recorder:
    return sonde.Recorder(path, nn.Flatten(), [sonde.Predictions(sonde.Probe(images))], **options)


def test_a_second_recorder_of_this_process_takes_another_directory(
    tmp_path: Path, images: Tensor
) -> None:
    first = record_flat(tmp_path / "run", images)
    with pytest.warns(sonde.SondeWarning, match=r"another recorder .* into .*run-2\. To record"):
        second = record_flat(tmp_path / "run", images)
    assert second.path == tmp_path / "run-2"
    for recorder in (first, second):
        recorder.measure()
        recorder.close()
    for name in ("run", "run-2"):
        assert sonde.open_run(tmp_path / name).steps() == [0]


@pytest.mark.parametrize("wrong", [{"sync": "never"}, {"queue_bytes": 0}])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_recorder_that_fails_leaves_nothing_behind(
    tmp_path: Path, images: Tensor, wrong: dict[str, Any], is_there: bool
) -> None:
    path = tmp_path / "run"
    if is_there:
        path.mkdir()
    with pytest.raises(InvalidInputError):
        record_flat(path, images, **wrong)
    assert (list(path.iterdir()) if is_there else path.exists()) in ([], False)
    record_flat(path, images).close()


def test_a_run_to_resume_stays_where_its_recorder_fails(tmp_path: Path, images: Tensor) -> None:
    recorder = record_flat(tmp_path / "run", images)
    recorder.measure()
    recorder.close()
    with pytest.raises(InvalidInputError):
        record_flat(tmp_path / "run", images, resume=True, queue_bytes=0)
    assert sonde.open_run(tmp_path / "run").steps() == [0]
    assert attempts(tmp_path / "run") == [(0, 0)]


def test_a_run_in_which_nothing_was_recorded_keeps_no_directory_occupied(
    tmp_path: Path, images: Tensor
) -> None:
    recorder = record_flat(tmp_path / "run", images)
    with pytest.raises(InvalidInputError, match=r"expected a torch\.optim\.Optimizer"):
        recorder.attach(object())  # type: ignore[arg-type] # as a user may
    recorder.close()
    again = record_flat(tmp_path / "run", images)
    again.measure()
    again.close()
    assert sonde.open_run(tmp_path / "run").steps() == [0]
    with pytest.raises(RunExistsError, match="already holds a run"):
        record_flat(tmp_path / "run", images)
