#!/usr/bin/env bash
# Step hooks of an optimizer fire once or twice a step: it depends on what else the process has made.
#
# Expected: a hook registered by `register_step_post_hook` is called once for each call of `step`.
# Seen: of a subclass whose `step` calls `super().step()` it is called once, as long as no optimizer of
# the parent's own class was made in the process; after that twice. torch wraps `step` of a class when
# the first optimizer of that very class is made, so both methods are wrapped then.
# Met by: whoever counts steps by hooks, as schedules and recorders do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import torch


class Subclass(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


def calls_of_a_step():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = Subclass([parameter])
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    parameter.grad = torch.ones(1)
    optimizer.step()
    return len(calls)


before = calls_of_a_step()
torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # Elsewhere in the process.
after = calls_of_a_step()
print(f"torch {torch.__version__}: calls of the hook in one step: {before}, and later {after}")
print("expected: 1 and 1")
as_seen = (before, after) == (1, 2)
print("as seen: 1 and 2" if as_seen else "this has changed")
sys.exit(0 if as_seen else 1)
PY
