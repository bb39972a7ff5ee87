"""What a run says of where it came from: versions, machine, command, model."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sonde.hooks.model.layers import layers_of, unwrap

_PACKAGES = ("sonde", "torchvision", "numpy", "h5py", "accelerate", "lightning")


def environment() -> dict[str, Any]:
    """Return versions, platform, devices and the command line, as JSON values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "packages": {
            "torch": torch.__version__,  # With its build, such as 2.15.0+cu132.
            **{name: version for name in _PACKAGES if (version := _version(name))},
        },
        "devices": _devices(),
        "num_threads": torch.get_num_threads(),
        "command": sys.argv,
        "git_commit": _git_commit(),
    }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Return a model's class, its number of parameters and its layers, as JSON values."""
    inner = unwrap(model)
    parameters = list(inner.parameters())
    return {
        "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "num_parameters": sum(_size(parameter) for parameter in parameters),
        "num_trained_parameters": sum(_size(p) for p in parameters if p.requires_grad),
        "layers": {name: type(module).__name__ for name, module in layers_of(inner).items()},
    }


def process_rank(environ: Mapping[str, str]) -> tuple[int, int]:
    """Return (rank, number of processes) of this training process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))


def _size(parameter: nn.Parameter) -> int:
    # A lazy module's parameter has no size before the first forward pass.
    return 0 if isinstance(parameter, nn.UninitializedParameter) else parameter.numel()


def _version(package: str) -> str | None:
    # Not by importing it: libhdf5 stays out of the training process.
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path.cwd(),
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
