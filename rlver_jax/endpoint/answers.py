"""What endpoints have answered, on disk: an interrupted evaluation pays for no answer twice.

One SQLite file. A key is the exact request (address, body and the seed of its place in the evaluation), so any change
of model, prompt or setting asks anew. Headers are not kept, hence no API key.
"""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any


def request_key(url: str, body: dict[str, Any], seed: int) -> str:
    """SHA-256 of a request in canonical JSON."""
    text = json.dumps([url, body, seed], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class AnswerCache:
    """Answers by request; several processes may share the file. Use as a context manager, or `close`."""

    def __init__(self, path: str | Path | None):
        """Opens or makes the file; with None answers are kept as long as the process lives.

        Raises:
            ValueError: it is there but is no such cache, or cannot be written.
        """
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
            self._file.execute("PRAGMA journal_mode=WAL")  # an answer is on disk as soon as `put` returns
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT, answer TEXT)")
            self._file.execute("SELECT key, request, answer FROM answers LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(
                f"{path}: cannot be used as the cache of answers ({error}); remove it, or name another file with "
                f"--config.remote.cache=FILE"
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The response's JSON object, if the request has been answered."""
        row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, body: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keeps an answer; of two to the same request the first stays."""
        request, text = (json.dumps(x, ensure_ascii=True) for x in (body, answer))
        self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, request, text))

    def __len__(self) -> int:
        return self._file.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file; what stands in its journal is merged into it."""
        self._file.close()
