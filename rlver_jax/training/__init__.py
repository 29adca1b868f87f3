"""Training: setup, the loop, checkpoints, metrics, alarms, and a policy restored from a run."""
