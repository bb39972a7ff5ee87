"""Rules: one file for each kind of operation with a parameter."""
