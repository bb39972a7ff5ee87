"""The records of one measure, as readers see them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sonde.exceptions import (
    DamageError,
    InvalidInputError,
    LayerNotFoundError,
    MeasureNotFoundError,
    StepNotFoundError,
)
from sonde.log.format.payload import widened, wider
from sonde.log.reading.examples import Examples
from sonde.log.reading.parts import Part, StreamKey, StreamShape
from sonde.log.reading.ranks import Shares, merge_ids, table_ids

from . import products
from .layer_log import LayerLog
from .relative import absolute, split

if TYPE_CHECKING:
    from .run import Run


class MeasureLog:
    """The records of one measure and source of a run.

    Args:
        run: The run.
        measure: The measure.
        source: Where its examples come from.
    """

    def __init__(self, run: Run, measure: str, source: str) -> None:
        self.run = run
        self.measure = measure
        self.source = source

    @property
    def _records(self) -> dict[int, Shares]:
        key = (self.measure, self.source)
        if key not in self.run._records:
            raise MeasureNotFoundError(
                f"the records of '{self.measure}' of run {self.run.name!r} are not there any more: "
                "they were deleted, damaged or superseded since the run was opened"
            )
        return self.run._records[key]

    @property
    def _examples(self) -> Examples:
        return self.run._examples[self.measure, self.source]

    @property
    def steps(self) -> list[int]:
        """The recorded steps, sorted."""
        return list(self._records)

    @property
    def streams(self) -> list[tuple[str | None, str]]:
        """Every (layer, field) that some record has, in the order they were recorded."""
        parts = dict.fromkeys(s.record.part for shares in self._records.values() for s in shares)
        return list(dict.fromkeys(key for part in parts for key in part.stream_keys()))

    @property
    def layers(self) -> list[str]:
        """The layers that have records, in the order the model ran them."""
        return list(dict.fromkeys(layer for layer, _ in self.streams if layer is not None))

    @property
    def ids(self) -> npt.NDArray[np.int64] | None:
        """The ids of the examples, int64 [examples].

        None if the source names none, or others at each step; see `ids_at`.
        """
        return self.run.retry(lambda: self._examples.ids)

    def ids_at(self, step: int = -1) -> npt.NDArray[np.int64] | None:
        """Return the ids of the examples of one record, in the order of its arrays.

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        wanted = self.resolve_step(step)
        return self.run.retry(lambda: self._examples.ids_at(wanted))

    @property
    def targets(self) -> npt.NDArray[Any] | None:
        """The targets of the examples, [examples], or None if the source has none."""
        return self.table("target") if "target" in self._table_fields() else None

    def targets_at(self, step: int = -1) -> npt.NDArray[Any] | None:
        """Return the targets of the examples of one record; None if they are not known.

        A training has other examples at each step, a probe always the same.

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        if "target" in self.fields():
            return self.array("target", step)
        return self.targets

    def source_facts(self, step: int = -1) -> dict[str, Any]:
        """Return what the source says of its examples: their number, digests of ids and inputs.

        Where `ids` is "positions", no ids were given to the probe. Empty for a training.

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        return self._examples.facts_at(self.resolve_step(step))

    @property
    def num_bytes(self) -> int:
        """The bytes of all arrays of all records."""
        rows: dict[Part, list[int]] = {}
        for shares in self._records.values():
            for share in shares:
                rows.setdefault(share.record.part, []).append(share.record.row)
        return sum(part.num_bytes(of_part) for part, of_part in rows.items())

    def fields(self, layer: str | None = None) -> list[str]:
        """Return the fields a layer has, or those that belong to no layer."""
        return [field for name, field in self.streams if name == layer]

    def steps_of(self, field: str, layer: str | None = None) -> list[int]:
        """Return the steps whose record has this array."""
        key = (layer, field)
        return [step for step, shares in self._records.items() if _has(shares, key)]

    def resolve_step(self, step: int) -> int:
        """Return a recorded step; a negative number counts from the end.

        Raises:
            StepNotFoundError: If there is no such record.
        """
        if step in self._records:  # Without a list of all, which reading many would make often.
            return step
        steps = self.steps
        if step < 0 and -step <= len(steps):
            return steps[step]
        raise StepNotFoundError(
            f"step {step} of '{self.measure}' was not recorded in run {self.run.name!r}; "
            f"recorded steps: {listing(steps)}"
        )

    def array(
        self,
        field: str,
        step: int = -1,
        layer: str | None = None,
        *,
        as_stored: bool = False,
    ) -> npt.NDArray[Any]:
        """Return one array of one record; what was stored in half precision as float32.

        NumPy and xarray add float16 up in float16: the mean of 4,096 ones would be 0.5. What was
        stored relative to a reference, as Gram matrices and sketches of features far from zero are,
        is returned as that of the features themselves, in float64.

        Args:
            field: What the array is, such as `logits`.
            step: The step; negative numbers count from the end.
            layer: The layer it belongs to, if any.
            as_stored: Leave float16 as it is (NumPy has no bfloat16, which is float32 anyway), and
                what is relative to a reference, too.

        Where each rank recorded its own examples, this holds all of them in the order of `ids_at`;
        an array without examples is that of the lowest rank.

        Raises:
            StepNotFoundError: If the step was not recorded.
            LayerNotFoundError: If the record has no such layer or field.
            MismatchError: If the ranks' parts cannot be put together.
        """
        wanted = self.resolve_step(step)
        values = self.run.retry(lambda: self._read(wanted, (layer, field), as_stored))
        return values if as_stored else widened(values)

    def stack(
        self,
        field: str,
        steps: Sequence[int] | None = None,
        layer: str | None = None,
        *,
        as_stored: bool = False,
    ) -> npt.NDArray[Any]:
        """Return one array over several steps, [steps, …].

        Args:
            field: What the array is.
            steps: The steps; None takes those of `steps_of`.
            layer: The layer it belongs to, if any.
            as_stored: Leave the arrays as they are; see `array`.

        Raises:
            StepNotFoundError: If a step was not recorded.
            LayerNotFoundError: If a record has no such layer or field.
        """
        if steps is None:
            wanted = self.steps_of(field, layer)
            if not wanted:
                self._require(next(iter(self._records)), (layer, field))
        else:
            wanted = [self.resolve_step(step) for step in steps]
        arrays = self.run.retry(lambda: self._read_many(wanted, (layer, field), as_stored))
        # Widened while it is stacked, so that no array is there twice in its wider form.
        dtype = np.result_type(*{values.dtype for values in arrays})
        return np.stack(arrays, dtype=dtype if as_stored else wider(dtype))

    def gram(
        self, step: int = -1, layer: str | None = None, *, relative: bool = False
    ) -> npt.NDArray[np.float64]:
        """Return a Gram matrix over the examples.

        Args:
            step: The step; negative numbers count from the end.
            layer: The layer; None is the sum over all layers, where the measure has one.
            relative: Of features minus one vector, the same for all examples, where that keeps more
                digits. Centring, and so CKA, gives the same of both; norms and cosines do not.

        Returns:
            float64 [examples, examples], computed from whichever store was kept. From a sketch it
            is an unbiased estimate. From per-example gradients kept by `Full`, it is the sum over
            the parameters of the layer, read one after the other.

        Raises:
            StepNotFoundError: If the step was not recorded.
            LayerNotFoundError: If the record has no such layer.
        """
        return products.gram(self, step, layer, relative=relative)

    def cross_gram(
        self, step: int, other_step: int, layer: str | None = None
    ) -> npt.NDArray[np.float64]:
        """Return the inner products between the examples of two steps, such as of their gradients.

        It takes a store that keeps rows: `Full`, or `Sketch`, whose projection is the same at every
        step, so that the inner products are unbiased estimates.

        Args:
            step: The step of the rows; negative numbers count from the end.
            other_step: The step of the columns.
            layer: The layer; None is the sum over all layers, of per-example gradients.

        Returns:
            float64 [examples, examples of the other step].

        Raises:
            StepNotFoundError: If a step was not recorded.
            LayerNotFoundError: If the record has no such layer, or keeps only Gram matrices.
        """
        return products.cross_gram(self, step, other_step, layer)

    def gram_blocks(
        self, layer: str, step: int = -1, *, relative: bool = False
    ) -> list[npt.NDArray[np.float64]]:
        """Return the Gram matrix of a layer by blocks of examples: one, unless only some were kept.

        Args:
            layer: The layer.
            step: The step; negative numbers count from the end.
            relative: Of features minus a vector of the block; see `gram`.

        Returns:
            float64 [examples of the block, examples of the block] each, in the order of examples.

        Raises:
            StepNotFoundError: If the step was not recorded.
            LayerNotFoundError: If the record has no such layer.
        """
        if "gram_blocks" not in self._check_layer(layer):
            return [self.gram(step, layer, relative=relative)]
        sizes = self.attributes(step)["block_sizes"]
        values = self.array("gram_blocks", step, layer, as_stored=relative).astype(np.float64)
        blocks = split(values, np.square(sizes))
        return [block.reshape(size, size) for block, size in zip(blocks, sizes, strict=True)]

    def features(self, layer: str, step: int = -1, *, as_stored: bool = False) -> npt.NDArray[Any]:
        """Return the examples × features matrix of a layer that was stored, or its sketch.

        Args:
            layer: The layer.
            step: The step; negative numbers count from the end.
            as_stored: Leave the array as it is; see `array`.

        Raises:
            StepNotFoundError: If the step was not recorded.
            LayerNotFoundError: If there is no such layer, or only its Gram matrix was kept.
        """
        fields = self._check_layer(layer)
        for name in ("full", "sketch"):
            if name in fields:
                return self.array(name, step, layer, as_stored=as_stored)
        raise LayerNotFoundError(
            f"'{self.measure}' kept only {', '.join(fields)} of layer '{layer}'; "
            "record it with store=Full() or Sketch() to have features"
        )

    def attributes(self, step: int = -1) -> dict[str, Any]:
        """Return what the record of a step says of itself.

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        return self._records[self.resolve_step(step)][0].record.attributes

    def time(self, step: int = -1) -> float | None:
        """Return when the record of a step was taken, in seconds since 1970 (UTC).

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        return self._records[self.resolve_step(step)][0].record.time

    def describe(self, step: int = -1) -> dict[StreamKey, StreamShape]:
        """Return shape, dims and dtype of every array of a record, by (layer, field).

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        wanted = self.resolve_step(step)
        shares = self._records[wanted]
        streams = shares[0].record.part.streams(shares[0].record.row)
        if len(shares) == 1:
            return streams
        ids = self.ids_at(wanted)
        assert ids is not None  # Else there would be one share.
        return {
            key: stream.with_size("example", len(ids))
            for key, stream in streams.items()
            if _has(shares, key)
        }

    def ranks_at(self, step: int = -1) -> list[int]:
        """Return the ranks whose examples the arrays of a record hold.

        Raises:
            StepNotFoundError: If the step was not recorded.
        """
        return [share.writer.rank for share in self._records[self.resolve_step(step)]]

    def table(self, field: str, *, as_stored: bool = False) -> npt.NDArray[Any]:
        """Return an array of the source that does not depend on the step, such as `triplet`.

        Args:
            field: What the array is.
            as_stored: Leave float16 as it is, which is float32 otherwise; see `array`.

        Raises:
            InvalidInputError: If the source has no such array.
        """
        fields = self._table_fields()
        if field not in fields:
            raise InvalidInputError(
                f"source '{self.source}' has no table '{field}'; it has: {listing(fields)}"
            )
        values = self.run.retry(lambda: self._read_table(field))
        return values if as_stored else widened(values)

    def __getitem__(self, layer: str) -> LayerLog:
        """Return the records of one layer.

        Raises:
            LayerNotFoundError: If there is no such layer.
        """
        self._check_layer(layer)
        return LayerLog(self, layer)

    def __repr__(self) -> str:
        return (
            f"<{self.measure} of {self.source!r} in run {self.run.name!r}: {len(self.steps)} "
            f"records, {len(self.layers)} layers, {self._count_text()} examples>"
        )

    def _read_table(self, field: str) -> npt.NDArray[Any]:
        tables = self.run._tables(self.source)
        first = tables[0]
        writers = [share.writer for share in next(reversed(self._records.values()))]
        if len(writers) == 1 or "example" not in first.dims.get(field, ()):
            return first.arrays[field]()
        axis = first.dims[field].index("example")
        each = [ids for writer in writers if (ids := table_ids(writer, self.source)) is not None]
        parts = [writer.tables[self.source].arrays[field]() for writer in writers]
        return np.concatenate(parts, axis).take(merge_ids(each)[1], axis)

    def _table_fields(self) -> list[str]:
        return [field for table in self.run._tables(self.source)[:1] for field in table.arrays]

    def _check_layer(self, layer: str) -> list[str]:
        fields = self.fields(layer)
        if not fields:
            raise LayerNotFoundError(
                f"layer '{layer}' of '{self.measure}' was not recorded in run "
                f"{self.run.name!r}; recorded layers: {listing(self.layers)}"
            )
        return fields

    def _count_text(self) -> str:
        """Return the number of examples as text."""
        try:
            return "–" if self.ids is None else str(len(self.ids))
        except DamageError:
            return "?"

    def _shares(self, step: int) -> Shares:
        """Return what counts of a step that was there when it was asked for."""
        return self._records[self.resolve_step(step)]

    def _read(self, step: int, key: StreamKey, as_stored: bool) -> npt.NDArray[Any]:
        self._require(step, key)
        records = [share.record for share in self._shares(step)]
        arrays = [record.part.read(record.row, key) for record in records]
        if not as_stored:
            pairs = zip(records, arrays, strict=True)
            arrays = [absolute(record, key, values) for record, values in pairs]
        return self._examples.join(step, arrays, self._dims(step, key))

    def _read_many(
        self, steps: Sequence[int], key: StreamKey, as_stored: bool
    ) -> list[npt.NDArray[Any]]:
        arrays: list[npt.NDArray[Any]] = []
        for shares_part, group in groupby(steps, lambda step: self._only_part(step)):
            at = list(group)
            if shares_part is None:
                arrays += [self._read(step, key, as_stored) for step in at]
                continue
            for step in at:
                self._require(step, key)
            read = shares_part.read_many([self._records[step][0].record.row for step in at], key)
            for step, values in zip(at, read, strict=True):
                if not as_stored:
                    values = absolute(self._records[step][0].record, key, values)
                arrays.append(self._examples.join(step, [values], self._dims(step, key)))
        return arrays

    def _only_part(self, step: int) -> Part | None:
        shares = self._shares(step)
        return shares[0].record.part if len(shares) == 1 else None

    def _dims(self, step: int, key: StreamKey) -> tuple[str, ...]:
        record = self._shares(step)[0].record
        return record.part.dims(record.row, key)

    def _require(self, step: int, key: StreamKey) -> None:
        shares = self._shares(step)
        if _has(shares, key):
            return
        layer, field = key
        if layer is not None:
            self._check_layer(layer)
        lacking = next(s for s in shares if not s.record.part.has(s.record.row, key))
        streams = lacking.record.part.streams(lacking.record.row)
        there = [name for at, name in streams if at == layer]
        where = f"layer '{layer}'" if layer is not None else "the record"
        rank = f" of rank {lacking.writer.rank}" if len(shares) > 1 else ""
        raise LayerNotFoundError(
            f"'{self.measure}' of run {self.run.name!r} has no '{field}' for {where} at step "
            f"{step}{rank}; there is: {', '.join(there) or 'nothing'}"
        )


def _has(shares: Shares, key: StreamKey) -> bool:
    return all(share.record.part.has(share.record.row, key) for share in shares)


def listing(items: Sequence[object], limit: int = 12) -> str:
    """List what there is, in a line of reasonable length."""
    texts = [str(item) for item in items]
    if len(texts) > limit:
        texts = [*texts[: limit - 3], f"… ({len(texts) - limit + 1} more)", *texts[-2:]]
    return ", ".join(texts) or "none"
