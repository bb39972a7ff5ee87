"""What `sonde run` does: run an unedited script, and record the training in it."""
