"""What analyses take from runs: examples matched by id, layers centred, families grouped."""
