"""Tracked runs as a table, JSON, CSV and one self-contained HTML page."""
