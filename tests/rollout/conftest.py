"""The dialogues that a script plays are those of tests/dialogues."""

from tests.dialogues.conftest import played, played_profiles, played_records

__all__ = ["played", "played_profiles", "played_records"]
