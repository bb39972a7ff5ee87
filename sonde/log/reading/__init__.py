"""The reading side: every valid record of a run, from segments and journals alike."""
