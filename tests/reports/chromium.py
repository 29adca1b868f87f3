"""Finds a Chromium and starts it without a window."""

import os
import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def launch(driver):
    """A browser of playwright's `driver`.

    It is RLVER_JAX_CHROMIUM, one on the PATH (Debian's package `chromium`), or the one that playwright has installed.

    Raises:
        FileNotFoundError: there is none of them.
    """
    own = driver.chromium.executable_path
    path = os.environ.get("RLVER_JAX_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), own)
    if not Path(path).exists():
        raise FileNotFoundError(
            f"no Chromium: none of {', '.join(NAMES)} is on the PATH, and {path} does not exist; install the package "
            f"chromium, or set RLVER_JAX_CHROMIUM to one"
        )
    # As root, and in containers, Chromium's own sandbox cannot start.
    return driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
