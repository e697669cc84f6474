"""Evaluation beyond one number: degraded audio, fewer labels, other corpora."""
