"""Sampling primitives: a ragged cache, append, generate, choose, rollback, grammars and guided scripts."""
