"""Export: a run as one compact HDF5 file, and how that is read."""

from .write_run import export_run

__all__ = ["export_run"]
