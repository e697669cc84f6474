"""cpcscale: contrastive-predictive-coding pretraining for speech emotion, at any size."""

__version__ = "0.2.0"
