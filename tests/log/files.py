"""The files of a run: its journals, its segments, and the frames in a journal."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from sonde.log.format.files import journals, segments, writer_folders
from sonde.log.format.frames import Frame
from sonde.log.reading.scan import scan_journal


def journals_of(path: Path) -> list[Path]:
    """Return every journal of a run."""
    return [journal for _, _, folder in writer_folders(path) for _, journal in journals(folder)]


def journal_of(path: Path) -> Path:
    """Return the only journal of a run."""
    (journal,) = journals_of(path)
    return journal


def segments_of(path: Path) -> list[Path]:
    """Return every segment of a run."""
    return [entry[2] for _, _, folder in writer_folders(path) for entry in segments(folder)]


def segment_of(path: Path) -> Path:
    """Return the only segment of a run."""
    (segment,) = segments_of(path)
    return segment


def frames_of(journal: Path) -> list[Frame]:
    """Return the valid frames of a journal."""
    with journal.open("rb") as file:
        return [item for item in scan_journal(file.fileno(), "j") if isinstance(item, Frame)]


def frame_bounds(journal: Path) -> list[tuple[int, int]]:
    """Return (start, end) of every frame of a whole journal, in bytes."""
    starts = [40]
    for frame in frames_of(journal):
        end = max((e.offset + e.num_bytes for e in frame.arrays), default=0)
        starts.append(frame.payload_offset + -(-end // 8) * 8)
    assert starts[-1] == journal.stat().st_size
    return list(pairwise(starts))


def overwrite(path: Path, content: bytes, version: int) -> None:
    """Replace what a file holds; `version` sets its time of change, so that no two are alike."""
    path.write_bytes(content)
    os.utime(path, ns=(version, version))
