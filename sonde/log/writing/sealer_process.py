"""Starting the sealer: another process that turns closed journals into segments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# The folder of sonde comes last, so that no package beside it shadows the standard library, and
# the working folder, which -c puts first, not at all. A run directory that is handed over open is
# worked in wherever it is moved.
_CODE = (
    "import os, sys; sys.path[:1] = []; sys.path.append(sys.argv.pop()); "
    "run = int(sys.argv.pop()); run < 0 or os.fchdir(run); "
    "from sonde.log.sealing.seal import main; main()"
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
        self._before = 0
        self._is_new = True  # The process was asked for nothing but the last.
        self._run_fd: int | None = None
        with suppress(OSError):  # Windows opens no folders, nor moves those in which a file is.
            self._run_fd = os.open(run, os.O_RDONLY)

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
        self._before = before
        self._is_new = False
        for _ in range(2):  # A sealer that failed is replaced by a new one, once.
            try:
                if self._process is None or self._process.poll() is not None:
                    if self._process is not None:
                        self._collect_failure(self._process)
                    self._process = self._new_process()
                    self._is_new = True
                self._say(self._process, before)
                return
            except (OSError, MemoryError, RuntimeError, TypeError, ValueError) as error:
                # An embedded Python has no executable, or another one; one that ends may not fork.
                self._failure = f"no process could be started: {error}"

    def finish(self, timeout: float | None) -> None:
        """Let the sealer end, and wait for it; safe to call more than once."""
        deadline = None if timeout is None else time.monotonic() + timeout
        has_ended = self._end(timeout)
        if has_ended and self._failure is not None and not self._is_new:
            # It failed at what it was asked for before, when the disk was full, say.
            self.start(self._before)
            has_ended = self._end(None if deadline is None else deadline - time.monotonic())
        if has_ended:
            self._close_run()

    def _end(self, timeout: float | None) -> bool:
        """Let the process end; tell whether it has."""
        process = self._process
        if process is None:
            return True
        try:
            with suppress(OSError, ValueError):  # It has ended, or was told before.
                # A forked worker may keep the pipe open, so its end is not enough.
                self._say(process, END)
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            # It goes on by itself; what it has not sealed yet reads the same.
            return False
        self._process = None
        self._collect_failure(process)
        return True

    def _close_run(self) -> None:
        if self._run_fd is not None:
            os.close(self._run_fd)
            self._run_fd = None

    def _say(self, process: subprocess.Popen[bytes], number: int) -> None:
        assert process.stdin is not None
        process.stdin.write(b"%d\n" % number)
        process.stdin.flush()

    def _new_process(self) -> subprocess.Popen[bytes]:
        source = str(Path(__file__).resolve().parents[2])
        fd = self._run_fd
        run = str(self._run.resolve()) if fd is None else "."
        arguments = [run, "--follow", self._folder.name, str(-1 if fd is None else fd), source]
        return subprocess.Popen(
            [sys.executable, "-c", _CODE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=() if fd is None else (fd,),
            # A Ctrl-C at the training must not tear the sealer down with it.
            start_new_session=os.name != "nt",
        )

    def _collect_failure(self, process: subprocess.Popen[bytes]) -> None:
        """Keep what a sealer that has ended said last; one that succeeded has sealed everything."""
        if process.returncode == 0:
            self._failure = None
        elif process.stderr is not None and not process.stderr.closed:
            lines = process.stderr.read().decode(errors="replace").strip().splitlines()
            self._failure = lines[-1] if lines else _ending_of(process.returncode)
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _ending_of(status: int) -> str:
    """Say how a process has ended that said nothing itself."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"its process was ended by {signal.Signals(-status).name}"
    except ValueError:  # Real-time signals have no names.
        return f"its process was ended by signal {-status}"
