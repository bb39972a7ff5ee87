"""Blocks of layers that represent the same: which layers, how many blocks, how clear they are.

Wide and deep networks have blocks of neighbouring layers with nearly the same representation
(Nguyen, Raghu and Kornblith, 2021, section 4). Here a block is what `arrays.segments` says: layers
more alike than layers at their distance are; the number of blocks is judged by chance, not set.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from sonde.analysis.arrays import segments
from sonde.analysis.arrays.kernels import Array
from sonde.analysis.sides.families import By, Runs, are_several, over_runs
from sonde.analysis.sides.maps import Chance
from sonde.analysis.sides.select import measure_log, select_steps
from sonde.exceptions import InvalidInputError

from .cka import within

if TYPE_CHECKING:
    from sonde.log import Run

_ONE_RUN = "blocks takes a run, a family, or a map of cka"
_MAX_BLOCKS = 12
_BOUNDS = ("start_low", "start_high", "end_low", "end_high", "support")


def blocks(
    run: Runs | xr.DataArray,
    *,
    by: By = None,
    step: int = -1,
    steps: Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    source: str | None = None,
    unbiased: bool = True,
    null: int = 200,
    intervals: int = 100,
    level: float = 0.05,
    min_size: int = 3,
    min_contrast: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """Find blocks of contiguous layers that are alike.

    The number of blocks: each has to gain more than the best block of all but a share `level` of
    the maps of the null. For a run, the null permutes the examples of one side: chance is what
    unrelated layers have. A map alone has no examples; then its layers are put in random order:
    chance is what the same similarities have that do not lie side by side. Beyond chance a block
    has to differ by `min_contrast`: in a trained network nearly nothing is unrelated, and a block
    may be certain and yet too faint to be called one.

    Args:
        run: Run with the measure `activations`, or several; or a map [layer, other_layer] of one
            set of layers, such as a mean of `cka` over seeds.
        by: Configuration keys that group several runs; each becomes a dimension.
        step: Recorded step; negative counts from the last recorded.
        steps: Several recorded steps instead; they become a dimension.
        layers: Names or globs of the layers, in their order; all if None.
        source: Source of the examples; the default source of the measure if None.
        unbiased: Debiased CKA.
        null: How many maps the null has.
        intervals: How many halves of the examples the bounds are made of; 0 makes none.
        level: The probability that a map of chance gets a block, and that a bound misses.
        min_size: The least number of layers of a block.
        min_contrast: The least contrast of a block.
        seed: Seed of everything drawn.

    Returns:
        Dataset over block, in the order of the layers, perhaps [step, block]: `start` and `end`
        (positions among the layers, from 0; `end` is the one after the last), `first_layer`,
        `last_layer`, `size`, `similarity` (mean inside, without the diagonal), `contrast` (how much
        more alike pairs inside are than pairs of which one layer is inside, at the same distance),
        `p_value` (how often the best block of the null gains as much), and, of a run, `start_low`,
        `start_high`, `end_low`, `end_high` (where the ends lie on halves of the examples) and
        `support` (share of halves that have the block: intersection over union above 1/2). Beside
        them `num_blocks`, and `in_block` [layer], the number of the block a layer is in, or -1.
        Where steps have fewer blocks, values are NaN. Layers without a value are left out, and a
        warning names them.

        Of several runs [*by]: mean, `_spread` and `num_runs` of `num_blocks`, `share_in_blocks` (of
        the layers), `largest_size`, `largest_contrast`, and `is_in_block` [layer], the share of
        runs.

    Raises:
        InvalidInputError: If a map is not of one set of layers, or a number is out of its range.
        MeasureNotFoundError: If no run has the measure.

    Example::

        found = sonde.analysis.blocks(run)
        found[["first_layer", "last_layer", "contrast"]].to_pandas()
    """
    if null < 1:
        raise InvalidInputError(f"`null` (={null}) must be at least 1: it decides how many blocks")
    if isinstance(run, xr.DataArray):
        return _of_map(run, null, level, min_size, min_contrast, seed)
    messages: dict[str, None] = {}
    chance = Chance(null, intervals, level, seed)

    def one(each: Run, at: int) -> xr.Dataset:
        maps = within(each, at, layers, source, unbiased, chance, messages)
        return _found(maps, chance, min_size, min_contrast)

    def all_steps(each: Run) -> xr.Dataset:
        if steps is None:
            return one(each, step)
        wanted = select_steps(measure_log(each, "activations", source, _ONE_RUN), steps)
        return _over_steps(wanted, [one(each, at) for at in wanted])

    if are_several(run):
        result = over_runs(run, by, lambda each: _summary(all_steps(each)), "blocks")
    else:
        result = all_steps(run)
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return result


def _of_map(
    similarity: xr.DataArray,
    null: int,
    level: float,
    min_size: int,
    min_contrast: float,
    seed: int,
) -> xr.Dataset:
    """Find the blocks of a map, its layers in random order as null.

    Raises:
        InvalidInputError: If it is not of one set of layers.
    """
    if similarity.dims != ("layer", "other_layer"):
        raise InvalidInputError(
            f"`run` has dimensions {similarity.dims}; expected a map ('layer', 'other_layer'): "
            "choose one by .sel()"
        )
    names = similarity["layer"].values.tolist()
    if names != similarity["other_layer"].values.tolist():
        raise InvalidInputError(
            "`run` compares different layers; blocks are of layers compared with themselves"
        )
    values = similarity.values
    kept = _kept(values)
    chosen = values[np.ix_(kept, kept)]
    chosen = (chosen + chosen.T) / 2  # The mean over pairs of runs need not be symmetric.
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(chosen)) for _ in range(null)]
    drawn = np.stack([chosen[np.ix_(order, order)] for order in orders])
    attributes = {**similarity.attrs, "null": "layers in random order", "num_permutations": null}
    for name in ("interval", "num_halves"):
        attributes.pop(name, None)
    result = _described(names, kept, chosen, drawn, None, level, min_size, min_contrast)
    return result.assign_attrs(attributes | result.attrs | {"seed": seed})


def _found(maps: xr.Dataset, chance: Chance, min_size: int, min_contrast: float) -> xr.Dataset:
    """Find the blocks of a run, its maps under permutations as null."""
    names = maps["layer"].values.tolist()
    values = maps["value"].values
    kept = _kept(values)
    chosen = np.ix_(kept, kept)
    drawn = maps["null"].transpose("permutation", ...).values[:, kept[:, None], kept]
    halves = None
    if "halves" in maps:
        halves = maps["halves"].transpose("half", ...).values[:, kept[:, None], kept]
    result = _described(
        names, kept, values[chosen], drawn, halves, chance.level, min_size, min_contrast
    )
    return result.assign_attrs(
        maps.attrs
        | result.attrs
        | {
            "null": "examples of one side permuted",
            "num_permutations": chance.null,
            "num_halves": chance.intervals,
            "seed": chance.seed,
        }
    )


def _kept(values: Array) -> segments.Positions:
    """Return the layers that have values."""
    return np.flatnonzero(np.isfinite(np.diagonal(values)))


def _described(
    names: list[str],
    kept: segments.Positions,
    similarity: Array,
    drawn: Array,
    halves: Array | None,
    level: float,
    min_size: int,
    min_contrast: float,
) -> xr.Dataset:
    """Choose the blocks of a map, and describe them."""
    gain = segments.gains(similarity, min_size)
    null_gains = segments.gains(drawn, min_size).max(axis=(1, 2))
    every = segments.segmentations(gain, _MAX_BLOCKS)
    segmentation, needed = segments.choose(every, null_gains, level)
    contrast = segments.contrasts(similarity)
    clear = [block for block in segmentation.blocks if contrast[block] >= min_contrast]
    number = len(segmentation.blocks)
    bounds = _bounds(clear, halves, number, min_size, level)
    in_block = np.full(len(names), -1)
    rows = []
    for index, (first, end) in enumerate(clear):
        start, last = int(kept[first]), int(kept[end - 1])
        in_block[kept[first:end]] = index
        inside = similarity[first:end, first:end][np.triu_indices(end - first, 1)]
        at_least = np.count_nonzero(null_gains >= gain[first, end])
        rows.append(
            {
                "start": start,
                "end": last + 1,
                "first_layer": names[start],
                "last_layer": names[last],
                "size": end - first,
                "similarity": float(inside.mean()),
                "contrast": float(contrast[first, end]),
                "p_value": (1 + at_least) / (len(drawn) + 1),
                **({} if bounds is None else _placed(bounds[index], kept)),
            }
        )
    kinds = {"first_layer": np.str_, "last_layer": np.str_}
    counts = ("start", "end", "size")
    columns = [*counts, "first_layer", "last_layer", "similarity", "contrast", "p_value"]
    columns += [] if bounds is None else _BOUNDS
    variables = {
        name: (
            "block",
            np.array(
                [row[name] for row in rows], kinds.get(name, np.int64 if name in counts else float)
            ),
        )
        for name in columns
    }
    return xr.Dataset(
        {**variables, "num_blocks": len(rows), "in_block": ("layer", in_block)},
        coords={"block": np.arange(len(rows)), "layer": names},
        attrs={
            "level": level,
            "min_size": min_size,
            "min_contrast": min_contrast,
            "gain_needed": needed,
            "num_faint": number - len(clear),
        },
    )


def _bounds(
    found: list[tuple[int, int]], halves: Array | None, number: int, min_size: int, level: float
) -> list[tuple[float, ...]] | None:
    """Return where the ends of each block lie on halves of the examples, and its support."""
    if halves is None:
        return None
    ends: list[list[tuple[int, int]]] = [[] for _ in found]
    whole = halves[np.isfinite(halves).all(axis=(1, 2))]
    gain = segments.gains(whole, min_size)
    for of_half in gain:
        candidates = segments.segmentations(of_half, number)
        there = candidates[-1].blocks if candidates else []
        for index, block in enumerate(found):
            best = max(there, key=lambda other: _overlap(block, other), default=(0, 0))
            if _overlap(block, best) > 0.5:
                ends[index].append(best)
    tails = [level / 2, 1 - level / 2]
    made: list[tuple[float, ...]] = []
    for each in ends:
        if not each:
            made.append((np.nan,) * 4 + (0.0,))
            continue
        places = np.quantile(np.array(each), tails, axis=0, method="nearest")
        made.append((*places[:, 0], *places[:, 1], len(each) / max(len(whole), 1)))
    return made


def _overlap(block: tuple[int, int], other: tuple[int, int]) -> float:
    """Return intersection over union of two blocks."""
    both = min(block[1], other[1]) - max(block[0], other[0])
    either = max(block[1], other[1]) - min(block[0], other[0])
    return max(both, 0) / either


def _placed(bounds: tuple[float, ...], kept: segments.Positions) -> dict[str, float]:
    """Translate bounds into positions among all layers."""

    def place(at: float, shift: int) -> float:
        return at if np.isnan(at) else float(kept[int(at) - shift] + shift)

    starts = [place(at, 0) for at in bounds[:2]]
    ends = [place(at, 1) for at in bounds[2:4]]
    return dict(zip(_BOUNDS, [*starts, *ends, bounds[4]], strict=True))


def _over_steps(steps: Sequence[int], found: Sequence[xr.Dataset]) -> xr.Dataset:
    """Lay steps out as a dimension; those with fewer blocks are filled with NaN."""
    most = max(result.sizes["block"] for result in found)
    padded = [result.reindex(block=np.arange(most)) for result in found]
    for result in padded:
        for name in ("first_layer", "last_layer"):
            texts = ["" if text != text else str(text) for text in result[name].values.tolist()]
            result[name] = ("block", np.array(texts, dtype=np.str_))
    result = xr.concat(padded, xr.Variable("step", list(steps)), combine_attrs="drop_conflicts")
    return result


def _summary(found: xr.Dataset) -> xr.Dataset:
    """Return what can be averaged over runs with different blocks."""
    is_in = (found["in_block"] >= 0).astype(np.float64)
    none = xr.zeros_like(found["num_blocks"], dtype=np.float64)
    sizes = found["size"].astype(np.float64)
    has_blocks = bool(found.sizes["block"])
    contrast = found["contrast"]
    return xr.Dataset(
        {
            "num_blocks": found["num_blocks"].astype(np.float64),
            "share_in_blocks": is_in.mean("layer"),
            "largest_size": sizes.max("block").fillna(0) if has_blocks else none,
            "largest_contrast": contrast.max("block") if has_blocks else none * np.nan,
            "is_in_block": is_in,
        },
        attrs=found.attrs,
    )
