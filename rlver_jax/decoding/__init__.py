"""Sampling: a ragged KV cache, generation, choice among options, grammars and guided scripts."""
