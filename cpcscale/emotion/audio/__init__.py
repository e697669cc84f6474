"""Labelled audio: read, cut into windows, degraded, cached."""
