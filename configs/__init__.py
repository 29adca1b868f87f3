"""Configs: `base.py` documents every field; each other file changes a few lines of it."""
