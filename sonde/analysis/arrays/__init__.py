"""Pure functions of arrays: kernels, their comparison, and what it is worth.

Nothing here reads a run; every function computes in float64 and can be tried on made-up arrays.
"""

from . import kernels, null, segments

__all__ = ["kernels", "null", "segments"]
