"""The dialogues of tests/dialogues, for what is counted of them."""

from tests.dialogues.conftest import *  # noqa: F403 - fixtures
