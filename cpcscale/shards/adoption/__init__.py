"""Tars that others made: their members, labels and lengths, and the index that is written beside them."""
