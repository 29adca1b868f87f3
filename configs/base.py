"""Every field of a config, re-exported: they are documented in rlver_jax/config/fields.py.

Use: python -m rlver_jax.evaluate --config=configs/base.py --config.policy.path=DIR --config.user.path=DIR …

Other configs here call `get_config` and change a few fields. A field that is not there does not exist.
"""

from rlver_jax.config.fields import CHALLENGING, get_config, words

__all__ = ["CHALLENGING", "get_config", "words"]
