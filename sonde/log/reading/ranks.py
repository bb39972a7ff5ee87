"""Ranks: what the processes of a training recorded, joined by step and by example id.

Each rank writes a log of its own. Where all ranks recorded the same examples of a source, one of
them is read. Where each recorded its own, a step counts once every rank has recorded it, and its
arrays are put together along the axis `example`, in the order of the ids. What is missing or
cannot be joined is a finding, which readers see among the notes of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import DamageError

from .index import WriterLog
from .parts import Record, StreamKey

Key = tuple[str, str]
"""A measure and its source."""

Ids = npt.NDArray[np.int64]

ID: StreamKey = (None, "id")
"""The stream in which a record of live examples names them; other sources have a table instead."""


@dataclass(frozen=True)
class Share:
    """What one rank recorded of a measure and source at a step."""

    writer: WriterLog
    record: Record

    def ids(self, source: str) -> Ids | None:
        """Return the ids of its examples, int64 [examples], or None if it names none."""
        if self.record.part.has(self.record.row, ID):
            return self.record.part.read(self.record.row, ID)
        return table_ids(self.writer, source)


Shares = tuple[Share, ...]
"""What counts of a step: one share, or one of each rank, in the order of the ranks."""


@dataclass(frozen=True)
class Joined:
    """The records of a run that count.

    Attributes:
        records: By measure and source, then by step, in order.
        findings: What is missing or was not joined, as notes.
    """

    records: dict[Key, dict[int, Shares]]
    findings: list[dict[str, Any]]


def join(writers: Sequence[WriterLog], rank: int | None = None) -> Joined:
    """Choose what counts among all that was recorded.

    An attempt that resumed at a step supersedes what earlier attempts recorded from there on, on
    every rank; one that recorded nothing supersedes nothing.

    Args:
        writers: All writers of the run.
        rank: Take only what this rank recorded.
    """
    found: dict[Key, dict[int, Shares]] = {}
    findings: list[dict[str, Any]] = []
    attempts = sorted({writer.attempt for writer in writers})
    for attempt in attempts:
        those = [w for w in writers if w.attempt == attempt and w.parts]
        if not those:
            continue
        resume_step = _resume_step(those)
        for steps in found.values():
            for step in [step for step in steps if step >= resume_step]:
                del steps[step]
        findings = [f for finding in findings if (f := _before(finding, resume_step)) is not None]
        taken = those if rank is None else [w for w in those if w.rank == rank]
        if rank is None:
            findings += _missing_ranks(attempt, [w for w in writers if w.attempt == attempt])
        for key in dict.fromkeys(key for writer in taken for key in writer.parts):
            shares = {w.rank: _latest(w, key) for w in taken if key in w.parts}
            found.setdefault(key, {}).update(_join_ranks(key, shares, findings))
    return Joined({key: dict(sorted(s.items())) for key, s in found.items() if s}, findings)


def table_ids(writer: WriterLog, source: str) -> Ids | None:
    """Return the ids of a source's examples as one writer states them; None if it has none."""
    table = writer.tables.get(source)
    return None if table is None or "id" not in table.arrays else table.arrays["id"]()


def merge_ids(parts: Iterable[Ids]) -> tuple[Ids, npt.NDArray[np.intp]]:
    """Return the ids of several ranks, sorted, each once, and where each stands in their row.

    A sampler that pads the last batch gives an example to two ranks; the first one counts.
    """
    merged, positions = np.unique(np.concatenate(list(parts)), return_index=True)
    return merged, positions


def _resume_step(writers: Sequence[WriterLog]) -> int:
    stated = [writer.resume_step for writer in writers if writer.about]
    return min(stated or [writer.resume_step for writer in writers])


def _before(finding: dict[str, Any], step: int) -> dict[str, Any] | None:
    """Return what is left of a finding once its steps from one on are superseded."""
    if "steps" not in finding:
        return finding
    steps = [at for at in finding["steps"] if at < step]
    return {**finding, "step": steps[0], "steps": steps} if steps else None


def _latest(writer: WriterLog, key: Key) -> dict[int, Share]:
    """Return what a writer recorded by step; of a step recorded twice, the later record."""
    records = sorted(
        (record for part in writer.parts[key] for record in part.records),
        key=lambda record: record.sequence,
    )
    return {record.step: Share(writer, record) for record in records}


def _join_ranks(
    key: Key, by_rank: Mapping[int, dict[int, Share]], findings: list[dict[str, Any]]
) -> dict[int, Shares]:
    """Return the shares of each step that counts, and report the others."""
    ranks = sorted(by_rank)
    if len(ranks) == 1:
        return {step: (share,) for step, share in by_rank[ranks[0]].items()}
    steps = sorted({step for shares in by_rank.values() for step in shares})
    joinable = _joinable_ranks(key, by_rank, findings)
    if not joinable:
        return {s: (next(by_rank[r][s] for r in ranks if s in by_rank[r]),) for s in steps}
    complete: dict[int, Shares] = {}
    missing: dict[tuple[int, ...], list[int]] = {}
    for step in steps:
        lacking = tuple(rank for rank in joinable if step not in by_rank[rank])
        if not lacking:
            complete[step] = tuple(by_rank[rank][step] for rank in joinable)
        elif len(joinable) > 1 and not all(_is_behind(by_rank[rank], step) for rank in lacking):
            missing.setdefault(lacking, []).append(step)
    for lacking, at in missing.items():
        reason = (
            f"rank {_listed(lacking)} did not record what rank "
            f"{_listed(r for r in joinable if r not in lacking)} did; these steps are left out, "
            "run.rank(…) reads them"
        )
        findings.append(_finding("incomplete", key, at[0], steps=at, reason=reason))
    return complete


def _joinable_ranks(
    key: Key, by_rank: Mapping[int, dict[int, Share]], findings: list[dict[str, Any]]
) -> list[int]:
    """Return the ranks that have to be there at a step; none if any one of them will do."""
    first = {rank: next(iter(shares.values())) for rank, shares in by_rank.items()}
    ids = {rank: _readable_ids(share, key[1]) for rank, share in first.items()}
    named = {rank: values for rank, values in ids.items() if values is not None}
    unnamed = sorted(ids.keys() - named.keys())
    if named and unnamed:
        reason = f"rank {_listed(unnamed)} does not say which examples it recorded; it is left out"
        findings.append(_finding("unnamed examples", key, -1, reason=reason))
    lowest = min(named or ids)
    lives = any(share.record.part.has(share.record.row, ID) for share in first.values())
    if named and (lives or not all(np.array_equal(v, named[lowest]) for v in named.values())):
        return sorted(named)
    tables = [first[rank].writer.tables.get(key[1]) for rank in named]
    digests = {table.attributes.get("input_digest") for table in tables if table is not None}
    what = "values of its own" if not named else "other inputs under the same ids"
    if is_same := len(digests) == 1:
        what = "the same examples"
    others = _listed(rank for rank in sorted(named or ids) if rank != lowest)
    reason = f"rank {others} recorded {what}; rank {lowest} is read, run.rank(…) reads the others"
    findings.append(_finding("other ranks", key, -1, reason=reason))
    # A rank of the same examples stands in where another lacks a step.
    return [] if is_same and not unnamed else [lowest]


def _readable_ids(share: Share, source: str) -> Ids | None:
    try:
        return share.ids(source)
    except DamageError:  # Reported with the file it is in.
        return None


def _is_behind(shares: Mapping[int, Share], step: int) -> bool:
    """Tell whether a rank that still writes has not come to a step yet."""
    newest = max(shares)
    return newest < step and shares[newest].writer.is_live


def _missing_ranks(attempt: int, writers: Sequence[WriterLog]) -> list[dict[str, Any]]:
    world_size = max(int(writer.about.get("world_size") or 0) for writer in writers)
    # A rank may leave it to rank 0 to record what all of them evaluate.
    there = {w.rank for w in writers if w.parts or w.about.get("records_nothing")}
    missing = [rank for rank in range(world_size) if rank not in there]
    if not missing:
        return []
    reason = (
        f"rank {_listed(missing)} of {world_size} recorded nothing in attempt {attempt}; if each "
        "rank recorded examples of its own, those are missing"
    )
    return [{"event": "missing ranks", "step": -1, "ranks": missing, "reason": reason}]


def _finding(event: str, key: Key, step: int, **details: object) -> dict[str, Any]:
    return {"event": event, "step": step, "measure": key[0], "source": key[1], **details}


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
