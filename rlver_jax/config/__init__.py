"""What users give: a config's fields and flags, files, paths, models by name, credentials."""
