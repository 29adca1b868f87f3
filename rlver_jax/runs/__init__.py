"""A folder that a command writes: its lock, its settings, fingerprints of what was read, files that are always whole."""
