"""The training's side of the log: a queue, a thread, and journals."""
