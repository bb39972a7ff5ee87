"""Factors: per-example gradients of one parameter, without forming them."""
