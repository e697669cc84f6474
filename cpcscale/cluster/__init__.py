"""All use of Ray: tasks (where not in local processes), pretraining under Ray Train, feeders and probes as actors."""
