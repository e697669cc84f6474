"""Losses as pure functions: negatives, InfoNCE, concordance."""
