#!/usr/bin/env bash
# `torch.autograd.grad` through a reentrant checkpoint: an error, or no gradient without an error.
#
# Expected: asked for a weight that is used within a checkpoint, autograd gives its gradient, or says
# in any case that reentrant checkpoints do not work with `torch.autograd.grad`.
# Seen: if only weights within the checkpoint are asked for (with `allow_unused=True`, as for models
# of which not every weight is used), they come back as None, without a word. If a weight before the
# checkpoint is asked for as well, the same call raises.
# Met by: whoever takes per-example gradients of a model that checkpoints its blocks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)
before, within = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)


def gradients_of(*weights):
    output = checkpoint(within, before(torch.ones(2, 3)), use_reentrant=True)
    return torch.autograd.grad(output.sum(), weights, allow_unused=True)


alone = gradients_of(within.weight)
try:
    gradients_of(within.weight, before.weight)
    error = None
except RuntimeError as raised:
    error = str(raised).split(".")[0]
print(f"torch {torch.__version__}; the weight within alone: {alone[0]}")
print(f"with a weight before it: {error}")
as_seen = alone[0] is None and error is not None
print("as seen: None without an error, and an error" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PY
