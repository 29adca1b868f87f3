"""Qwen2.5 as a functional Flax model, its value head, and its weights on disk."""
