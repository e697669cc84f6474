"""Labelled audio: reads it, caches it, cuts it into windows, degrades it for tests."""
