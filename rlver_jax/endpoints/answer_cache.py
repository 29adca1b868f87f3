"""What endpoints have answered, on disk: an interrupted evaluation pays for no answer twice.

One SQLite file. A key is the exact request (address, body and the seed of the request in the evaluation), so any change
of model, prompt or setting asks anew. Headers are not kept, hence no API key.
"""

import hashlib
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

from rlver_jax.endpoints.completion import parsed


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
        self.path = path
        self._rejected: set[str] = set()  # keys of answers that are kept but cannot be used
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
            self._file.text_factory = bytes  # a damaged row may hold anything
            self._file.execute("PRAGMA journal_mode=WAL")  # an answer is written as soon as `put` returns, and stays
            self._file.execute("PRAGMA synchronous=NORMAL")  # if the process is killed; a power cut may lose the newest
            self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, request TEXT, answer TEXT)")
            self._file.execute("SELECT key, request, answer FROM answers LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            raise ValueError(
                f"{path}: cannot be used as the cache of answers ({error}); remove it, or name another file with "
                f"--config.remote.cache=FILE"
            ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The response, a JSON object, if there is one; what cannot be read is reported and passed over.

        Raises:
            ValueError: the file is damaged.
        """
        row = self._execute("SELECT answer FROM answers WHERE key = ?", key).fetchone()
        if row is None or key in self._rejected:
            return None
        answer = parsed(row[0].decode("utf-8", "replace")) if isinstance(row[0], bytes) else None
        if not isinstance(answer, dict):
            self.reject(key, "it is no JSON object")
            return None
        return answer

    def reject(self, key: str, why: str) -> None:
        """Has the next answer replace one that cannot be used."""
        if not self._rejected:
            message = (
                f"{self.path}: a kept answer cannot be used ({why}); it is asked for again, as are any others like it"
            )
            print(message, file=sys.stderr)
        self._rejected.add(key)

    def put(self, key: str, body: dict[str, Any], answer: dict[str, Any]) -> None:
        """Keeps an answer; of two to the same request the first stays, unless it cannot be used.

        Raises:
            ValueError: the file cannot be written.
        """
        request, text = (json.dumps(x, ensure_ascii=True) for x in (body, answer))
        conflict = "REPLACE" if key in self._rejected else "IGNORE"
        self._execute(f"INSERT OR {conflict} INTO answers VALUES (?, ?, ?)", key, request, text)
        self._rejected.discard(key)

    def _execute(self, statement: str, *values: str) -> sqlite3.Cursor:
        try:
            return self._file.execute(statement, values)
        except sqlite3.Error as error:
            raise ValueError(
                f"{self.path}: the cache of answers cannot be read or written ({error}); where it is damaged, move it "
                f"away, or name another file with --config.remote.cache=FILE"
            ) from error

    def __len__(self) -> int:
        return self._file.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Closes the file; what stands in its journal is merged into it."""
        self._file.close()
