"""Examples of two sides: matched by their ids, and checked to be the same ones.

Ids are names that the user gave, or positions in a probe. Equal ids are no proof: two probes drawn
at random have the same positions. What the log knows beside them are the targets and a digest of
the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.exceptions import InvalidInputError, MismatchError
from sonde.log.format.inputs import same_inputs

if TYPE_CHECKING:
    from sonde.log import MeasureLog

Indices = np.ndarray[Any, np.dtype[np.intp]]  # Any: the shape is always [examples].

_MIN_EXAMPLES = 4
_MAX_IDS = 5


@dataclass(frozen=True)
class Matched:
    """The common examples of two sides.

    Attributes:
        rows: Where they are on the first side; None if both have the same, in the same order.
        other_rows: Where they are on the other side.
        messages: What to warn of.
    """

    rows: Indices | None = None
    other_rows: Indices | None = None
    messages: list[str] = field(default_factory=list)


def match(log: MeasureLog, step: int, other: MeasureLog, other_step: int, what: str) -> Matched:
    """Find the common examples of two records, and check that they are the same ones.

    Args:
        log: The measure of the first side.
        step: Its step.
        other: The measure of the other side.
        other_step: Its step.
        what: What is computed, for messages.

    Raises:
        MismatchError: If ids are missing, repeat, or fewer than 4 are common; if examples of the
            same id have other targets.
    """
    ids, other_ids = log.ids, other.ids
    if ids is None or other_ids is None:
        raise MismatchError(no_ids(log if ids is None else other))
    if np.array_equal(ids, other_ids):
        return Matched(messages=_compare(log, step, other, other_step, None, None, what))
    for side, values in ((log, ids), (other, other_ids)):
        if len(np.unique(values)) < len(values):
            raise MismatchError(
                f"ids of '{side.source}' in run '{side.run.name}' repeat: "
                "examples in different orders cannot be aligned"
            )
    common, rows, other_rows = np.intersect1d(
        ids, other_ids, assume_unique=True, return_indices=True
    )
    sides = f"run '{log.run.name}' ({len(ids)}) and run '{other.run.name}' ({len(other_ids)})"
    if len(common) < _MIN_EXAMPLES:
        raise MismatchError(
            f"{sides} share {len(common)} example ids in '{log.source}'; "
            f"expected at least {_MIN_EXAMPLES}; the first ids are {first_ids(ids)} and "
            f"{first_ids(other_ids)}"
        )
    order = np.argsort(rows)  # Keep the order of the first side.
    rows, other_rows = rows[order], other_rows[order]
    messages = _compare(log, step, other, other_step, rows, other_rows, what)
    if len(common) < max(len(ids), len(other_ids)):
        alone = np.setxor1d(ids, other_ids)
        messages.insert(
            0,
            f"{what} on the {len(common)} examples that {sides} share; {len(alone)} are in one of "
            f"them only: {first_ids(alone)}",
        )
    return Matched(rows, other_rows, messages)


def leave_out(
    log: MeasureLog, other: MeasureLog, matched: Matched, ids: Sequence[int] | Indices
) -> Matched:
    """Leave out examples of two sides by their ids.

    Args:
        log: The measure of the first side.
        other: The measure of the other side.
        matched: Their common examples.
        ids: What is left out.

    Raises:
        MismatchError: If the examples have no ids.
        InvalidInputError: If some of `ids` are not among the examples, or fewer than 4 are left.
    """
    known = log.ids
    if known is None:
        raise MismatchError(no_ids(log))
    rows = np.arange(len(known)) if matched.rows is None else matched.rows
    wanted = np.unique(np.asarray(ids))
    unknown = wanted[~np.isin(wanted, known[rows])]
    if len(unknown):
        raise InvalidInputError(
            f"`without` names {len(unknown)} ids that '{log.source}' of run '{log.run.name}' has "
            f"not, or does not share: {first_ids(unknown)}"
        )
    kept = ~np.isin(known[rows], wanted)
    if np.count_nonzero(kept) < _MIN_EXAMPLES:
        raise InvalidInputError(
            f"`without` leaves {np.count_nonzero(kept)} examples of '{log.source}'; expected at "
            f"least {_MIN_EXAMPLES}"
        )
    other_rows = rows if matched.other_rows is None else matched.other_rows
    return Matched(rows[kept], other_rows[kept], matched.messages)


def shared_ids(
    logs: Sequence[MeasureLog], number: int, without: Sequence[int] | Indices | None = None
) -> list[int]:
    """Return the ids of the examples that were compared, in their order.

    Args:
        logs: The measures of both sides.
        number: How many were compared.
        without: Ids that were left out.

    Returns:
        Ids; positions, if there are none.
    """
    ids, other = logs[0].ids, logs[1].ids
    if ids is None or other is None:
        return list(range(number))
    kept = np.isin(ids, other)
    if without is not None:
        kept &= ~np.isin(ids, np.asarray(without))
    found: list[int] = ids[kept].tolist()
    assert len(found) == number  # They are matched by these ids.
    return found


def first_ids(ids: np.ndarray[Any, Any]) -> str:
    """List the first ids of some."""
    shown = ", ".join(str(one) for one in ids[:_MAX_IDS].tolist())
    return shown + (", …" if len(ids) > _MAX_IDS else "")


def no_ids(log: MeasureLog) -> str:
    """Say that examples cannot be matched."""
    return (
        f"'{log.source}' in run '{log.run.name}' records no example ids: "
        "its examples cannot be matched"
    )


def _compare(
    log: MeasureLog,
    step: int,
    other: MeasureLog,
    other_step: int,
    rows: Indices | None,
    other_rows: Indices | None,
    what: str,
) -> list[str]:
    """Hold examples with equal ids against each other, and return what to warn of.

    Raises:
        MismatchError: If their targets differ, unless their inputs are known to be the same.
    """
    facts, other_facts = log.source_facts(step), other.source_facts(other_step)
    # A digest covers all inputs in their order.
    same = same_inputs(facts, other_facts) if rows is None else None
    if same or (log is other and facts == other_facts):
        return []
    sides = f"'{log.source}' of run '{log.run.name}' and '{other.source}' of run '{other.run.name}'"
    are_positions = "positions" in (facts.get("ids"), other_facts.get("ids"))
    reason = "the ids are positions in a probe; " if are_positions else ""
    advice = f"{reason}record both runs on the same probe, or give ids=… that name the examples"
    differing = _first_other_target(log, step, other, other_step, rows, other_rows)
    if differing is not None:
        raise MismatchError(
            f"{sides} have examples with the same id but other targets (id {differing}): they are "
            f"not the same examples; {advice}"
        )
    if same is False:
        return [
            f"{what} compares {sides}, whose inputs differ under the same ids: they may not be the "
            f"same examples; {advice}"
        ]
    digests = (facts.get("input_digest"), other_facts.get("input_digest"))
    if rows is None and all(digests):
        return [
            f"{what} compares {sides}; whether their inputs are the same is not known, because a "
            "digest was made of batches, as of probes that are not held in memory"
        ]
    if rows is not None and are_positions:
        return [f"{what} matches the examples of {sides} by id, but {advice}"]
    return []


def _first_other_target(
    log: MeasureLog,
    step: int,
    other: MeasureLog,
    other_step: int,
    rows: Indices | None,
    other_rows: Indices | None,
) -> str | None:
    """Return the id of an example that has another target on the other side, with both."""
    targets, others = log.targets_at(step), other.targets_at(other_step)
    ids = log.ids
    if targets is None or others is None or ids is None:
        return None
    if rows is not None:
        targets, others, ids = targets[rows], others[other_rows], ids[rows]
    if targets.shape[1:] != others.shape[1:]:
        return f"{ids[0]}: of shape {list(targets.shape[1:])} and {list(others.shape[1:])}"
    if "f" in targets.dtype.kind + others.dtype.kind:
        differ = ~np.isclose(targets, others, rtol=1e-6, atol=0, equal_nan=True)
    else:
        differ = targets != others
    differ = differ.reshape(len(differ), -1).any(axis=1)
    if not differ.any():
        return None
    first = int(differ.argmax())
    return f"{ids[first]}" + (
        f": {targets[first]} and {others[first]}" if targets.ndim == 1 else ""
    )
