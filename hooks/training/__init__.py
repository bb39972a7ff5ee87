"""The training as a source: its passes, its steps, and the examples of each."""
