"""What a result says of itself: the estimator, the features compared, the number of examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sonde.analysis.arrays import kernels
from sonde.log.relative import BESIDE

if TYPE_CHECKING:
    from sonde.log import MeasureLog

    from .centring import Treatment

_OF_SKETCHES = (
    "HSIC corrected for the sketch; the ratio is biased upwards by a few percent where the sketch "
    "is small, and standard_error is up to 3 times too large"
)
_UNCORRECTED = "of sketches, not corrected for them"


def count_examples(log: MeasureLog, sizes: list[int], unbiased: bool) -> tuple[int, list[str]]:
    """Count the examples compared, and say which blocks were too small to be centred."""
    if len(sizes) < 2:
        return sizes[0], []
    used = [size for size in sizes if size >= (4 if unbiased else 2)]
    if sum(used) == sum(sizes):
        return sum(used), []
    return sum(used), [
        f"CKA leaves out {sum(sizes) - sum(used)} examples of '{log.source}' in run "
        f"'{log.run.name}': they are a block of fewer than 4"
    ]


def features_of(log: MeasureLog) -> str:
    """Say what was compared: flattened or pooled feature maps, and from which store."""
    stores = sorted({field for _, field in log.streams} - set(BESIDE.values()))
    for measure in log.run.info.get("measures") or []:
        if (measure.get("measure"), measure.get("source")) == (log.measure, log.source):
            return f"{measure.get('features', 'as recorded')} ({', '.join(stores)})"
    return f"as recorded ({', '.join(stores)})"


def estimator_of(unbiased: bool, errors: kernels.Array | None) -> str:
    """Name the estimator of CKA, with what is special of sketches."""
    estimator = "unbiased" if unbiased else "biased"
    return estimator if errors is None else _OF_SKETCHES if unbiased else f"biased {_OF_SKETCHES}"


def treated_estimator_of(
    treatment: Treatment, errors: kernels.Array | None, *, is_sketched: bool
) -> str:
    """Name the estimator of CKA of Gram matrices that were treated before."""
    parts = [estimator_of(treatment.unbiased, errors)]
    if treatment.remove_components:
        parts.append(f"without {treatment.remove_components} leading components")
    if is_sketched and not treatment.is_plain:
        parts.append(_UNCORRECTED)
    return ", ".join(parts)
