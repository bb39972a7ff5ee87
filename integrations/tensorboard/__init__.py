"""TensorBoard: export a recorded run as ordinary event files, without torch or TensorFlow."""

from ._export import export

__all__ = ["export"]
