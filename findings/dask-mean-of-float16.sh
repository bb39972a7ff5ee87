#!/usr/bin/env bash
# A mean of float16 values by dask counts the values in float16, too.
#
# Expected: the mean of 70,000 values of 0.1, kept as float16 to save space, is about 0.1.
# Seen: 0.0, beside a general "overflow encountered in reduce". The number of values is a float16 as
# well, and from 65,520 on that is infinite. NumPy's mean of the same array is right: it counts in
# integers and adds up in float32.
# Met by: whoever keeps activations in half precision and averages logs that are larger than memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 dask==2026.8.0
"$folder/venv/bin/python" - <<'PY'
import sys

import dask
import dask.array
import numpy

values = numpy.full(70_000, 0.1, numpy.float16)
by_numpy = float(values.mean())
by_dask = float(dask.array.from_array(values, chunks=10_000).mean().compute())
print(f"numpy {numpy.__version__}: {by_numpy:.4f}   dask {dask.__version__}: {by_dask:.4f}")
print("expected: both 0.1")
as_seen = abs(by_numpy - 0.1) < 1e-3 and by_dask == 0.0
print("as seen: dask gives 0.0" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PY
