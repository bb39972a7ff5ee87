"""Starting the sealer: another process that turns closed journals into segments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# The folder of sonde comes last, so that no package beside it shadows the standard library, and
# the working folder, which -c puts first, not at all.
_CODE = (
    "import sys; sys.path[:1] = []; sys.path.append(sys.argv.pop()); "
    "from sonde.log.seal import main; main()"
)


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
        self._failure: str | None = None

    @property
    def problem(self) -> str | None:
        """Why journals were left unsealed, once a sealer has ended."""
        failure = self._failure
        if self._process is not None and self._process.returncode:
            failure = f"exit status {self._process.returncode}"
        if failure is None:
            return None
        return (
            f"journals were not sealed into HDF5 ({failure}); they stay and read the same, and "
            f"`sonde seal {self._run}` tries again"
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
            self._failure = None
        except (OSError, TypeError, ValueError) as error:
            # An embedded Python has no executable, or another one.
            self._process = None
            self._failure = f"no process could be started: {error}"

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
