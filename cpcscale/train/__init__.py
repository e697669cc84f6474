"""One rank's work: batches to updates. Runs under Ray Train, torchrun, a test or alone; knows none of them."""
