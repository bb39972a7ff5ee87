"""Recording: the recorder, what is due, and the run directory it writes."""
