"""Models by name: a local folder, or a repository on the Hugging Face hub, fetched once into the shared cache.

A name is ORG/NAME or ORG/NAME@REVISION (a branch, a tag or a commit). What the cache holds is used as it is, without
asking the hub again: a run that is started twice reads the same weights, and needs no network the second time.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlver_jax.config import paths
from rlver_jax.config.foreign_weights import INDEX_FILE, SINGLE_FILE, foreign_kind
from rlver_jax.parallel import distributed

# What belongs to a model beside its config and weights, as far as it has them: tokenizer, templates, generation config.
# `vocab.json` and `merges.txt` are for other readers of an export.
TEXT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja", "generation_config.json"),
)
_SMALL = ["config.json", INDEX_FILE, *TEXT_FILES]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.+-][\w./+-]*)?", re.ASCII)
_NO_NAME = re.compile(r"--|\.\.|\.git(@|$)|\.(py|json|jsonl|safetensors|model|gguf)$|//|/$")
_CACHED = re.compile(r"models--(?P<org>[\w.-]+?)--(?P<name>[\w.-]+)", re.ASCII)
_ADDRESS = re.compile(r"((https?://)?(www\.)?(huggingface\.co|hf\.co)/|hf://(models/)?)(?P<name>[\w.-]+/[\w.-]+)(/.*)?")
_WAIT = 10  # seconds for the hub's first answer


class HubError(ValueError):
    """A model that is neither a local folder nor can be fetched; the message says what to do."""


def is_name(path: str | Path) -> bool:
    """Whether it is taken for a name on the hub: it has the form of one, and nothing local has that name."""
    text = str(path)
    return bool(_NAME.fullmatch(text)) and not _NO_NAME.search(text) and not os.path.lexists(text)


def fault(path: str) -> str:
    """Why a path can be no model: neither a folder nor a name on the hub; empty where it may be one."""
    if is_name(path):
        return ""
    if match := _ADDRESS.fullmatch(path):
        return f"is an address; write the model's name on the Hugging Face hub, {match['name']}"
    if os.path.isdir(path):
        return _of_cache(Path(path))
    if is_name(bare := path.rstrip("/")):
        return f"no such folder; for the model of that name on the Hugging Face hub write {bare}"
    what = "is a file, expected a folder" if os.path.exists(path) else "no such folder"
    close = paths.nearest(path, Path.is_dir)
    hint = f"; did you mean {close}?" if close else ""
    return f"{what}{hint or ', and no name on the Hugging Face hub, such as Qwen/Qwen2.5-7B-Instruct'}"


def local_folder(path: str | Path, *, weights: bool = False) -> Path:
    """The folder of a model; one on the hub is fetched if the cache doesn't hold it.

    Only what is needed is fetched: config, tokenizer, chat template, and safetensors where `weights` are asked for.
    HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count as everywhere. Equal calls of a process are
    answered from memory.

    Args:
        path: a local folder or file, returned as it is, or a name on the hub.
        weights: whether to have the weights there too; else config and tokenizer alone.

    Raises:
        HubError: it is a folder of another kind, or the hub doesn't give it.
    """
    if is_name(path):
        return Path(_fetched(str(path), weights, *_environment()))
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        if what := _of_cache(folder):
            raise HubError(f"{folder}: {what}")
        if what := foreign_kind((file.name for file in folder.iterdir()), folder):
            raise HubError(f"{folder}: no config.json, but {what}")
    return folder


def fetch(models: Mapping[str, tuple[str, bool]]) -> None:
    """Fetches models of the hub, before anything else is slow.

    Every process calls it, since each has a cache or shares one; a branch must mean the same commit to all.

    Args:
        models: for what, e.g. "policy": path or name, and whether weights are needed.

    Raises:
        ValueError: one cannot be had; `HubError` on the process where that is so.
    """
    named = {what: model for what, model in models.items() if is_name(model[0])}
    commits = distributed.all_or_none(
        lambda: {what: local_folder(path, weights=weights).name for what, (path, weights) in named.items()}
    )
    distributed.check_same("the commits of models on the Hugging Face hub", commits)


def short_name(path: str | Path) -> str:
    """What to call a model in a few words: the name of its folder, or of its repository without the owner."""
    if is_name(path):
        return str(path).partition("@")[0].rpartition("/")[2]
    folder = Path(path).resolve()
    cached = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return cached["name"] if cached else folder.name


def _of_cache(folder: Path) -> str:
    """What to name instead of a cache's `models--ORG--NAME`, or a folder in it; empty for any other folder."""
    folder = folder.absolute()
    top = folder.parent if folder.name in ("snapshots", "blobs", "refs") else folder
    match = _CACHED.fullmatch(top.name)
    if not match or not (top / "snapshots").is_dir():
        return ""
    snapshots = sorted(str(one) for one in (top / "snapshots").iterdir())
    ref = top / "refs" / "main"
    current = top / "snapshots" / ref.read_text(encoding="utf-8").strip() if ref.is_file() else None
    one = str(current) if current and current.is_dir() else ", ".join(snapshots[:3]) or "(there is none: fetch it)"
    return f"is a cached repository of the Hugging Face hub; name {match['org']}/{match['name']}, or its folder {one}"


def _environment() -> tuple[str, str, bool]:
    """(cache, address of the hub, whether it may not be asked), as the variables are now; "" is the library's own."""
    get = os.environ.get
    home = get("HF_HOME")
    cache = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or (os.path.join(home, "hub") if home else "")
    if what := paths.fault(cache):
        raise HubError(f"HF_HOME or HF_HUB_CACHE names the cache {cache}, but that {what}")
    true = ("1", "on", "yes", "true")
    offline = any(get(name, "").lower() in true for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return os.path.expanduser(os.path.expandvars(cache)), get("HF_ENDPOINT", ""), offline


@functools.cache
def _fetched(name: str, weights: bool, cache: str, endpoint: str, offline: bool) -> Path:
    """The snapshot of a name on the hub; see `local_folder`."""
    repository, _, revision = name.partition("@")
    cached = _cached(repository, revision, cache, weights)
    if cached is not None:
        return cached
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{name!r}: no such folder, so it was taken for a model on the Hugging Face hub, but HF_HUB_OFFLINE is "
            f"set and the cache {cache or constants.HF_HUB_CACHE} doesn't hold {_parts(weights)} of it. "
            f"{_otherwise(name)}"
        )
    try:
        return _download(repository, revision, cache, endpoint, weights)
    except HubError:
        raise
    except Exception as error:  # of three libraries below, each with its own kinds
        raise HubError(f"{name!r}: {_explained(error, name, endpoint, cache)}") from error


def _cached(repository: str, revision: str, cache: str, weights: bool) -> Path | None:
    """A snapshot in the cache that holds all that is asked for; without any request."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options: dict[str, Any] = {"revision": revision or None, "cache_dir": cache or None, "local_files_only": True}
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_SMALL, **options))
    except LocalEntryNotFoundError:
        return None
    return folder if _complete(folder, weights) else None


def _complete(folder: Path, weights: bool) -> bool:
    """Whether a snapshot, whose links may lead nowhere, holds a model; what files hold is their readers' matter."""
    files = [file.name for file in folder.iterdir() if file.is_file()]
    return _holds(files, weights) and (not weights or SINGLE_FILE in files or set(_weights(folder)) <= set(files))


def _holds(files: Collection[str], weights: bool) -> bool:
    """Whether among files are a config, a tokenizer, and weights where they are asked for."""
    has_tokenizer = "tokenizer.json" in files or any(file.endswith(".model") for file in files)
    return "config.json" in files and has_tokenizer and (not weights or SINGLE_FILE in files or INDEX_FILE in files)


def _weights(folder: Path) -> list[str]:
    """Files of the weights: those that the index lists, or the single one."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return [SINGLE_FILE]
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({file for file in files if re.fullmatch(r"[^/\\]+\.safetensors", file)}) or [SINGLE_FILE]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [SINGLE_FILE]  # the reader of the weights says what is wrong with the index


def _download(repository: str, revision: str, cache: str, endpoint: str, weights: bool) -> Path:
    """Fetches config and tokenizer, and then the weights of the very same commit."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi(endpoint=endpoint or None).model_info(repository, revision=revision or None, timeout=_WAIT)
    names = [file.rfilename for file in info.siblings or []]
    if kind := foreign_kind(names, repository):
        raise HubError(f"{repository!r}: {kind}")
    if not _holds(names, weights):
        raise HubError(
            f"{repository!r}: the repository doesn't hold {_parts(weights)}, but {', '.join(names[:10])}; name that of "
            f"a Qwen2.5 or Qwen3 model"
        )
    where: dict[str, Any] = {"cache_dir": cache or None, "endpoint": endpoint or None}
    folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=_SMALL, **where))
    if weights:
        where |= {"revision": folder.name, "allow_patterns": [*_SMALL, *_weights(folder)]}
        _check_room(repository, snapshot_download(repository, dry_run=True, **where), folder)
        snapshot_download(repository, **where)
    return folder


def _check_room(repository: str, files: list[Any], folder: Path) -> None:
    needed, free = sum(file.file_size for file in files if file.will_download), shutil.disk_usage(folder).free
    if needed > free:
        raise HubError(
            f"{repository!r}: {needed / 1e9:.1f} GB are still to be fetched, but the disk of {folder.parents[2]} has "
            f"{free / 1e9:.1f} GB free; make room, or name another cache with HF_HUB_CACHE"
        )


def _parts(weights: bool) -> str:
    return "config.json, a tokenizer and safetensors" if weights else "config.json and a tokenizer"


def _otherwise(name: str) -> str:
    return (
        f"Fetch it where there is a network (hf download {name.partition('@')[0]}) and bring that cache along "
        f"(HF_HOME), or name a local folder"
    )


def _explained(error: Exception, name: str, endpoint: str, cache: str) -> str:
    """What went wrong, and the remedy."""
    from huggingface_hub import constants

    hub, (repository, _, revision) = endpoint or constants.ENDPOINT, name.partition("@")
    taken = "no such folder, so it was taken for a model on the Hugging Face hub"
    close = paths.nearest(name, Path.is_dir)
    hint = f". Did you mean {close}?" if close else ""
    kinds = {one.__name__ for one in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"its owner gives access on request; ask at {hub}/{repository}, and set HF_TOKEN to a token of that account"
        )
    if "RevisionNotFoundError" in kinds:
        return (
            f"{repository} has no branch, tag or commit {revision or 'main'!r}; {hub}/{repository}/tree/main lists them"
        )
    if "RepositoryNotFoundError" in kinds or _status(error) in (401, 403, 404):
        return (
            f"{taken}, which has none of that name ({hub}/{repository}), or shows it to some only: check the name, or "
            f"set HF_TOKEN for a private one{hint}"
        )
    if isinstance(error, OSError) and error.errno in (28, 122):  # no space, quota
        return f"no room in the cache {cache or constants.HF_HUB_CACHE}; make room, or name another with HF_HUB_CACHE"
    if isinstance(error, PermissionError):
        return f"the cache cannot be written to ({error}); name another with HF_HUB_CACHE"
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]
    return (
        f"{taken}, but {hub} could not be reached or didn't send it ({type(error).__name__}: {reason}). "
        f"The same command resumes it. {_otherwise(name)}{hint}"
    )


def _status(error: Exception) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)
