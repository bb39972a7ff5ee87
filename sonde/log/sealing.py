"""Starting the sealer: another process that turns closed journals into segments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Appended, not prepended as PYTHONPATH would be, so that no package beside sonde shadows the
# standard library of the child.
_CODE = "import sys; sys.path.append(sys.argv.pop()); from sonde.log.seal import main; main()"


class Sealing:
    """Starts sealers for one writer, one at a time.

    Args:
        run: The run directory.
        folder: The writer's folder.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self._run = run
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._sealed_before = 0
        self._wanted_before = 0

    @property
    def problem(self) -> str | None:
        """Why journals were left unsealed, once a sealer has ended."""
        if self._process is None or not self._process.returncode:
            return None
        return (
            f"sealing failed with exit status {self._process.returncode}; the journals stay and "
            f"read the same, and `sonde seal {self._run}` says why"
        )

    def start(self, before: int) -> None:
        """Seal every journal whose frames are numbered below `before`, if no sealer is running."""
        self._wanted_before = before
        if self._process is not None and self._process.poll() is None:
            return
        source = str(Path(__file__).resolve().parents[2])
        arguments = [
            str(self._run.resolve()),
            "--folder",
            self._folder.name,
            "--before",
            str(before),
        ]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, *arguments, source],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A Ctrl-C at the training must not tear the sealer down with it.
                start_new_session=os.name != "nt",
            )
            self._sealed_before = before
        except OSError:
            # Without a sealer the journals stay, and read the same.
            self._process = None

    def finish(self, timeout: float | None) -> None:
        """Wait for the running sealer, then seal what was closed meanwhile."""
        self._wait(timeout)
        if self._sealed_before < self._wanted_before:
            self.start(self._wanted_before)
            self._wait(timeout)

    def _wait(self, timeout: float | None) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            # It goes on by itself; what it has not sealed yet reads the same.
            return
