"""Texts of the documents that are put up for judgment, looked up by id: one file beside the job, read by every worker.

The corpus is passed over once and only what some pool names is kept, so looking a passage up costs a worker no pass over
the corpus and no document text crosses a shuffle.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InputError
from schemas.fingerprint import digest, fingerprint
from transforms.retrieval.collection import Documents
from transforms.shards.files import Folder

FILE = "texts.sqlite"
_CHUNK = 500  # SQLite's bound on parameters is 999 in old builds
# Fingerprints of documents are added up: a sum does not depend on the order they come in.
_MODULUS = 1 << 128


class TextStore:
    """Titles and texts by document id.

    Args:
        folder: Folder that holds `texts.sqlite`; from an object store the file is copied once a process.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._local = threading.local()
        self._copy: tempfile.TemporaryDirectory[str] | None = None

    def __getstate__(self) -> dict[str, Folder]:
        return {"folder": self._folder}

    def __setstate__(self, state: dict[str, Folder]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def get(self, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
        """(title, text) of each document that is there; what is not there is not in the result."""
        found: dict[str, tuple[str, str]] = {}
        unique = list(dict.fromkeys(ids))
        for start in range(0, len(unique), _CHUNK):
            part = unique[start : start + _CHUNK]
            marks = ",".join("?" * len(part))
            query = f"SELECT doc_id, title, text FROM texts WHERE doc_id IN ({marks})"
            for doc_id, title, text in self._connection().execute(query, part):
                found[doc_id] = (title or "", text or "")
        return found

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(f"file:{self._place()}?mode=ro&immutable=1", uri=True)
            self._local.connection = connection
        return connection

    def _place(self) -> Path:
        if self._folder.is_local:
            return self._folder.local(FILE)
        if self._copy is None:
            self._copy = tempfile.TemporaryDirectory(prefix="tamis-texts-")
            with self._folder.open(FILE) as source, (Path(self._copy.name) / FILE).open("wb") as target:
                shutil.copyfileobj(source, target)
        return Path(self._copy.name) / FILE


def build_texts(folder: Folder, documents: Documents, wanted: Iterable[str]) -> tuple[str, list[str]]:
    """Keep the texts of some documents, by one pass over all of them.

    Args:
        folder: Where `texts.sqlite` goes.
        documents: All documents; the first of several of one id counts.
        wanted: Ids that are looked for.

    Returns:
        A fingerprint of what was kept (ids, titles and texts, whatever their order), and the ids not found, sorted.

    Raises:
        InputError: Not one of them is there: this is another corpus.
    """
    ids = pa.array(sorted(set(wanted)), pa.string())
    total, seen = 0, set()
    with folder.publish(FILE) as temporary:
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=OFF")
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute(
                "CREATE TABLE texts (doc_id TEXT PRIMARY KEY, title TEXT, text TEXT) WITHOUT ROWID"
            )
            connection.execute("BEGIN")
            for batch in documents():
                chosen = batch.filter(pc.is_in(batch.column("doc_id"), ids)).select(
                    ["doc_id", "title", "text"]
                )
                for doc_id, title, text in zip(*(c.to_pylist() for c in chosen.columns), strict=True):
                    if doc_id in seen:
                        continue
                    seen.add(doc_id)
                    part = digest("document", doc_id, title or "", text or "")
                    total = (total + int.from_bytes(part, "little")) % _MODULUS
                    connection.execute("INSERT INTO texts VALUES (?, ?, ?)", (doc_id, title, text))
            connection.execute("COMMIT")
        finally:
            connection.close()
    missing = [i for i in ids.to_pylist() if i not in seen]
    if len(ids) and not seen:
        raise InputError(
            f"the corpus holds none of the pool's {len(ids):,} documents (the first is '{ids[0].as_py()}'); "
            "pass the corpus they come from (--corpus)"
        )
    return fingerprint("texts", str(total), *missing), missing
