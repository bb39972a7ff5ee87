"""The devices that tests run on: the CPU, and a GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch

# cuBLAS reads it once, before the first product: without it, products are not the same each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
