"""RLVER in JAX: reinforcement learning of empathetic language models against a simulated user."""
