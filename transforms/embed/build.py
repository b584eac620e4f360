"""An index over an output's embeddings: built part by part, resumed where it was, memory-mapped when read.

    OUT/index/<kind>-<mark>/ids.parquet          id, shard and row of every vector, in order
                           /trained.faiss        the empty index after training
                           /part-00000.faiss     vectors 0 ... ; part-00000.json says which, and that it is whole
    OUT/manifest.json       "index": what is there, with hashes; readers open what stands here and nothing else

No document text is read: ids, and vectors a block at a time. What an index is trained on is drawn by the hash of row
ids, so it is the same however the corpus is cut into shards.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from schemas.errors import TamisError
from schemas.fingerprint import fingerprint
from transforms.embed import faiss_parts
from transforms.embed.exact import Metric, TopK, exact_search, prepare
from transforms.embed.faiss_parts import IndexSpec
from transforms.embed.index import ID_ROWS, metric_of
from transforms.embed.vectors import Block, FloatArray, IntArray, VectorShards
from transforms.shards.files import Folder
from transforms.shards.finish import MANIFEST

INDEX = "index"
_BLOCK = 8 << 20
_TIES = 32  # further neighbours looked at, to know which of them are as near as the last
_IDS_SCHEMA = pa.schema(
    [pa.field("id", pa.string()), pa.field("shard", pa.string()), pa.field("position", pa.int64())]
)


def build_index(
    url: str,
    spec: IndexSpec,
    *,
    metric: str = "auto",
    attribute: str | None = None,
    options: Mapping[str, Any] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Build an index over a finished output's embeddings, and record it in the manifest.

    Killed while building, it goes on from the last whole part; until the manifest names it, readers see the old index
    or none.

    Args:
        url: Output of `tamis embed`.
        spec: What to build.
        metric: `auto`, `cosine`, `dot` or `l2`.
        attribute: Which embedding; None takes the one the job wrote.
        options: fsspec options.
        notify: Called with a line now and then.

    Returns:
        The manifest's entry.

    Raises:
        OutputError: The folder has no embeddings.
        TamisError: The index cannot be made.
    """
    shards = VectorShards(url, attribute, options)
    builder = _Builder(shards, spec, metric_of(shards.manifest, metric))
    old = shards.manifest.get("index")
    if old and old["mark"] == builder.mark and all(shards.folder.exists(f) for f in _files(old)):
        return cast("dict[str, Any]", old)
    entry = builder.build(notify)
    manifest = orjson.loads(shards.folder.read(MANIFEST)) | {"index": entry}
    shards.folder.write(MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    for name in {"/".join(n.split("/")[:2]) for n in shards.folder.find(INDEX)} - {builder.home}:
        shards.folder.remove(name)
    return entry


def _files(entry: Mapping[str, Any]) -> list[str]:
    return [f"{entry['folder']}/{p['file']}" for p in [*entry["parts"], entry["ids"]]]


class _Builder:
    """One build; every method leaves whole files behind or none."""

    def __init__(self, shards: VectorShards, spec: IndexSpec, metric: Metric) -> None:
        self._shards, self._spec, self._metric = shards, spec, metric
        self._folder = shards.folder
        manifest = shards.manifest
        made = [
            f"{s['path']}:{s.get('source_fingerprint')}:{s['rows_kept']}:{self._size(s['path'])}"
            for s in manifest["shards"]
            if not s.get("error")
        ]
        settings = orjson.dumps(spec.deciding, option=orjson.OPT_SORT_KEYS)
        self.mark = fingerprint(manifest["config_hash"], shards.attribute, metric, settings, *made)
        kind = spec.kind if spec.kind in faiss_parts.KINDS else "factory"
        self.home = f"{INDEX}/{kind}-{self.mark[:12]}"

    def build(self, notify: Callable[[str], None]) -> dict[str, Any]:
        started = time.monotonic()
        blocks, sample, asked = self._survey()
        count = sum(b.vectors for b in blocks)
        if not count:
            raise TamisError(f"{self._folder.url} holds no vector to build an index over")
        notify(f"{count} vectors of {self._shards.dimension} dimensions")
        fresh = faiss_parts.new_index(self._spec, count, self._shards.dimension, self._metric)
        trained_on = 0 if fresh.is_trained else len(sample)
        empty = self._trained(fresh, blocks, sample)
        parts = self._parts(blocks, empty, notify)
        entry: dict[str, Any] = {
            "kind": self._spec.kind,
            "factory": self._spec.factory(count, self._shards.dimension),
            "mark": self.mark,
            "folder": self.home,
            "attribute": self._shards.attribute,
            "metric": self._metric,
            "dimension": self._shards.dimension,
            "vectors": count,
            "trained_on": trained_on,
            "spec": self._spec.deciding,
            "parts": parts,
            "ids": {"file": "ids.parquet", **self._stamp(f"{self.home}/ids.parquet")},
            "probe": None,
        }
        entry |= self._measure(entry, blocks, asked)
        entry["seconds"] = round(time.monotonic() - started, 3)
        return entry

    def _survey(self) -> tuple[list[Block], IntArray, IntArray]:
        """One pass over ids: the side table, the blocks, and the ordinals drawn for training and for measuring."""
        blocks: list[Block] = []
        total = sum(int(s["rows_kept"]) for s in self._shards.manifest["shards"] if not s.get("error"))
        drawn = _Draw(self._spec.sample_size(total, self._shards.dimension), self._spec.seed)
        asked = _Draw(self._spec.queries, self._spec.seed + 1)
        with (
            self._folder.publish(f"{self.home}/ids.parquet") as path,
            pq.ParquetWriter(path, _IDS_SCHEMA, compression="zstd") as writer,
        ):
            held: list[pa.Table] = []
            for block, ids, present in self._shards.ids():
                blocks.append(block)
                rows = np.flatnonzero(present)
                names = ids.take(pa.array(rows))
                ordinals = block.first + np.arange(block.vectors)
                for draw in (drawn, asked):
                    draw.offer(names.to_pylist(), ordinals)
                shard = pa.repeat(pa.scalar(block.shard), block.vectors)
                columns = [names, shard, pa.array(block.position + rows)]
                held.append(pa.table(columns, schema=_IDS_SCHEMA))
                while sum(t.num_rows for t in held) >= ID_ROWS:
                    whole = pa.concat_tables(held)
                    writer.write_table(whole.slice(0, ID_ROWS), row_group_size=ID_ROWS)
                    held = [whole.slice(ID_ROWS)]
            writer.write_table(pa.concat_tables([_IDS_SCHEMA.empty_table(), *held]), row_group_size=ID_ROWS)
        return blocks, drawn.ordinals(), asked.ordinals()

    def _trained(self, index: Any, blocks: Sequence[Block], sample: IntArray) -> Any:
        name = f"{self.home}/trained.faiss"
        if self._folder.exists(name):
            with _local(self._folder, name) as path:
                return faiss_parts.read(path, mapped=False)
        if not index.is_trained:
            faiss_parts.train(index, self._gather(blocks, sample))
        with self._folder.publish(name) as path:
            faiss_parts.write(index, path)
        return index

    def _gather(self, blocks: Sequence[Block], ordinals: IntArray) -> FloatArray:
        """Vectors by ordinal, in the order given."""
        out = np.empty((len(ordinals), self._shards.dimension), np.float32)
        wanted = [b for b in blocks if b.vectors and _inside(ordinals, b).any()]
        for block, batch in self._shards.read(wanted):
            mine = _inside(ordinals, block)
            out[mine] = prepare(batch.vectors, self._metric)[ordinals[mine] - block.first]
        return out

    def _parts(
        self, blocks: Sequence[Block], empty: Any, notify: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        size = self._spec.part_vectors(self._shards.dimension)
        parts: list[dict[str, Any]] = []
        for number, group in enumerate(_groups(blocks, size)):
            name, receipt = f"part-{number:05d}.faiss", f"{self.home}/part-{number:05d}.json"
            if self._folder.exists(receipt) and self._folder.exists(f"{self.home}/{name}"):
                parts.append(orjson.loads(self._folder.read(receipt)))
                continue
            index = faiss_parts.copy_of(empty)
            vectors = (prepare(batch.vectors, self._metric) for _, batch in self._shards.read(group))
            added = faiss_parts.add(index, vectors)
            with self._folder.publish(f"{self.home}/{name}") as path:
                faiss_parts.write(index, path)
            del index
            part = {"file": name, "first": group[0].first, "vectors": added}
            part |= self._stamp(f"{self.home}/{name}")
            self._folder.write(receipt, orjson.dumps(part))
            parts.append(part)
            notify(f"part {number}: {group[-1].first + group[-1].vectors} vectors indexed")
        return parts

    def _measure(self, entry: dict[str, Any], blocks: Sequence[Block], asked: IntArray) -> dict[str, Any]:
        """Recall against the exact neighbours, and from it how much a search has to look at."""
        spec, k = self._spec, self._spec.at
        steps = self._probes(entry)
        if not spec.queries or len(asked) < 2:
            return {"probe": spec.probe or (steps[-1] if steps else None), "recall": None}
        queries = self._gather(blocks, asked)
        truth = exact_search(self._shards, queries, k + 1 + _TIES, self._metric)
        good = [_near(o, s, int(a), k) for o, s, a in zip(truth.ordinals, truth.scores, asked, strict=True)]
        tried: list[int | None] = [spec.probe] if spec.probe else [*steps] or [None]
        found = self._ask(entry, queries, k + 1, tried)
        table: list[dict[str, Any]] = []
        chosen = spec.probe
        for probe in tried:
            pairs = zip(found[probe].ordinals, good, asked, strict=True)
            share = float(np.mean([_recall(f, g, int(a), k) for f, g, a in pairs]))
            table.append({"probe": probe, "recall": round(share, 4)})
            chosen = probe
            if share >= spec.recall:
                break
        recall = {
            "at": k,
            "value": table[-1]["recall"],
            "target": spec.recall,
            "queries": len(asked),
            "of": "vectors of the output itself, drawn by the hash of their ids, each without itself",
            "tried": table,
        }
        return {"probe": chosen, "recall": recall}

    def _probes(self, entry: Mapping[str, Any]) -> list[int]:
        with _local(self._folder, f"{self.home}/{entry['parts'][0]['file']}") as path:
            return faiss_parts.probes(faiss_parts.read(path, mapped=True))

    def _ask(
        self, entry: Mapping[str, Any], queries: FloatArray, k: int, tried: Sequence[int | None]
    ) -> dict[int | None, TopK]:
        """Hits for every probe; one part is mapped at a time, so memory does not grow with their number."""
        found = {probe: TopK(len(queries), k) for probe in tried}
        for part in entry["parts"]:
            with _local(self._folder, f"{self.home}/{part['file']}") as path:
                index = faiss_parts.read(path, mapped=True)
                for probe, best in found.items():
                    if probe is not None:
                        faiss_parts.set_probe(index, probe)
                    scores, numbers = faiss_parts.search(index, queries, k, self._metric)
                    best.offer(scores, np.where(numbers < 0, -1, numbers + part["first"]))
                del index
        return found

    def _size(self, shard: str) -> int:
        info = self._folder.fs.info(self._folder.path(self._shards.sidecar(shard)))
        return int(info.get("size") or 0)

    def _stamp(self, name: str) -> dict[str, Any]:
        state, size = hashlib.sha256(), 0
        with self._folder.open(name) as file:
            while block := file.read(_BLOCK):
                state.update(block)
                size += len(block)
        return {"bytes": size, "sha256": state.hexdigest()}


class _Draw:
    """The n ids with the smallest hashes: the same however they are cut into shards.

    Args:
        size: n.
        seed: Tells draws apart.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._hashes = np.zeros(0, np.uint64)
        self._ordinals = np.zeros(0, np.int64)

    def offer(self, ids: Sequence[str], ordinals: IntArray) -> None:
        """Offer ids with their ordinals."""
        hashes = np.fromiter(
            (xxhash.xxh3_64_intdigest(i.encode(), seed=self._seed) for i in ids), np.uint64, len(ids)
        )
        self._hashes = np.concatenate([self._hashes, hashes])
        self._ordinals = np.concatenate([self._ordinals, ordinals])
        if len(self._hashes) > 2 * self._size + ID_ROWS:
            self._shrink()

    def ordinals(self) -> IntArray:
        """What was drawn, smallest hash first."""
        self._shrink()
        return self._ordinals

    def _shrink(self) -> None:
        order = np.lexsort((self._ordinals, self._hashes))[: self._size]
        self._hashes, self._ordinals = self._hashes[order], self._ordinals[order]


def _inside(ordinals: IntArray, block: Block) -> npt.NDArray[np.bool_]:
    return (ordinals >= block.first) & (ordinals < block.first + block.vectors)


def _groups(blocks: Sequence[Block], size: int) -> Iterator[list[Block]]:
    """Neighbouring blocks, about `size` vectors together."""
    group: list[Block] = []
    for block in blocks:
        if not block.vectors:
            continue
        group.append(block)
        if sum(b.vectors for b in group) >= size:
            yield group
            group = []
    if group:
        yield group


def _near(ordinals: IntArray, scores: FloatArray, own: int, k: int) -> set[int]:
    """The k true neighbours without the vector itself, and those that are as near as the last of them."""
    others = [(o, s) for o, s in zip(ordinals.tolist(), scores.tolist(), strict=True) if o not in (own, -1)]
    if not others:
        return set()
    least = others[min(k, len(others)) - 1][1] - 1e-6
    return {o for o, s in others if s >= least}


def _recall(found: IntArray, good: set[int], own: int, k: int) -> float:
    hits = [o for o in found.tolist() if o not in (own, -1)][:k]
    return sum(o in good for o in hits) / min(k, len(good)) if good else 1.0


@contextmanager
def _local(folder: Folder, name: str) -> Iterator[Path]:
    """A local path to a file of a folder, fetched where the folder is not local."""
    if folder.is_local:
        yield folder.local(name)
        return
    with tempfile.TemporaryDirectory(prefix="tamis-index-") as place:
        path = Path(place) / Path(name).name
        folder.fs.get_file(folder.path(name), str(path))
        yield path
