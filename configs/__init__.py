"""Configs: each changes a few fields of `base.py`; `rlver train --helpfull` lists every field with its meaning."""
