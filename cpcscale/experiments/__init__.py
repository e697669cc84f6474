"""The drivers of the verbs: each checks its config, holds the run's lease and starts the tracked run."""
