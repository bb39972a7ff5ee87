"""Damage: what bit rot, a torn copy or a mixed-up folder do to the files of a run."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sonde.log.format.frames import FILE_HEADER_BYTES, describe
from sonde.log.format.payload import storage_dtype
from sonde.log.reading.segment import Segment
from sonde.log.reading.segment_file import identify

from .files import frame_bounds, frames_of, journals_of, segments_of

TRAILER_BYTES = 52
_FRAME_FIELDS = [(8, "<I"), (12, "<I"), (16, "<Q"), (24, "<Q"), (32, "<Q"), (40, "<q"), (52, "<I")]
_FILE_FIELDS = [(8, "<I"), (12, "<I"), (16, "<Q"), (24, "<Q"), (32, "<I"), (36, "<I")]
_TRAILER_FIELDS = [(8, "<I"), (16, "<Q"), (24, "<Q"), (32, "<I"), (36, "<Q"), (44, "<I")]


@dataclass(frozen=True)
class LogFile:
    """A file of a run, before it is damaged.

    Attributes:
        path: The file, relative to the run.
        content: Its bytes.
        bounds: Where its frames or datasets start and end.
        units: What lies from where to where, as reports name it: payloads of frames, arrays.
        is_last: No later file of its attempt follows.
        is_only: It is the only one of its attempt.
    """

    path: Path
    content: bytes
    bounds: list[int]
    units: list[tuple[int, int, str]]
    is_last: bool
    is_only: bool

    @property
    def is_journal(self) -> bool:
        return self.path.suffix == ".journal"


@dataclass(frozen=True)
class Mutation:
    """What was done to a run.

    Attributes:
        what: A description for people.
        files: What the touched files hold now, None for one that is gone.
        position: Where a single byte was changed.
        unit: What lies there.
        looks_killed: The attempt looks as if it was killed there, so that nothing is wrong with the
            files that are left.
        is_foreign: A file is another writer's; where one stands against one, nobody can tell which.
    """

    what: str
    files: dict[Path, bytes | None]
    position: int | None = None
    unit: str | None = None
    looks_killed: bool = False
    is_foreign: bool = False


def load(run: Path, suffix: str) -> list[LogFile]:
    """Return the journals or the segments of a run, in order."""
    paths = journals_of(run) + segments_of(run)
    ends = {path.parent: path for path in sorted(paths)}
    return [
        LogFile(
            path.relative_to(run),
            path.read_bytes(),
            *(_parts_of_journal(path) if suffix == ".journal" else _parts_of_segment(path)),
            ends[path.parent] == path,
            sum(other.parent == path.parent for other in paths) == 1,
        )
        for path in paths
        if path.suffix == suffix
    ]


def _parts_of_journal(path: Path) -> tuple[list[int], list[tuple[int, int, str]]]:
    ends = [end for _, end in frame_bounds(path)]
    frames = zip(frames_of(path), ends, strict=True)
    units = [(frame.payload_offset, end, describe(frame)) for frame, end in frames]
    return [FILE_HEADER_BYTES, *ends], [(0, FILE_HEADER_BYTES, "the file header"), *units]


def _parts_of_segment(path: Path) -> tuple[list[int], list[tuple[int, int, str]]]:
    size = path.stat().st_size
    bounds, units = {size - TRAILER_BYTES, size}, []
    for group in Segment(identify(path)).groups:
        for stream, (start, num_bytes) in zip(
            group.streams.values(), group.stretches(), strict=True
        ):
            bounds |= {start, start + num_bytes}
            itemsize = storage_dtype(stream.dtype).itemsize
            for row, shape in enumerate(group.shapes(stream)):
                end = start + itemsize * math.prod(shape)
                number, step = group.sequences[row], group.steps[row]
                units.append((start, end, f"record {number} ({group.measure}, step {step})"))
                start = end
    return sorted(bounds), units


def flip(rng: random.Random, files: Sequence[LogFile]) -> Mutation:
    """Change one bit or one byte of one file."""
    file = _choose(rng, files)
    content = bytearray(file.content)
    position = rng.randrange(len(content))
    if rng.random() < 0.3:  # In a header, however small it is beside the arrays.
        position = min(rng.choice(file.bounds) + rng.randrange(100), len(content) - 1)
    mask = 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    content[position] ^= mask
    what = f"byte {position} of {file.path} ^ {mask:#x}"
    unit = next((name for start, end, name in file.units if start <= position < end), None)
    return Mutation(what, {file.path: bytes(content)}, position, unit)


def splice(rng: random.Random, files: Sequence[LogFile], others: Sequence[LogFile]) -> Mutation:
    """Cut, move, mix or replace a stretch of a file, or a whole one.

    Args:
        rng: Decides what.
        files: The files of the run.
        others: Those of another run of the same shape.
    """
    while True:
        mutation = rng.choice(_SPLICES)(rng, files, others)
        if mutation is not None:
            return mutation


def _choose(rng: random.Random, files: Sequence[LogFile]) -> LogFile:
    return rng.choice(files)


def _stretch(rng: random.Random, file: LogFile, start: int = 0, end: int = 0) -> tuple[int, int]:
    """Return a stretch of a file, every other time from the start of a unit to the end of one."""
    first, last = start, len(file.content) - end
    inner = [bound for bound in file.bounds if first <= bound <= last]
    if rng.random() < 0.5 and len(inner) > 1:
        begin, stop = sorted(rng.sample(inner, 2))
        return begin, stop
    # Small ones as often as large ones.
    size = min(last - first, int(2 ** rng.uniform(0, 22)))
    begin = rng.randrange(first, last - size + 1)
    return begin, begin + size


def _changed(file: LogFile, content: bytes, what: str) -> Mutation | None:
    if content == file.content:
        return None
    is_killed = (
        file.is_journal
        and file.is_last
        and file.content.startswith(content)
        and len(content) in file.bounds
    )
    return Mutation(f"{file.path}: {what}", {file.path: content}, looks_killed=is_killed)


def _zero(rng: random.Random, files: Sequence[LogFile], _: Sequence[LogFile]) -> Mutation | None:
    file = _choose(rng, files)
    start, end = _stretch(rng, file)
    content = file.content[:start] + bytes(end - start) + file.content[end:]
    return _changed(file, content, f"bytes {start} to {end} zeroed")


def _source(
    rng: random.Random, files: Sequence[LogFile], others: Sequence[LogFile]
) -> tuple[LogFile, bytes, str]:
    """Return a file and a stretch to put into it, of itself or of the one of the same name."""
    position = rng.randrange(len(files))
    file = files[position]
    is_own = rng.random() < 0.5 or len(files) != len(others)
    origin = file if is_own else others[position]
    start, end = _stretch(rng, origin)
    of = "itself" if is_own else "another run"
    return file, origin.content[start:end], f"bytes {start} to {end} of {of}"


def _overwrite(
    rng: random.Random, files: Sequence[LogFile], others: Sequence[LogFile]
) -> Mutation | None:
    file, block, what = _source(rng, files, others)
    # What brings the header or trailer of another file along is that file from then on.
    head, tail = (FILE_HEADER_BYTES, 0) if file.is_journal else (0, TRAILER_BYTES)
    at, _ = _stretch(rng, file, head, tail)
    block = block[: len(file.content) - tail - at]
    content = file.content[:at] + block + file.content[at + len(block) :]
    return _changed(file, content, f"{what} over byte {at}")


def _insert(
    rng: random.Random, files: Sequence[LogFile], others: Sequence[LogFile]
) -> Mutation | None:
    file, block, what = _source(rng, files, others)
    head, tail = (FILE_HEADER_BYTES, 0) if file.is_journal else (0, TRAILER_BYTES)
    at = rng.choice(_stretch(rng, file, head, tail))
    if rng.random() < 0.3:
        block, what = _noise(rng), "noise"
    content = file.content[:at] + block + file.content[at:]
    return _changed(file, content, f"{what} inserted at {at}")


def _remove(rng: random.Random, files: Sequence[LogFile], _: Sequence[LogFile]) -> Mutation | None:
    file = _choose(rng, files)
    start, end = _stretch(rng, file)
    content = file.content[:start] + file.content[end:]
    return _changed(file, content, f"bytes {start} to {end} removed")


def _transpose(
    rng: random.Random, files: Sequence[LogFile], _: Sequence[LogFile]
) -> Mutation | None:
    file = _choose(rng, files)
    (a, b), (c, d) = sorted((_stretch(rng, file), _stretch(rng, file)))
    b = min(b, c)
    content = file.content
    moved = content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]
    return _changed(file, moved, f"bytes {a} to {b} and {c} to {d} exchanged")


def _truncate(
    rng: random.Random, files: Sequence[LogFile], _: Sequence[LogFile]
) -> Mutation | None:
    file = _choose(rng, files)
    size = rng.choice([rng.randrange(len(file.content)), rng.choice(file.bounds)])
    return _changed(file, file.content[:size], f"cut to {size} bytes")


def _append(rng: random.Random, files: Sequence[LogFile], others: Sequence[LogFile]) -> Mutation:
    file, block, what = _source(rng, files, others)
    kind = rng.randrange(3)
    if kind == 0:
        block, what = _noise(rng), "noise"
    if kind == 1:
        block, what = bytes(rng.randrange(1, 100)), "zeros"
    return Mutation(f"{file.path}: {what} appended", {file.path: file.content + block})


def _noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 500))


def _swap(rng: random.Random, files: Sequence[LogFile], _: Sequence[LogFile]) -> Mutation | None:
    if len(files) < 2:
        return None
    a, b = rng.sample(files, 2)
    return Mutation(f"{a.path} and {b.path} swapped", {a.path: b.content, b.path: a.content})


def _exchange(
    rng: random.Random, files: Sequence[LogFile], others: Sequence[LogFile]
) -> Mutation | None:
    """Put the file of another run in the place of one."""
    if len(files) != len(others):
        return None
    position = rng.randrange(len(files))
    file, other = files[position], others[position]
    # Alone, it is the log of that other run, whole and undamaged.
    if file.is_only:
        return None
    what = f"{file.path} replaced by another run's"
    return Mutation(what, {file.path: other.content}, is_foreign=True)


def _delete(rng: random.Random, files: Sequence[LogFile], _: Sequence[LogFile]) -> Mutation:
    file = _choose(rng, files)
    return Mutation(f"{file.path} deleted", {file.path: None}, looks_killed=file.is_last)


def _set_field(
    rng: random.Random, files: Sequence[LogFile], _: Sequence[LogFile]
) -> Mutation | None:
    """Change a field of a header or trailer, without its checksum."""
    file = _choose(rng, files)
    base, fields = len(file.content) - TRAILER_BYTES, _TRAILER_FIELDS
    if file.is_journal:
        base, fields = 0, _FILE_FIELDS
        if rng.random() < 0.8:
            base, fields = rng.choice(file.bounds[:-1]), _FRAME_FIELDS
    offset, kind = rng.choice(fields)
    content = bytearray(file.content)
    (old,) = struct.unpack_from(kind, content, base + offset)
    bits = 8 * struct.calcsize(kind)
    new = rng.choice([0, 1, old + 1, old - 1, 2 * old, 2 ** (bits - 1), 2**bits - 1, 2**31 - 1])
    struct.pack_into(kind.upper(), content, base + offset, new % 2**bits)
    return _changed(file, bytes(content), f"the field at {base + offset} set to {new}")


_SPLICES: list[
    Callable[[random.Random, Sequence[LogFile], Sequence[LogFile]], Mutation | None]
] = [
    _zero, _overwrite, _insert, _remove, _transpose, _truncate, _append,
    _swap, _exchange, _delete, _set_field,
]  # fmt: skip
