"""The training loop of one rank: batches to updates. Works the same under Ray Train, torchrun, a test or alone."""
