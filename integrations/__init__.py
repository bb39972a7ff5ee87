"""Bridges to other tools: each is imported by its own name and says which extra it needs."""
