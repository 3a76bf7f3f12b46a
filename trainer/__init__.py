"""The headless trainer; nothing is imported here, so that the command line starts at once."""
