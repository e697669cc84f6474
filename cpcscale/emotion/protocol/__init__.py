"""Folds: which speakers train, which choose the epoch, and which are tested."""
