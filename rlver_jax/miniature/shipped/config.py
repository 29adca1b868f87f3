"""The miniature in this folder.

Use: python -m rlver_jax.train --config=THIS_FILE --workdir=DIR    (:ppo, :direct, :final, :challenging, or joined)
"""

from pathlib import Path

from rlver_jax.miniature.settings import miniature_config


def get_config(arg=""):
    """`arg` joins any of ppo, direct, final, challenging with commas."""
    return miniature_config(arg, Path(__file__).parent)
