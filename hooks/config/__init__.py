"""Configurations: what to record and where, in Python and in YAML."""
