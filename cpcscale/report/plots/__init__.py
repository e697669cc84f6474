"""Plots as PNG files."""
