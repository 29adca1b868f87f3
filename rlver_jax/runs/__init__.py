"""A folder that a command writes: lock, settings, fingerprints of what was read, files that are always whole."""
