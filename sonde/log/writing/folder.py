"""The folder a writer writes into: whether it is still its own, and made again once deleted."""

from __future__ import annotations

import os
from pathlib import Path

from sonde.log.format.files import lock_path, unlock


class WriterFolder:
    """The folder one writer made, in a run directory that was there before.

    What has their names later may be of another training, which was started after somebody deleted
    this one, and is left alone. Both are kept open: else the system could give their numbers, by
    which they are known, to others.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run = _keep_open(path.parent)
        self._folder = _keep_open(path)
        self._lock: int | None = None

    def restore(self) -> bool:
        """Make the folder again if it was deleted.

        Returns:
            Whether it was.

        Raises:
            FileNotFoundError: If the run directory is gone, too.
            FileExistsError: If another recorder has made a folder of that name.
            OSError: If it cannot be made.
        """
        if not _is_at(self._run, self.path.parent):
            raise FileNotFoundError(f"{self.path.parent} was deleted or moved")
        if _is_at(self._folder, self.path):
            return False
        try:
            self.path.mkdir()
        except FileExistsError:
            raise FileExistsError(f"{self.path} is another recorder's now") from None
        self._close_folder()
        self._folder = _keep_open(self.path)
        # The lock that the writer took went with the folder.
        self._lock = lock_path(self.path)
        return True

    def close(self) -> None:
        """Let go of the folder and of the run directory."""
        self._close_folder()
        if self._run is not None:
            os.close(self._run)
            self._run = None

    def _close_folder(self) -> None:
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None


def _keep_open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and deletes none in which a file is open.
        return None


def _is_at(fd: int | None, path: Path) -> bool:
    """Tell whether a path still leads to the folder that is open, where that can be known."""
    if fd is None:
        return path.is_dir()
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
