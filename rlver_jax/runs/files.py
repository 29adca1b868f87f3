"""Files that are whole at any moment: written beside, then put in their place."""

import json
import os
from pathlib import Path
from typing import Any


def json_line(value: Any, **options: Any) -> bytes:
    """JSON in UTF-8 with a line end; half characters, as names of files may hold, become JSON's escapes.

    Args:
        options: of `json.dumps`.
    """
    return (json.dumps(value, ensure_ascii=False, **options) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes `value`; a reader finds the old file or the new one, never a part."""
    write_text(path, json_line(value, indent=1).decode("utf-8"))


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file; a reader finds the old one or the new one, never a part."""
    new = path.with_name(path.name + ".tmp")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)
