"""RLVER in JAX: reinforcement learning of empathetic language models against a simulated user."""

__version__ = "0.1.0"
