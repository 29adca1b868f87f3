"""Qwen2.5 and Qwen3 as a functional Flax model, a value head, and weights on disk."""
