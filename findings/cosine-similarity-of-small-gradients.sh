#!/usr/bin/env bash
# `torch.nn.functional.cosine_similarity` of two equal vectors is not 1 where they are short.
#
# Expected: the cosine of a vector with itself is 1, whatever its length.
# Seen: from norms of 1e-8 down it falls, to 0.01 at a norm of 1e-9 and 0.0001 at 1e-10, without a
# warning: each norm is raised to `eps` (1e-8) first. float32 holds such vectors without trouble.
# Met by: whoever compares gradients of examples that a network is sure of; their norms are below 1e-8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch

direction = torch.nn.functional.normalize(torch.arange(1.0, 9.0), dim=0)
found = {}
for norm in (1.0, 1e-7, 1e-9, 1e-10):
    vector = direction * norm
    found[norm] = float(torch.nn.functional.cosine_similarity(vector, vector, dim=0))
    print(f"norm {norm:g}: cosine with itself {found[norm]:.6f}")
print(f"torch {torch.__version__}; expected: 1 in every row")
as_seen = found[1.0] > 0.999 and found[1e-9] < 0.5 and found[1e-10] < 0.01
print("as seen: it falls below norms of 1e-8" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PY
