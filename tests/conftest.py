"""Shared fixtures. Eight fake CPU devices are made before JAX starts, so that every test can build a mesh."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Folder of the real Qwen2.5-0.5B checkpoint, named by RLVER_JAX_CHECKPOINT."""
    folder = os.environ.get("RLVER_JAX_CHECKPOINT", "")
    if not folder or not (Path(folder) / "model.safetensors").exists():
        pytest.skip("no real checkpoint: set RLVER_JAX_CHECKPOINT to a Qwen2.5-0.5B folder")
    return Path(folder)


@pytest.fixture(scope="session")
def published() -> Path:
    """Folder of RLVER's published profiles: RLVER_JAX_PROFILES, else ../shared/data/rlver beside the clone."""
    default = ROOT.parent / "shared" / "data" / "rlver"
    folder = Path(os.environ.get("RLVER_JAX_PROFILES", default))
    if not (folder / "train_profile.jsonl").exists():
        pytest.skip(f"no published profiles in {folder}: set RLVER_JAX_PROFILES")
    return folder
