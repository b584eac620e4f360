"""Searching an index that `build` made: memory-mapped parts, hits merged, ids looked up in a side table."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import OutputError, TamisError
from transforms.embed import faiss_parts
from transforms.embed.exact import METRICS, Hits, Metric, TopK, check_dimension, name_hits, prepare
from transforms.embed.vectors import FloatArray, IntArray, Place
from transforms.shards.files import Folder
from transforms.shards.finish import MANIFEST

ID_ROWS = 65_536  # rows a row group of the side table: what a look-up reads


def metric_of(manifest: Mapping[str, Any], wanted: str = "auto") -> Metric:
    """The metric to compare with: as asked, or the similarity the model was trained for.

    Raises:
        TamisError: There is no such metric, or the model's own has no index.
    """
    if wanted != "auto":
        if wanted not in METRICS:
            raise TamisError(f"no metric '{wanted}'; choose one of: auto, {', '.join(METRICS)}")
        return cast(Metric, wanted)
    names = {"cosine": "cosine", "dot": "dot", "euclidean": "l2"}
    models = [m for m in manifest.get("models", ()) if m.get("kind") == "encoder"]
    similarity = str(models[0].get("extra", {}).get("similarity", "cosine")) if models else "cosine"
    if similarity not in names:
        raise TamisError(f"the model compares by {similarity}, which has no index; pass --metric")
    return cast(Metric, names[similarity])


class VectorIndex:
    """An index as a finished output holds it, memory-mapped.

    Args:
        folder: The output.
        entry: The manifest's entry of the index.
    """

    def __init__(self, folder: Folder, entry: Mapping[str, Any]) -> None:
        self.entry = dict(entry)
        self.dimension = int(entry["dimension"])
        self.metric: Metric = entry["metric"]
        self.size = int(entry["vectors"])
        self._home = folder.child(str(entry["folder"]))
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._parts = [(int(p["first"]), self._open(p)) for p in entry["parts"]]
        self._groups: dict[int, pa.Table] = {}
        self.set_probe(entry.get("probe"))

    @classmethod
    def open(cls, url: str, options: Mapping[str, Any] | None = None) -> VectorIndex:
        """Open the index of an output.

        Raises:
            OutputError: It has none.
        """
        folder = Folder(url, **(options or {}))
        if not folder.exists(MANIFEST):
            raise OutputError(f"{url} is not a finished tamis output; pass the --output of `tamis embed`")
        entry = orjson.loads(folder.read(MANIFEST)).get("index")
        if not entry:
            raise OutputError(f"{url} has no index; run: tamis index {url}")
        return cls(folder, entry)

    def search(self, vectors: FloatArray, k: int, probe: int | None = None) -> Hits:
        """The k nearest vectors.

        Args:
            vectors: float32 (q, dimension); brought to unit length for cosine.
            k: Hits a query.
            probe: How much to look at (IVF lists, HNSW breadth); None takes what reached the recall asked for.

        Returns:
            Hits, best first; scores are of vectors as the index keeps them.

        Raises:
            TamisError: The vectors have another dimension.
        """
        check_dimension(vectors, self.dimension)
        if probe is not None:
            self.set_probe(probe)
        queries = prepare(vectors, self.metric)
        best = TopK(len(queries), k)
        for first, part in self._parts:
            scores, numbers = faiss_parts.search(part, queries, k, self.metric)
            best.offer(scores, np.where(numbers < 0, -1, numbers + first))
        if probe is not None:
            self.set_probe(self.entry.get("probe"))
        names = {o: place.id for o, place in self.locate(best.ordinals.ravel()).items()}
        return Hits(name_hits(best.ordinals, names), best.scores, best.ordinals)

    def locate(self, ordinals: IntArray) -> dict[int, Place]:
        """Where vectors lie, by ordinal; only the parts of the side table that are needed are read."""
        found: dict[int, Place] = {}
        for ordinal in np.unique(ordinals[ordinals >= 0]).tolist():
            group, row = divmod(ordinal, ID_ROWS)
            table = self._ids(group)
            found[ordinal] = Place(*(table.column(i)[row].as_py() for i in range(3)))
        return found

    def probes(self) -> list[int]:
        """Sensible values of `probe`."""
        return faiss_parts.probes(self._parts[0][1])

    def set_probe(self, probe: int | None) -> None:
        """Set how much searches look at."""
        if probe is not None:
            for _, part in self._parts:
                faiss_parts.set_probe(part, int(probe))

    def _ids(self, group: int) -> pa.Table:
        if group not in self._groups:
            if len(self._groups) >= 8:
                self._groups.pop(next(iter(self._groups)))
            with self._home.open(str(self.entry["ids"]["file"])) as file:
                self._groups[group] = pq.ParquetFile(file).read_row_group(group).combine_chunks()
        return self._groups[group]

    def _open(self, part: Mapping[str, Any]) -> Any:
        name = str(part["file"])
        if self._home.is_local:
            path = self._home.local(name)
            if not path.exists():
                raise OutputError(f"the index file {path} is gone; build it again with `tamis index`")
            return faiss_parts.read(path, mapped=True)
        # FAISS maps local files only.
        self._copies = self._copies or tempfile.TemporaryDirectory(prefix="tamis-index-")
        path = Path(self._copies.name) / name
        self._home.fs.get_file(self._home.path(name), str(path))
        return faiss_parts.read(path, mapped=True)
