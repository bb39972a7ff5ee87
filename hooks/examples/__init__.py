"""Whose rows: probes, their examples, and where examples are in what a model returns."""
