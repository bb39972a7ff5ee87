"""Uses: which operations of a forward pass take a parameter, and whose rows they see."""
