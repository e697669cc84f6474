"""A checkpoint to a recogniser of activation, valence and dominance, and its honest score."""
