"""Prompts of the user and the policy as files, a folder a language; `load_prompts` reads and checks them."""

from rlver_jax.config.languages import LANGUAGES
from rlver_jax.decoding.script import Part, parse_script
from rlver_jax.user.prompts.load import (
    FILES,
    MODES,
    POLICY_PROMPTS,
    SCENARIOS,
    STYLES,
    Intention,
    Prompts,
    load_prompts,
)

__all__ = [
    "FILES",
    "LANGUAGES",
    "MODES",
    "POLICY_PROMPTS",
    "SCENARIOS",
    "STYLES",
    "Intention",
    "Part",
    "Prompts",
    "load_prompts",
    "parse_script",
]
