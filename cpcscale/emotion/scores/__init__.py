"""Scores of predictions: CCC with intervals, tests between systems, tables."""
