"""Examples: which ones a step's arrays are of, and how the shares of several ranks become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import MismatchError

from .ranks import ID, Ids, Shares, merge_ids, table_ids

_EXAMPLE, _OTHER_EXAMPLE, _PAIR = "example", "other_example", "pair"


class Examples:
    """The examples of one measure and source, step by step.

    Args:
        run: The name of the run.
        measure: The measure.
        source: Where the examples come from.
        records: What counts of each step.
    """

    def __init__(self, run: str, measure: str, source: str, records: Mapping[int, Shares]) -> None:
        self._label = f"'{measure}' of run {run!r}"
        self._source = source
        self._records = records
        self._ids_of: dict[tuple[tuple[int, int], ...], Ids | None] = {}

    @property
    def ids(self) -> Ids | None:
        """The ids of the source, int64 [examples]; None if it has none, or others at each step."""
        last = self._records[max(self._records)]
        return None if _names_its_own(last) else self._table_ids(last)

    def ids_at(self, step: int) -> Ids | None:
        """Return the ids of the examples of a recorded step, in the order of its arrays."""
        shares = self._records[step]
        if not _names_its_own(shares):
            return self.ids
        own = [share.record.part.read(share.record.row, ID) for share in shares]
        return own[0] if len(own) == 1 else merge_ids(own)[0]

    def facts_at(self, step: int) -> dict[str, Any]:
        """Return what the source of a recorded step says of itself, such as digests of inputs."""
        for share in self._records[step]:
            if self._source in share.writer.tables:
                return share.writer.tables[self._source].attributes
        return {}

    def join(
        self, step: int, arrays: Sequence[npt.NDArray[Any]], dims: tuple[str, ...]
    ) -> npt.NDArray[Any]:
        """Make one array of what the ranks recorded at a step, in the order of `ids_at`.

        Args:
            step: The step.
            arrays: One per share of the step.
            dims: One name per axis.

        Raises:
            MismatchError: If the ranks did not record what joining them takes, or the step has
                other examples than the source has now.
        """
        shares = self._records[step]
        if len(arrays) > 1 and (_EXAMPLE in dims or _PAIR in dims):
            if _OTHER_EXAMPLE in dims or _PAIR in dims:
                ranks = ", ".join(str(share.writer.rank) for share in shares)
                raise MismatchError(
                    f"{self._label} holds products of examples of one rank each (ranks {ranks}), "
                    "none between ranks; read one by run.rank(…), --rank in the shell, or record "
                    "with store=Sketch() or Full(), --store full in the shell, to have all of them"
                )
            each = [_require(share.ids(self._source)) for share in shares]
            axis = dims.index(_EXAMPLE)
            joined = np.concatenate(arrays, axis).take(merge_ids(each)[1], axis)
        else:
            joined = arrays[0]
        return self._in_order(step, joined, dims)

    def _in_order(
        self, step: int, values: npt.NDArray[Any], dims: tuple[str, ...]
    ) -> npt.NDArray[Any]:
        """Bring an array of another attempt into the order of the latest one.

        Raises:
            MismatchError: If that attempt had other examples.
        """
        if not {_EXAMPLE, _PAIR} & set(dims) or _names_its_own(self._records[step]):
            return values
        wanted, there = self.ids, self._table_ids(self._records[step])
        if wanted is None or there is None or np.array_equal(wanted, there):
            return values
        if _PAIR in dims:
            raise MismatchError(
                f"step {step} of {self._label} has its examples in other blocks than the latest "
                "step; read it by run.rank(…)"
            )
        lacking = np.setdiff1d(wanted, there)
        if len(lacking) or len(wanted) != len(there):
            raise MismatchError(
                f"step {step} of {self._label} has {len(there)} examples, others than the "
                f"{len(wanted)} of the latest step (it lacks {lacking[:5].tolist()}); read it by "
                "run.rank(…)"
            )
        order = np.argsort(there)[np.searchsorted(np.sort(there), wanted)]
        for axis, dim in enumerate(dims):
            if dim in (_EXAMPLE, _OTHER_EXAMPLE):
                values = values.take(order, axis)
        return values

    def _table_ids(self, shares: Shares) -> Ids | None:
        key = tuple((share.writer.attempt, share.writer.rank) for share in shares)
        if key not in self._ids_of:
            each = [table_ids(share.writer, self._source) for share in shares]
            known = [ids for ids in each if ids is not None]
            several = len(known) > 1
            self._ids_of[key] = merge_ids(known)[0] if several else next(iter(known), None)
        return self._ids_of[key]


def _names_its_own(shares: Shares) -> bool:
    return shares[0].record.part.has(shares[0].record.row, ID)


def _require(ids: Ids | None) -> Ids:
    assert ids is not None  # Ranks whose examples have no names are not joined.
    return ids
