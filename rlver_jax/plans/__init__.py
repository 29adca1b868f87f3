"""What training a config on a TPU topology would take, from its real programs compiled ahead of time."""
