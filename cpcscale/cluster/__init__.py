"""The one door to Ray: packing as tasks, pretraining under Ray Train, folds as tasks, sweeps under Ray Tune."""
