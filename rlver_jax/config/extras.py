"""How to install what is missing: from a clone, until there is a release."""

REINSTALL = "pip install --upgrade -e . in the clone"


def install_command(extra: str) -> str:
    """What installs an extra of setup.py."""
    return f"pip install -e '.[{extra}]' in the clone"
