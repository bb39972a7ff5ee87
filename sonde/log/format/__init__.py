"""The bytes of the log: frames, payloads, the files of a run directory, and what they may say."""
