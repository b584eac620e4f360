"""The request cache: what a model was asked and what it answered, by content, so nothing is paid for twice.

Keys are digests of everything the answer depends on (model tag, prompt, sampling, seed, text), never of row numbers
or shards; so the cache survives a crash, a resharding and a changed threshold. On a local folder it is one SQLite
file in WAL mode, which several worker processes share; on an object store each entry is an object, because an entry
costs a model call, beside which one small request is nothing.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock

from schemas.errors import OutputError
from transforms.shards.files import read_objects

_FILE = "answers.sqlite"
_PATIENCE = 60  # seconds to wait for another process
_CHUNK = 500  # SQLite's bound on parameters is 999 in old builds


class RequestCache:
    """Content-addressed store of model answers.

    Args:
        url: A local folder or any fsspec URL; made when the first entry is put.
        options: fsspec options of its filesystem.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.options = options
        self.hits = 0
        self.misses = 0
        self._local = threading.local()
        self._fs, self._root = fsspec.core.url_to_fs(url, **options)
        self._sqlite = isinstance(self._fs, fsspec.get_filesystem_class("file"))

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Look keys up; the answer for each, in order, None where there is none.

        Raises:
            OutputError: The cache is damaged, or cannot be read.
        """
        with self._guard():
            found = self._get_sqlite(keys) if self._sqlite else self._get_objects(keys)
        out = [found.get(k) for k in keys]
        self.hits += sum(v is not None for v in out)
        self.misses += sum(v is None for v in out)
        return out

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        """Store answers; once this returns, killing the process does not lose them.

        Raises:
            OutputError: The disk is full, or the cache is damaged.
        """
        if not items:
            return
        with self._guard():
            if self._sqlite:
                with self._connection() as connection:
                    connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", list(items.items()))
            else:
                self._fs.pipe({self._object(k): v for k, v in items.items()})

    def __len__(self) -> int:
        with self._guard():
            if self._sqlite:
                return int(self._connection().execute("SELECT count(*) FROM answers").fetchone()[0])
            return len(self._fs.find(self._root)) if self._fs.exists(self._root) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], **state["options"])  # type: ignore[misc]

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """A cache that fails is no row's fault: without this a full disk would kill every row that asks."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            where = f"{self._root}/{_FILE}" if self._sqlite else self.url
            damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(
                error, sqlite3.OperationalError
            )
            advice = "remove it" if damaged else "mend the cause"
            raise OutputError(
                f"the request cache {where} cannot be used: {error}; {advice} and run the same command again"
            ) from error

    def _object(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._root}/{name[:2]}/{name}"

    def _get_objects(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        unique = list(dict.fromkeys(keys))
        answers = read_objects(self._fs, [self._object(k) for k in unique])
        return {k: answer for k, answer in zip(unique, answers, strict=True) if answer is not None}

    def _get_sqlite(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        unique = list(dict.fromkeys(keys))
        for i in range(0, len(unique), _CHUNK):
            part = unique[i : i + _CHUNK]
            marks = ",".join("?" * len(part))
            found.update(
                self._connection().execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part)
            )
        return found

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            Path(self._root).mkdir(parents=True, exist_ok=True)
            # Of two processes that switch a new file to WAL at one moment, SQLite refuses one at once, whatever the
            # timeout (each would wait for the other), so they open it one after the other.
            with FileLock(Path(self._root) / f"{_FILE}.lock", timeout=_PATIENCE, poll_interval=0.01):
                connection = sqlite3.connect(Path(self._root) / _FILE, timeout=_PATIENCE)
                connection.execute("PRAGMA journal_mode=WAL")
                # NORMAL in WAL mode: a killed process loses nothing; only a power cut may lose the last few answers.
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer BLOB NOT NULL) WITHOUT ROWID"
                )
            self._local.connection = connection
        return connection
