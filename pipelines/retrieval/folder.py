"""A folder of tables: `data/` by shards, side tables beside it, manifest, `_SUCCESS` last; as other jobs' outputs are.

These jobs take seconds to minutes and are pure functions of their input, so a killed run is run again from the start; what
it left is replaced, and nothing is taken for finished before `_SUCCESS` stands there.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import OutputError
from schemas.fingerprint import config_hash, schema_fingerprint
from transforms.shards.files import Folder, file_fingerprint

MANIFEST, SUCCESS, JOB = "manifest.json", "_SUCCESS", "_tamis/job.json"
ROW_GROUP = 65_536
TABLES = (
    "data", "queries", "corpus", "pool", "dead", "mask", "dropped", "rejected", "recall", "report.html", "README.md",
)  # fmt: skip


class TableFolder:
    """An output folder.

    Args:
        url: Where.
        job: `judgments import`, `groups`.
        config: Settings that decide what comes out, with the fingerprints of what is read.
        overwrite: Replace what other settings left.
        options: fsspec options of the filesystem.

    Raises:
        OutputError: The folder holds something else.
    """

    def __init__(
        self,
        url: str,
        job: str,
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Folder(url, **(options or {}))
        self.job, self.config = job, dict(config)
        self.config_hash = config_hash({"job": job, **self.config})
        self._shards: list[dict[str, Any]] = []
        self._sides: list[dict[str, Any]] = []
        self._check(overwrite)

    @property
    def finished(self) -> dict[str, Any] | None:
        """The manifest, where these very settings have been run to the end; else None."""
        if not (self.folder.exists(SUCCESS) and self.folder.exists(MANIFEST)):
            return None
        manifest = orjson.loads(self.folder.read(MANIFEST))
        same = manifest.get("config_hash") == self.config_hash
        there = all(self.folder.exists(f"data/{s['path']}") for s in manifest.get("shards", []))
        return manifest if same and there else None

    def start(self) -> None:
        """Clear what an earlier run left and say whose folder this is."""
        for name in (SUCCESS, MANIFEST):
            self.folder.remove(name)
        for name in TABLES:  # and nothing else: what people put beside them is theirs
            self.folder.remove(name)
        source = self.config.get("source") or self.config.get("judgments") or ""
        job = {
            "job": self.job,
            "name": self.job,
            "source": source if isinstance(source, str) else ", ".join(source),
            "config_hash": self.config_hash,
        }
        self.folder.write(JOB, orjson.dumps(job))

    def write(
        self, table: str, name: str, rows: pa.Table | Iterable[pa.RecordBatch], schema: pa.Schema
    ) -> int:
        """Write one Parquet file `<table>/<name>`; the files of `data` are the manifest's shards.

        Returns:
            Rows written.
        """
        batches = rows.to_batches(ROW_GROUP) if isinstance(rows, pa.Table) else rows
        count = 0
        path = f"{table}/{name}"
        with self.folder.publish(path) as temporary:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for batch in batches:
                    writer.write_batch(batch)
                    count += batch.num_rows
            with temporary.open("rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            size = temporary.stat().st_size
        entry = {
            "path": name if table == "data" else path,
            "rows": count,
            "bytes": size,
            "sha256": sha,
            "schema": schema_fingerprint(schema),
        }
        (self._shards if table == "data" else self._sides).append(entry)
        return count

    def write_text(self, name: str, text: str) -> None:
        """Write a page or a card."""
        self.folder.write(name, text.encode("utf-8"))

    def finish(self, totals: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
        """Write the manifest and, last, `_SUCCESS`.

        Args:
            totals: Counts.
            **facts: Notes, lineage, what else belongs to the record.

        Returns:
            The manifest.
        """
        now = datetime.datetime.now(datetime.UTC)
        run_id = f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
        manifest = {
            "job": self.job,
            "run_id": run_id,
            "tamis_version": importlib.metadata.version("tamis"),
            "finished": now.isoformat(timespec="seconds"),
            "config": self.config,
            "config_hash": self.config_hash,
            "totals": dict(totals),
            "shards": self._shards,
            "tables": self._sides,
            "companions": [],
            **facts,
        }
        self.folder.write(MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
        self.folder.write(SUCCESS, run_id.encode() + b"\n")
        return manifest

    def _check(self, overwrite: bool) -> None:
        held = None
        if self.folder.exists(JOB):
            held = orjson.loads(self.folder.read(JOB))
        elif self.folder.exists() and self.folder.find():
            raise OutputError(f"{self.folder.url} is not empty ({self.folder.find()[0]}); pass another -o")
        if held is None:
            return
        if held.get("job") != self.job:
            raise OutputError(
                f"{self.folder.url} holds the output of `tamis {held.get('job')}`; pass another -o"
            )
        finished = self.folder.exists(SUCCESS)
        if finished and held.get("config_hash") != self.config_hash and not overwrite:
            raise OutputError(
                f"{self.folder.url} was made with other settings or from other input; pass --overwrite, or another -o"
            )


def input_fingerprints(url: str, options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Name -> fingerprint of every file an input is made of; one that names the same bytes names the same work."""
    from transforms.retrieval.formats.base import Source

    source = Source.open(url, dict(options or {}))
    return {name: file_fingerprint(source.folder, name) for name in source.files()}
