"""JSON files that are whole at any moment: written beside, then put in their place."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes `value`; a reader finds the old file or the new one, never a part."""
    new = path.with_name(path.name + ".tmp")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)
