"""Per-example gradients: of examples that are run, and of the training itself."""
