"""The results table of all systems."""
