"""Audio files to immutable WebDataset tars and the index that names every utterance in them."""
