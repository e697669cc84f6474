"""All use of Ray: packing and folds as Ray tasks, pretraining under Ray Train, feeders and probes as actors."""
