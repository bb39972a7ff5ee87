"""Starting the sealer: another process that turns closed journals into segments."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# The folder of sonde comes last, so that no package beside it shadows the standard library, and
# the working folder, which -c puts first, not at all.
_CODE = (
    "import sys; sys.path[:1] = []; sys.path.append(sys.argv.pop()); "
    "from sonde.log.seal import main; main()"
)

END = -1
"""Tells a sealer that nothing comes any more."""


class Sealing:
    """Runs the sealer of one writer: one process, which is told what to seal, line by line.

    It ends by itself once its standard input does, so it does not outlive the training by long.

    Args:
        run: The run directory.
        folder: The writer's folder.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self._run = run
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: str | None = None

    @property
    def problem(self) -> str | None:
        """Why journals were left unsealed."""
        process = self._process
        if process is not None and process.poll() is not None:
            self._collect_failure(process)
        if self._failure is None:
            return None
        return (
            f"journals were not sealed into HDF5 ({self._failure}); they stay and read the same, "
            f"and `sonde seal {self._run}` tries again"
        )

    def start(self, before: int) -> None:
        """Have every journal sealed whose frames are numbered below `before`."""
        for _ in range(2):  # A sealer that failed is replaced by a new one, once.
            try:
                if self._process is None or self._process.poll() is not None:
                    if self._process is not None:
                        self._collect_failure(self._process)
                    self._process = self._new_process()
                self._say(self._process, before)
                return
            except (OSError, TypeError, ValueError) as error:
                # An embedded Python has no executable, or another one.
                self._failure = f"no process could be started: {error}"

    def finish(self, timeout: float | None) -> None:
        """Let the sealer end, and wait for it; safe to call more than once."""
        process = self._process
        if process is None:
            return
        try:
            with suppress(OSError, ValueError):  # It has ended, or was told before.
                # A forked worker may keep the pipe open, so its end is not enough.
                self._say(process, END)
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            # It goes on by itself; what it has not sealed yet reads the same.
            return
        self._process = None
        self._collect_failure(process)

    def _say(self, process: subprocess.Popen[bytes], number: int) -> None:
        assert process.stdin is not None
        process.stdin.write(b"%d\n" % number)
        process.stdin.flush()

    def _new_process(self) -> subprocess.Popen[bytes]:
        source = str(Path(__file__).resolve().parents[2])
        run = str(self._run.resolve())
        return subprocess.Popen(
            [sys.executable, "-c", _CODE, run, "--follow", self._folder.name, source],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A Ctrl-C at the training must not tear the sealer down with it.
            start_new_session=os.name != "nt",
        )

    def _collect_failure(self, process: subprocess.Popen[bytes]) -> None:
        """Keep what a sealer that has ended said last; one that succeeded has sealed everything."""
        if process.returncode == 0:
            self._failure = None
        elif process.stderr is not None and not process.stderr.closed:
            lines = process.stderr.read().decode(errors="replace").strip().splitlines()
            self._failure = lines[-1] if lines else f"exit status {process.returncode}"
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
