"""Stores: the form kept of each layer's examples × features matrix, and how it is accumulated."""
