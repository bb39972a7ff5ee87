"""One side of a comparison by CKA: the layers of a record, centred, with their sketches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sonde.analysis.arrays import components, kernels
from sonde.analysis.arrays.sketches import Sketched, is_large_enough, sketched_cka
from sonde.exceptions import (
    InvalidInputError,
    LayerNotFoundError,
    MismatchError,
    StepNotFoundError,
)
from sonde.log.relative import is_rounding, split

from .examples import Indices
from .select import overflows_half

if TYPE_CHECKING:
    from sonde.log import MeasureLog

# (run, layer, problem) -> the steps at which it was found, in order.
Lost = dict[tuple[str, str, str], dict[int, None]]


@dataclass(frozen=True)
class Treatment:
    """What is done with Gram matrices before they are compared.

    Attributes:
        unbiased: U-centring for HSIC₁ instead of HKH for HSIC₀.
        bandwidth: Of the RBF kernel, as a fraction of the root of the median squared distance; the
            linear kernel if None.
        remove_components: How many leading principal components are removed from each layer.
    """

    unbiased: bool = True
    bandwidth: float | None = None
    remove_components: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether Gram matrices are left as they are."""
        return self.bandwidth is None and not self.remove_components

    def of(self, grams: Sequence[kernels.Array]) -> list[kernels.Array]:
        """Return the blocks of a Gram matrix as they are compared.

        Raises:
            InvalidInputError: If there is no bandwidth, as most examples are equal.
        """
        made = list(grams)
        if self.bandwidth is not None:
            made = kernels.rbf_of_grams(made, self.bandwidth)
        if self.remove_components:
            made = [components.without_components(gram, self.remove_components) for gram in made]
        return made


@dataclass(frozen=True)
class Side:
    """The layers of one side, centred.

    Attributes:
        stack: One flattened centred Gram matrix a row, or its blocks; NaN for lost layers.
        sizes: Number of examples of each block.
        rows: The sketch of each layer by blocks; None where features are known exactly.
    """

    stack: kernels.Array
    sizes: list[int]
    rows: list[list[kernels.Array] | None]

    def sketched(self) -> list[Sketched | None]:
        """Return the layers with their sketches; None for those that have no CKA."""
        return [
            _sketched(vector, self.sizes, rows)
            if np.isfinite(vector).all() and vector.any()
            else None
            for vector, rows in zip(self.stack, self.rows, strict=True)
        ]


def compare(
    side: Side, other: Side | None, unbiased: bool
) -> tuple[kernels.Array, kernels.Array | None]:
    """Compute CKA [layers, other_layers], and its standard error where a layer is a sketch."""
    sides = [side] if other is None else [side, other]
    if all(rows is None for each in sides for rows in each.rows):
        return kernels.centered_cka(side.stack, None if other is None else other.stack), None
    others = None if other is None else other.sketched()
    return sketched_cka(side.sketched(), others, unbiased=unbiased)


def center_layers(
    log: MeasureLog,
    step: int,
    names: list[str],
    rows: Indices | None,
    sizes: list[int] | None,
    treatment: Treatment,
    lost: Lost,
) -> Side:
    """Center the Grams of layers into [layers, examples * examples]; NaN rows for lost layers.

    Raises:
        MismatchError: If layers differ in their number of examples.
        StepNotFoundError: If no layer was recorded at this step.
    """
    stack: kernels.Array | None = None
    sketches: list[list[kernels.Array] | None] = [None] * len(names)
    for index, name in enumerate(names):
        found = center_layer(log, step, name, rows, sizes, treatment, lost)
        if found is None:
            continue
        centered, sketches[index] = found
        if stack is None:  # Filled layer by layer, so that no Gram is in memory twice.
            stack = np.full((len(names), centered.size), np.nan)
        if centered.size != stack.shape[1]:
            raise MismatchError(
                f"layer '{name}' of run '{log.run.name}' has {math.isqrt(centered.size)} examples "
                f"at step {step}, the layers before it {math.isqrt(stack.shape[1])}"
            )
        stack[index] = centered
    if stack is None:
        raise StepNotFoundError(
            f"run '{log.run.name}' recorded none of these layers at step {step}: {', '.join(names)}"
        )
    return Side(stack, sizes or [math.isqrt(stack.shape[1])], sketches)


def center_layer(
    log: MeasureLog,
    step: int,
    name: str,
    rows: Indices | None,
    sizes: list[int] | None,
    treatment: Treatment,
    lost: Lost,
) -> tuple[kernels.Array, list[kernels.Array] | None] | None:
    """Center the Gram of one layer into [examples * examples], and its sketch, if it is one.

    None where it was not recorded. Both are cut into blocks of `sizes` examples.

    Raises:
        MismatchError: If it was kept in blocks, and examples have to be picked; if it has not as
            many examples as the blocks.
    """
    problem = None
    centered: kernels.Array | None = None
    sketch: list[kernels.Array] | None = None
    try:
        grams = log.gram_blocks(name, step, relative=True)
    except LayerNotFoundError:  # The run has this layer, this record has not.
        problem = "no record"
    else:
        where = f"layer '{name}' of run '{log.run.name}'"
        if rows is not None:
            if len(grams) > 1 or sizes is not None:
                raise MismatchError(
                    f"{where} is compared in blocks, of which examples can be neither aligned by "
                    "id nor left out: both sides need the same examples in the same order"
                )
            grams = [grams[0][np.ix_(rows, rows)]]
        if sizes is not None:
            grams = _cut(grams, sizes, where)
        if all(np.isfinite(gram).all() for gram in grams):
            centered, problem = _treated(grams, treatment, where)
            if treatment.is_plain:
                sketch = _sketch(log, step, name, rows, [len(gram) for gram in grams])
            if problem is not None:
                pass
            elif not centered.any() or is_rounding(log, step, name):
                centered[:] = 0
                problem = "no variance over the examples"
            elif sketch is not None and not is_large_enough(
                _sketched(centered, [len(gram) for gram in grams], sketch), treatment.unbiased
            ):
                centered[:] = np.nan
                problem = "a sketch too small for them (HSIC with themselves is not above 0)"
        else:
            centered = np.full(sum(gram.size for gram in grams), np.nan)
            problem = overflows_half(log, step, [name]) or "non-finite activations"
    if problem is not None:
        # A dict, because a step can be read twice: as itself and as the reference.
        lost.setdefault((log.run.name, name, problem), {})[step] = None
    return None if centered is None else (centered, sketch)


def _cut(grams: list[kernels.Array], sizes: list[int], where: str) -> list[kernels.Array]:
    """Return the blocks of a Gram matrix over these numbers of examples.

    Raises:
        MismatchError: If it has another number of examples, or was kept in other blocks.
    """
    if [len(gram) for gram in grams] == sizes:
        return grams
    if len(grams) > 1 or len(grams[0]) != sum(sizes):
        raise MismatchError(
            f"{where} has blocks of {[len(gram) for gram in grams]} examples, but is compared with "
            f"blocks of {sizes}; both must be of the same examples"
        )
    ends = np.cumsum(sizes).tolist()
    pairs = zip(ends, sizes, strict=True)
    return [grams[0][end - size : end, end - size : end] for end, size in pairs]


def common_blocks(sides: Sequence[tuple[MeasureLog, int, list[str]]]) -> list[int] | None:
    """Return the sizes of the blocks that all sides have or are cut into; None without blocks.

    Raises:
        MismatchError: If two sides were kept in different blocks.
    """
    common: tuple[list[int], str] | None = None
    for log, step, names in sides:
        streams = log.describe(step)
        if not any((name, "gram_blocks") in streams for name in names):
            continue
        sizes = [int(size) for size in log.attributes(step)["block_sizes"]]
        side = f"run '{log.run.name}', step {step}"
        if common is not None and common[0] != sizes:
            raise MismatchError(
                f"{common[1]}, kept blocks of {common[0]} examples and {side}, blocks of {sizes}; "
                "record both with the same Gram(block=…), or one of them with Gram()"
            )
        common = (sizes, side)
    return None if common is None else common[0]


def _sketch(
    log: MeasureLog, step: int, name: str, rows: Indices | None, sizes: list[int]
) -> list[kernels.Array] | None:
    """Return the sketch of a layer by blocks, columns centred; None if it is not one."""
    streams = log.describe(step)
    if (name, "sketch") not in streams or (name, "gram") in streams or (name, "full") in streams:
        return None
    values = log.array("sketch", step, name, as_stored=True).astype(np.float64)
    blocks = split(values if rows is None else values[rows], sizes)
    return [block - block.mean(0) for block in blocks]


def _sketched(
    vector: kernels.Array, sizes: list[int], rows: list[kernels.Array] | None
) -> Sketched:
    blocks = split(vector, [size**2 for size in sizes])
    pairs = zip(blocks, sizes, strict=True)
    return Sketched([block.reshape(size, size) for block, size in pairs], rows)


def _treated(
    grams: Sequence[kernels.Array], treatment: Treatment, where: str
) -> tuple[kernels.Array, str | None]:
    """Center the blocks of a Gram matrix, treated; NaN and the problem where that cannot be."""
    try:
        treated = treatment.of(grams)
    except InvalidInputError:
        size = sum(gram.size for gram in grams)
        return np.full(size, np.nan), "a median distance of 0, so that there is no bandwidth"
    return _centered_grams(treated, treatment.unbiased, where), None


def _centered_grams(grams: Sequence[kernels.Array], unbiased: bool, where: str) -> kernels.Array:
    """Center one Gram into [examples * examples], or each of its blocks one behind the other.

    Raises:
        InvalidInputError: If one cannot be centred, as with too few examples.
    """
    try:
        return kernels.center_blocks(grams, unbiased)
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error}") from error


def lost_messages(lost: Lost, what: str = "CKA") -> list[str]:
    """Write a line per run and reason, with the layers and their steps."""
    lines: dict[tuple[str, str], list[str]] = {}
    for (run, layer, problem), steps in lost.items():
        at = ", ".join(str(step) for step in steps)
        lines.setdefault((run, problem), []).append(f"'{layer}' (step {at})")
    return [
        f"{what} is NaN for layers of run '{run}' with {problem}: {', '.join(layers)}"
        for (run, problem), layers in lines.items()
    ]
