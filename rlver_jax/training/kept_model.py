"""What a run keeps of its base model beside the policy's weights: config and tokenizer, in WORKDIR/model.

With it a run's folder is whole: the policy can be exported, served and evaluated, and the run resumed, after the base
model's folder has moved. They are small files; the weights are those of the checkpoints.
"""

import shutil
from pathlib import Path

from rlver_jax.config.hub import HubError, is_name, local_folder
from rlver_jax.config.validate import is_folder
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import copy_tokenizer
from rlver_jax.rollout.agents import check_tokenizers
from rlver_jax.text.tokenizer import load_tokenizer

FOLDER, CONFIG = "model", "config.json"
# What weights fit and mean; positions and their scaling may be set anew for longer contexts.
_FIXED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("rope_theta", "rms_norm_eps", "tie_embeddings"),
)


def base_folder(path: str) -> Path | None:
    """The local folder of a model that a config names, with its config and tokenizer; None where it is gone."""
    try:
        return local_folder(path) if is_name(path) or is_folder(path) else None
    except HubError:
        return None


def kept_model(workdir: Path) -> Path | None:
    """The folder that `keep_model` wrote; None for a run of an older version."""
    folder = workdir / FOLDER
    return folder if (folder / CONFIG).is_file() else None


def keep_model(workdir: Path, source: str | Path) -> None:
    """Copies what is needed of a Hugging Face folder; whole or not at all. Without a config.json there it does nothing.

    Raises:
        OSError: it cannot be read or written.
    """
    source, folder = Path(source), workdir / FOLDER
    new = folder.with_name(FOLDER + ".tmp")
    if not (source / CONFIG).is_file():
        return
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    shutil.copyfile(source / CONFIG, new / CONFIG)
    copy_tokenizer(source, new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def check_same_model(folder: str | Path, own: str | Path) -> None:
    """Refuses a folder that a run's weights or tokens don't belong to.

    Args:
        folder: a Hugging Face folder that shall replace `own`, with or without weights.
        own: the folder with the run's own config and tokenizer.

    Raises:
        ValueError, OSError: another architecture or tokenizer; or one of them cannot be read.
    """
    theirs, ours = Qwen2Config.from_hf(folder), Qwen2Config.from_hf(own)
    differ = [
        f"{name} is {getattr(theirs, name)}, not {getattr(ours, name)}"
        for name in _FIXED
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if differ:
        raise ValueError(
            f"policy.path={str(folder)!r} is another model than the run's, which is described in {own} "
            f"({'; '.join(differ)}); give the folder that the run was trained from, or none"
        )
    try:
        check_tokenizers(load_tokenizer(folder), load_tokenizer(own))
    except ValueError as error:
        raise ValueError(
            f"policy.path={str(folder)!r} has another tokenizer than the run, whose own lies in {own} ({error})"
        ) from error
