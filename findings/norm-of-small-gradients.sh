#!/usr/bin/env bash
# `torch.linalg.vector_norm` of a short float32 vector loses its digits long before float32 ends.
#
# Expected: the norm of a vector of 1e-20s, which float32 holds with all digits (its smallest normal
# number is 1e-38), is right to 1e-6; NumPy and BLAS scale before they square.
# Seen: of 1e-22s it is 1 % off, and 1e-23s have the norm 0: the squares are taken in float32.
# Met by: whoever records norms of gradients of examples that a network is sure of.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch

ratios = {}
for size in (1e-10, 1e-20, 1e-22, 1e-23):
    vector = torch.full((100,), size)
    right = float(vector.double().norm())
    ratios[size] = float(torch.linalg.vector_norm(vector)) / right
    print(f"100 entries of {size:g}: norm {ratios[size]:.4f} of the right one")
print(f"torch {torch.__version__}; expected: 1.0000 in every row")
as_seen = abs(ratios[1e-10] - 1) < 1e-5 and ratios[1e-23] == 0.0 and abs(ratios[1e-22] - 1) > 1e-3
print("as seen: short vectors lose their norm" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PY
