"""Audio files become immutable WebDataset tars (shards) and an index of every utterance in them."""
