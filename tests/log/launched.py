"""Trainings in processes of their own: PyTorch is loaded once, and a child is forked for each.

A scenario is a function of a module, launched by `launch(function, *arguments)`. Its child ends as
any script does: at the end of the scenario, by `sys.exit`, by an exception or by a signal.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sonde
from sonde.hooks import Measure, Recording, Subject
from sonde.hooks.recording import closing
from sonde.log import LogArray, LogWriter
from tests.limits import LIMIT_SECONDS

from .doomed import record_of

ROOT = Path(__file__).parents[2]
IDS = np.arange(5)


@dataclass(frozen=True)
class Ended:
    """How a training has ended.

    Attributes:
        status: The exit status, or minus the signal that ended it.
        stderr: What it said.
    """

    status: int
    stderr: str

    @property
    def warnings(self) -> list[str]:
        """What sonde warned of."""
        parts = self.stderr.split("SondeWarning: sonde: ")
        return [part.splitlines()[0] for part in parts[1:]]


Launch = Callable[..., Ended]


@contextmanager
def launching(errors: Path) -> Iterator[Launch]:
    """Give what launches a scenario in a process of its own and waits until it has ended."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.log.launched", str(errors)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        calls, statuses = process.stdin, process.stdout
        assert calls is not None
        assert statuses is not None

        def launch(scenario: Callable[..., None], *arguments: object) -> Ended:
            call = [scenario.__module__, scenario.__name__, *map(str, arguments)]
            calls.write(json.dumps(call).encode() + b"\n")
            calls.flush()
            return Ended(int(statuses.readline()), errors.read_text())

        yield launch
        calls.close()
        assert process.wait(LIMIT_SECONDS) == 0


class Known(Measure):
    """Records what `record_of` gives for each step."""

    name = "activations"

    def __init__(self) -> None:
        self._num_taken = 0

    @property
    def source(self) -> str:
        return "probe"

    def check(self, model: nn.Module) -> None:
        """Accept every model."""

    def table(self) -> Sequence[LogArray]:
        return [LogArray("id", IDS, ("example",))]

    def describe(self) -> dict[str, Any]:
        return {}

    def record(self, subject: Subject) -> Recording:
        self._num_taken += 1
        return Recording(record_of(self._num_taken - 1))


class Training:
    """A small training, recorded at every step from 0 on.

    Args:
        run: The run directory; without one it is not recorded.
        segment_bytes: When a journal is full.
        seal: Seal journals in another process.
    """

    def __init__(
        self, run: Path | None, *, segment_bytes: int = 64 << 20, seal: bool = True
    ) -> None:
        self.recorder: sonde.Recorder | None = None
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        if run is not None:
            self.folder = run / "attempt0-rank0"
            # A recorder leaves both as they are by default.
            defaults = LogWriter.__init__.__kwdefaults__
            assert defaults is not None
            defaults.update(segment_bytes=segment_bytes, seal=seal)
            recorder = sonde.Recorder(run, self.model, [Known()], when=sonde.every(1))
            self.recorder = recorder.attach(self.optimizer)

    def step(self, batch: Tensor | None = None) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        self.model(torch.ones(2, 4) if batch is None else batch).sum().backward()
        self.optimizer.step()

    def train(self, num_steps: int) -> None:
        """Take some steps, and wait until all that was recorded is committed or dropped."""
        for _ in range(num_steps):
            self.step()
        self.commit()

    def commit(self) -> None:
        """Wait until all that was recorded is committed or dropped."""
        if self.recorder is not None:
            assert self.recorder._log.writer.flush(LIMIT_SECONDS)


def main(errors: Path) -> None:
    """Fork a child for each scenario that is read, and print how it has ended."""
    torch.set_num_threads(1)
    torch.optim.SGD(nn.Linear(1, 1).parameters())  # Loads what the children would load each.
    assert threading.active_count() == 1
    gc.freeze()  # Else each child would tear all of it down, for a second or more.
    for line in sys.stdin:
        module, name, *arguments = json.loads(line)
        scenario = getattr(import_module(module), name)
        pid = os.fork()
        if pid == 0:
            break
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    else:
        return
    os.dup2(os.open(errors, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    # As in a process that a shell has started in its foreground.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # However slowly the disk of a busy machine takes what a training leaves behind.
    closing._TERMINATION_SECONDS = LIMIT_SECONDS
    signal.alarm(LIMIT_SECONDS)
    scenario(*arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
