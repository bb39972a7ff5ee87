"""A run with a store of every kind, for the tests of what a reader sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sonde.log import LogArray, LogWriter

GRAM_DIMS = ("example", "other_example")
STEPS = [0, 10, 20, 30]
IDS = np.array([7, 5, 9])


def gram_of(step: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(step).normal(size=(3, 3)).astype(np.float32)


def features_of(step: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(step + 1).normal(size=(3, 4)).astype(np.float32)


def write_example_run(path: Path, *, segment_bytes: int = 64 << 20) -> None:
    """Write every kind of store; layer `late` appears at step 20 only, `loss` has no layer."""
    writer = LogWriter(path, seal=False, segment_bytes=segment_bytes)
    target = LogArray("target", np.array([0, 1, 0]), ("example",))
    writer.add_table("train", [LogArray("id", IDS, ("example",)), target])
    writer.add_table("test", [LogArray("id", IDS + 1, ("example",))])
    for step in STEPS:
        gram, features = gram_of(step), features_of(step)
        arrays = [
            LogArray("gram", gram, GRAM_DIMS, "conv1"),
            LogArray("full", features, ("example", "feature"), "fc"),
            LogArray("sketch", features[:, :2], ("example", "feature"), "head"),
            LogArray("gram_total", 2 * gram, GRAM_DIMS),
        ]
        if step == 20:
            arrays.append(LogArray("gram", gram, GRAM_DIMS, "late"))
        writer.append("activations", "train", step, arrays, {"batch": step // 10})
        writer.append("activations", "test", step, arrays[:1])
        writer.append("scalars", "training", step, [LogArray("loss", np.array(step / 2), ())])
    writer.note("missing", 5, layer="fc9", reason="never called")
    writer.close()
