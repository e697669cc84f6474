"""Learnt networks under recognisers, and what is taken of them."""
