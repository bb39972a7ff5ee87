"""Processes that read damaged runs: one forked for each, with limits of time and memory.

`python -m tests.log.damaged ROOT SUFFIX FAMILY NUMBER EVERY` makes runs of every shape below ROOT,
damages a copy of one NUMBER times over, seals every EVERYth, and prints one line of JSON for each:
what was done, and everything that is wrong with how it was read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sonde.exceptions import SondeError
from sonde.log import Damage, Run, open_run
from sonde.log.format.names import stream_name
from sonde.log.sealing.seal import seal_run
from sonde.log.verify import verify_run
from tests.limits import LIMIT_SECONDS

from .conftest import Array, StreamKey, copies
from .mutations import LogFile, Mutation, flip, load, splice
from .shapes import SHAPES, RecordKey, Written, write_shape

_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class Origin:
    """A run that is damaged, and another one of its shape."""

    path: Path
    written: Written
    files: list[LogFile]
    others: list[LogFile]


def make_origins(root: Path, suffix: str) -> dict[str, Origin]:
    """Write two runs of every shape, and check that they are read as they were written."""
    origins = {}
    for shape in SHAPES:
        paths = [root / f"{shape}-{seed}" for seed in (0, 1)]
        written, _ = [write_shape(path, shape, seed) for seed, path in enumerate(paths)]
        if suffix == ".h5":
            for path in paths:
                seal_run(path)
        files, others = [load(path, suffix) for path in paths]
        view = View(written)
        view.look(paths[0], in_xarray=True)
        assert (view.faults, view.damage, view.state) == ([], [], "finished")
        assert view.seen == set(written.visible())
        origins[shape] = Origin(paths[0], written, files, others)
    return origins


class View:
    """What is read of a run, held against what was written into it.

    Attributes:
        faults: What is wrong with the reader.
        damage: What was reported.
        seen: The records that are visible.
        unread: The arrays of them that are not, with the reason.
    """

    def __init__(self, written: Written) -> None:
        self._written = written
        self.faults: list[str] = []
        self.damage: list[Damage] = []
        self.unfinished: list[Damage] = []
        self.refusal: str | None = None
        self.state = "refused"
        self.seen: set[RecordKey] = set()
        self.unread: dict[tuple[RecordKey, StreamKey], str] = {}

    @property
    def is_reported(self) -> bool:
        return bool(self.damage or self.unfinished) or self.refusal is not None

    def look(self, path: Path, *, in_xarray: bool = False) -> None:
        """Read everything there is."""
        try:
            run = open_run(path)
            self.damage = verify_run(path)
            self.unfinished = run.unfinished
        except SondeError as error:
            self.refusal = str(error)
            return
        if not set(run.damage) <= set(self.damage):
            self.faults.append("verify_run lacks damage that the run lists")
        if max(copies(path).values(), default=1) > 1:
            self.faults.append("a record is there twice")
        self.state = run.state
        with contextlib.suppress(SondeError):  # It counts the ids.
            run._repr_html_()
        self._look_at_notes(run)
        for measure in run.measures:
            for source in run.sources(measure):
                self._look_at_log(run, measure, source)
        if in_xarray:
            self._look_at_tree(run)

    def _look_at_notes(self, run: Run) -> None:
        notes = [note for note in run.notes if note["event"] == "missing"]
        if not all(note in self._written.notes for note in notes):
            self.faults.append("a note is not as it was written")
        for said in run.attempts:
            about = self._written.abouts[said["attempt"]]
            if not about.items() <= said.items() and "pid" in said:
                self.faults.append(f"attempt {said['attempt']} is not as it was written")

    def _look_at_log(self, run: Run, measure: str, source: str) -> None:
        log = run[measure, source]
        for step in log.steps:
            key = (measure, source, step)
            self.seen.add(key)
            streams = log.describe(step)
            versions = [
                version
                for version in self._written.records.get(key, [])
                if (version.attributes, version.streams) == (log.attributes(step), streams)
            ]
            if not versions:
                self.faults.append(f"{key} was not written so")
            for layer, name in streams:
                try:
                    values = log.array(name, step, layer, as_stored=True)
                except SondeError as error:
                    self.unread[key, (layer, name)] = str(error)
                    continue
                versions = [v for v in versions if is_identical(values, v.arrays[layer, name])]
                if not versions:
                    self.faults.append(f"{key} {layer} {name} is wrong")
        for layer, name in log.streams:
            self._look_at_stack(run, measure, source, layer, name)
        for origin, name in self._written.tables:
            if origin == source:
                self._look_at_table(run, measure, source, name)

    def _look_at_stack(
        self, run: Run, measure: str, source: str, layer: str | None, name: str
    ) -> None:
        log = run[measure, source]
        steps = log.steps_of(name, layer)
        if len({log.describe(step)[layer, name].shape for step in steps}) != 1:
            return
        try:
            stacked = log.stack(name, steps, layer, as_stored=True)
        except SondeError:
            return
        for step, values in zip(steps, stacked, strict=True):
            versions = self._written.records[measure, source, step]
            if not any(is_identical(values, v.arrays.get((layer, name))) for v in versions):
                self.faults.append(f"{measure} {source} {step} {layer} {name} is wrong in a stack")

    def _look_at_table(self, run: Run, measure: str, source: str, name: str) -> None:
        try:
            values = run[measure, source].table(name, as_stored=True)
        except SondeError:
            return
        if not any(is_identical(values, table) for table in self._written.tables[source, name]):
            self.faults.append(f"table {source} {name} is wrong")

    def _look_at_tree(self, run: Run) -> None:
        try:
            tree = run.to_xarray(as_stored=True)
        except SondeError:
            return
        for (measure, source, step), versions in self._written.records.items():
            if (measure, source, step) not in self.seen:
                continue
            data = tree[f"{measure}/{source}"].to_dataset().sel(step=step)
            for layer, name in versions[0].arrays:
                label = stream_name(layer, name)
                if label in data and not any(
                    np.array_equal(data[label].values, v.arrays[layer, name], equal_nan=True)
                    for v in versions
                    if (layer, name) in v.arrays
                ):
                    self.faults.append(f"{measure} {source} {step} {label} is wrong in xarray")


def is_identical(actual: Array, expected: Array | None) -> bool:
    """Tell whether type, shape and every bit are the same."""
    return (
        expected is not None
        and (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        and actual.tobytes() == expected.tobytes()
    )


def copy_damaged(origin: Path, mutation: Mutation, copy: Path) -> None:
    """Copy a run with its damage; what is whole is linked, as nobody writes into it."""
    for path in origin.rglob("*"):
        name = path.relative_to(origin)
        target = copy / name
        if path.is_dir():
            target.mkdir(parents=True)
        elif name not in mutation.files:
            target.parent.mkdir(exist_ok=True)
            os.link(path, target)
        else:
            content = mutation.files[name]
            if content is not None:
                target.write_bytes(content)


def examine(origin: Origin, copy: Path, rng: random.Random, every: int) -> dict[str, Any]:
    """Read a damaged run, and now and then seal it and read it again."""
    view = View(origin.written)
    view.look(copy, in_xarray=rng.random() < 0.1)
    if origin.files[0].is_journal and rng.randrange(every) == 0:
        view.faults += seal(origin, copy, rng, view)
    return {
        "faults": view.faults,
        "is_reported": view.is_reported,
        "state": view.state,
        "damage": [vars(damage) for damage in view.damage],
        "lost": [str(key) for key in origin.written.visible() if key not in view.seen],
        "unread": list(view.unread.values()),
    }


def seal(origin: Origin, copy: Path, rng: random.Random, before: View) -> Iterator[str]:
    """Seal a damaged run and read it again; yield what is wrong."""
    try:
        # The journals of a writer that lives are sealed without a look at the arrays of records.
        seal_run(copy, before=rng.choice([None, 10**12]))
    except SondeError as error:
        yield f"sealing is refused: {error}"
    after = View(origin.written)
    after.look(copy, in_xarray=rng.random() < 0.1)
    yield from (f"sealed: {fault}" for fault in after.faults)
    is_whole = after.seen >= set(origin.written.visible()) and not after.unread
    # Damaged zeros between two arrays are of no record, and not copied.
    # What was cut off was never committed, and goes.
    if (before.damage or before.refusal) and not (after.is_reported or is_whole):
        yield "sealing made the damage disappear"
    if not before.seen <= after.seen or after.state != before.state:
        yield "sealing changed what is there"


def fork(
    origin: Origin, mutation: Mutation, copy: Path, rng: random.Random, every: int
) -> dict[str, Any]:
    """Examine a damaged run in a process of its own."""
    copy_damaged(origin.path, mutation, copy)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (_LIMIT_BYTES, _LIMIT_BYTES))
        signal.alarm(LIMIT_SECONDS)
        try:
            outcome = examine(origin, copy, rng, every)
        except BaseException:
            outcome = {"faults": [traceback.format_exc()]}
        with os.fdopen(writing, "w") as pipe:
            json.dump(outcome, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        printed = pipe.read()
    status = os.waitpid(pid, 0)[1]
    shutil.rmtree(copy)
    outcome = {"is_reported": False, "state": None, "damage": [], "lost": [], "unread": []}
    if status:
        return {**outcome, "faults": [f"ended with {os.waitstatus_to_exitcode(status)}"]}
    return {**outcome, **json.loads(printed)}


def damage_all(
    root: Path, suffix: str, family: str, num: int, every: int
) -> Iterator[dict[str, Any]]:
    """Damage runs of every shape in turn; yield what became of each."""
    origins = make_origins(root, suffix)
    shapes = list(SHAPES)
    for number in range(num):
        rng = random.Random(f"{suffix} {family} {number}")
        shape = shapes[number % len(shapes)]
        origin = origins[shape]
        if family == "flips":
            mutation = flip(rng, origin.files)
        else:
            mutation = splice(rng, origin.files, origin.others)
        outcome = fork(origin, mutation, root / "copy", rng, every)
        yield {
            "number": number,
            **vars(mutation),
            "what": f"{shape}: {mutation.what}",
            "files": [str(path) for path in mutation.files],
            "near_files": [str(path) for path in neighbours(origin.files, mutation)],
            "is_last_attempt": origin.files[-1].path.parent in {p.parent for p in mutation.files},
            **outcome,
        }


def neighbours(files: list[LogFile], mutation: Mutation) -> Iterator[Path]:
    """Yield the files that come right behind those touched; or all, if they are at odds."""
    for file, following in itertools.pairwise(file.path for file in files):
        if file.parent == following.parent:
            if file in mutation.files or mutation.is_foreign:
                yield following
            if mutation.is_foreign:
                yield file


def make_deterministic() -> None:
    """Make the same files in every process: no random token, no time, no process id."""
    rng, clock = random.Random(0), itertools.count(1_700_000_000)
    secrets.randbits = rng.getrandbits  # type: ignore[assignment]  # the tokens of the writers
    time.time = lambda: float(next(clock))
    os.getpid = lambda: 4321
    os.fsync = lambda fd: None  # What a process wrote outlives it; forcing takes long.


if __name__ == "__main__":
    make_deterministic()
    suffix, family, num, every = sys.argv[2:]
    for line in damage_all(Path(sys.argv[1]), suffix, family, int(num), int(every)):
        print(json.dumps(line), flush=True)
