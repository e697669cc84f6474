"""Hyper-parameters of fine-tuning by Ray Tune."""
