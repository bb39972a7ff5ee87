"""A disk that loses power: what was done to it, and what it may hold afterwards.

`Tape` takes down what is done below a folder, as a list of events; `Disk` replays them, and draws
at any point one of the states in which a loss of power may leave it. What an fsync promises is
kept, and nothing else: after that of a file its bytes are there, after that of a folder the names
in it are. Of all that came later any part may be lost, in any order: each block of a file, its
size, each name. A rename alone is never half done in that a name it replaces is gone.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

_FSYNC_SECONDS = 0.001  # Before and after it counts: a disk takes its time, other threads go on.

ROOT = 0
"""The node of the folder a tape watches. A node is a file or folder, whatever its name."""


@dataclass(frozen=True)
class Content:
    """A file changed: what it holds now."""

    node: int
    data: bytes


@dataclass(frozen=True)
class Named:
    """A node got a name in a folder: it is new, or was named `formerly`."""

    folder: int
    name: str
    node: int
    is_folder: bool
    formerly: str | None = None


@dataclass(frozen=True)
class Unnamed:
    """A name in a folder was deleted."""

    folder: int
    name: str


@dataclass(frozen=True)
class Forced:
    """An fsync of a file or folder came back."""

    node: int


@dataclass(frozen=True)
class Promised:
    """Something was announced as safe from a loss of power: a record by its number, a file."""

    what: frozenset[int | str]


Event = Content | Named | Unnamed | Forced | Promised
State = dict[Path, bytes | None]
"""What each file of a disk holds, by its path; None for a folder."""


class Tape:
    """Takes down what is done below a folder, by any thread of this process.

    After each call that changes something the whole folder is looked at, so that a library that
    writes past Python, such as libhdf5, is seen too: at the next such call.

    Args:
        folder: An empty folder.
        monkeypatch: Replaces the calls for as long as is recorded. None of them reaches the disk:
            an fsync is taken down and returns.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Event] = []
        self._folder = folder
        self._nodes = {folder.stat().st_ino: ROOT}
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self._contents: dict[int, bytes] = {}
        self._num_nodes = 1
        self._lock = threading.RLock()
        for home, name in (
            (os, "open"),
            (os, "pwritev"),
            (os, "ftruncate"),
            (Path, "mkdir"),
            (Path, "open"),
            (Path, "replace"),
            (Path, "unlink"),
        ):
            monkeypatch.setattr(home, name, self._watched(getattr(home, name)))
        monkeypatch.setattr(os, "fsync", self._fsync)

    def promise(self, what: Iterable[int | str]) -> None:
        """Take down that something was announced as safe from now on."""
        with self._lock:
            self.events.append(Promised(frozenset(what)))

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:  # whatever the original takes and returns
            with self._lock:
                try:
                    return original(*args, **kwargs)
                finally:
                    self._look(self._folder, ROOT)

        return call

    def _fsync(self, fd: int) -> None:
        time.sleep(_FSYNC_SECONDS)
        with self._lock:
            self._look(self._folder, ROOT)
            node = self._nodes.get(os.fstat(fd).st_ino)
            if node is not None:
                self.events.append(Forced(node))
        time.sleep(_FSYNC_SECONDS)

    def _look(self, path: Path, folder: int) -> None:
        known = self._names[folder]
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        gone = set(known).difference(entry.name for entry in entries)
        for entry in entries:
            node = self._nodes.setdefault(entry.inode(), self._num_nodes)
            if node == self._num_nodes:
                self._num_nodes += 1
            if known.get(entry.name) != node:
                formerly = next((name for name in gone if known[name] == node), None)
                self.events.append(Named(folder, entry.name, node, entry.is_dir(), formerly))
                known[entry.name] = node
                if formerly is not None:
                    gone.remove(formerly)
                    del known[formerly]
        for name in sorted(gone):
            self.events.append(Unnamed(folder, name))
            # Its inode may be that of the next file.
            node = known.pop(name)
            self._nodes = {inode: other for inode, other in self._nodes.items() if other != node}
        for entry in entries:
            node = known[entry.name]
            if entry.is_dir():
                self._names.setdefault(node, {})
                self._look(path / entry.name, node)
            else:
                self._read(path / entry.name, node)

    def _read(self, path: Path, node: int) -> None:
        # Not by a call that is watched.
        with open(path, "rb", buffering=0) as file:
            data = file.readall()
        if data != self._contents.get(node, b""):
            self._contents[node] = data
            self.events.append(Content(node, data))


@dataclass
class _Folder:
    """The names that are safe, and what was done to them since."""

    safe: dict[str, int] = field(default_factory=dict)
    pending: list[Named | Unnamed] = field(default_factory=list)


class Disk:
    """What a disk has been told, and how much of it is safe.

    Attributes:
        promised: What was announced as safe.
    """

    def __init__(self) -> None:
        self.promised: frozenset[int | str] = frozenset()
        self._folders = {ROOT: _Folder()}
        # What a file held at its last fsync, and every content since.
        self._versions: dict[int, list[bytes]] = {}

    def apply(self, event: Event) -> None:
        """Take in what was done next."""
        if isinstance(event, Promised):
            self.promised |= event.what
        elif isinstance(event, Content):
            self._versions[event.node].append(event.data)
        elif isinstance(event, Forced):
            self._force(event.node)
        else:
            self._folders[event.folder].pending.append(event)
            if isinstance(event, Named) and event.is_folder:
                self._folders.setdefault(event.node, _Folder())
            elif isinstance(event, Named):
                self._versions.setdefault(event.node, [b""])

    def safe_files(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) of each file whose fsync and that of its folder came back."""
        for folder in self._folders.values():
            for name, node in folder.safe.items():
                if node in self._versions and len(self._versions[node]) == 1:
                    yield name, self._versions[node][0]

    def lose_power(self, rng: random.Random, block_bytes: int) -> State:
        """Draw one of the states the disk may be in if it loses power now.

        Args:
            rng: What to draw with.
            block_bytes: A file loses its bytes in blocks of this size.
        """
        state: State = {}
        self._draw(Path(), ROOT, rng, block_bytes, state)
        return state

    def _force(self, node: int) -> None:
        if node in self._folders:
            folder = self._folders[node]
            folder.safe = _renamed(folder.safe, folder.pending)
            folder.pending = []
        else:
            self._versions[node] = self._versions[node][-1:]

    def _draw(
        self, path: Path, node: int, rng: random.Random, block_bytes: int, state: State
    ) -> None:
        if node not in self._folders:
            state[path] = _draw_content(self._versions[node], rng, block_bytes)
            return
        state[path] = None
        folder = self._folders[node]
        for name, child in _draw_names(folder, rng).items():
            self._draw(path / name, child, rng, block_bytes, state)


def materialise(state: State, folder: Path) -> None:
    """Make the files of a state in a folder that does not exist."""
    for path, content in state.items():
        if content is None:
            os.mkdir(folder / path)
        else:
            with open(folder / path, "xb", buffering=0) as file:
                file.write(content)


def _renamed(names: dict[str, int], done: Iterable[Named | Unnamed]) -> dict[str, int]:
    names = dict(names)
    for event in done:
        if isinstance(event, Unnamed):
            names.pop(event.name, None)
            continue
        names[event.name] = event.node
        if event.formerly is not None:
            names.pop(event.formerly, None)
    return names


def _draw_names(folder: _Folder, rng: random.Random) -> dict[str, int]:
    done: list[Named | Unnamed] = []
    for event, is_kept in zip(folder.pending, _draw_kept(len(folder.pending), rng), strict=True):
        if is_kept and isinstance(event, Named) and event.formerly is not None:
            # The new name may be there and the old one too, but never neither.
            formerly = rng.choice((event.formerly, event.formerly, None))
            done.append(Named(event.folder, event.name, event.node, event.is_folder, formerly))
        elif is_kept:
            done.append(event)
    return _renamed(folder.safe, done)


def _draw_content(versions: Sequence[bytes], rng: random.Random, block_bytes: int) -> bytes:
    if len(versions) == 1:
        return versions[0]
    sizes = [len(version) for version in versions]
    size = rng.choice((sizes[0], sizes[-1], sizes[-1], rng.randint(min(sizes), max(sizes))))
    blocks = []
    starts = range(0, size, block_bytes)
    for start, is_kept in zip(starts, _draw_kept(len(starts), rng), strict=True):
        # A block that was written several times may be as it was at any of them.
        version = versions[-1] if is_kept else rng.choice((versions[0], rng.choice(versions)))
        blocks.append(version[start : start + block_bytes].ljust(block_bytes, b"\0"))
    return b"".join(blocks)[:size]


def _draw_kept(number: int, rng: random.Random) -> list[bool]:
    """Draw which of some changes are kept: often all or none, a first part, or all but one."""
    kind = rng.choice(("all", "none", "first", "last", "but one", "any", "any"))
    cut = rng.randint(0, number)
    if kind == "but one":
        return [position != cut for position in range(number)]
    if kind == "any":
        return [rng.random() < 0.5 for _ in range(number)]
    first = {"all": number, "none": 0, "first": cut, "last": cut}[kind]
    return [(position < first) != (kind == "last") for position in range(number)]
