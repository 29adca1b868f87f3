"""What the answers of a judge depend on."""

from typing import Any

import jax
from ml_collections import ConfigDict

from rlver_jax.config.validate import endpoint_sides, flatten
from rlver_jax.evaluation.folder import at_endpoint
from rlver_jax.profiles.intentions import HIDDEN_INTENTIONS
from rlver_jax.profiles.schema import Profile
from rlver_jax.runs.fingerprints import model_fingerprint, texts_fingerprint

_WITHOUT_EFFECT = ("user.path", "user.prompts", "user.reply_temperature", "emotion.initial")


def judge_settings(config: ConfigDict) -> dict[str, Any]:
    """Everything that a judge's answers depend on; models on the device and prompts by fingerprint, wherever they lie.

    Raises:
        ValueError, OSError: no model or no prompts where the config says.
    """
    flat = {name: value for name, value in flatten(config).items() if name.split(".")[0] in ("user", "emotion")}
    for name in _WITHOUT_EFFECT:
        flat.pop(name)
    # The user's system prompt as it is written for each known wish; real profiles are part of the dialogues.
    probes = [Profile(one.key, "persona", "scene", one.chinese, "") for one in HIDDEN_INTENTIONS]
    flat |= {"data.language": config.data.language, "fingerprint.texts": texts_fingerprint(config, probes)}
    if "user" in endpoint_sides(config):
        return at_endpoint(flat, config, "user")  # with user.reply_tokens, which bounds an answer's length too
    flat.pop("user.reply_tokens")
    return flat | {"backend": jax.default_backend(), "fingerprint.user": model_fingerprint(config.user, "user")}
