"""The miniature: a world small enough for two CPU cores, in which the same program that trains 7B really learns.

Use: python -m rlver_jax.train --config=configs/miniature.py --workdir=runs/miniature
     python -m rlver_jax.evaluate --config=configs/miniature.py --checkpoint=runs/miniature --out=runs/miniature_played
     (or ./launch/local.sh, which does both; `miniature.py:ppo` has a critic, `:direct` no thoughts, `:final` RLVER's
     reward, `:challenging` a user that never hints at its wish; they can be joined: `miniature.py:ppo,direct`)

No path is needed: both models, the tokenizer and the profiles lie in the package (rlver_jax/miniature/shipped).
"""

from ml_collections import ConfigDict

from rlver_jax.miniature import assets
from rlver_jax.miniature.settings import miniature_config


def get_config(arg: str = "") -> ConfigDict:
    """`arg` joins any of ppo, direct, final, challenging with commas."""
    return miniature_config(arg, assets.shipped())
