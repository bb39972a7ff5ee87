"""The other process: closed journals become immutable HDF5 segments."""
