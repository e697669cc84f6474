"""`cpcscale sweep`: hyper-parameters of fine-tuning, searched with Ray Tune."""
