"""The loss of one example: which output it is of, and what float32 would lose of it."""
