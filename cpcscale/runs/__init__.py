"""The protocol of a run's folder: who holds it, which checkpoints count, what probes scored. No torch, no Ray."""
