"""`tamis search`: ask an embedded corpus.

Queries go through the model that embedded it, with its query prompt, or through one that was trained against its vectors
(`tamis train retriever --documents fixed`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from models import registry
from models.encoder_folder import encoder_name, find_folder, read_settings
from models.encoders import SentenceEncoder
from schemas.columns import to_text
from schemas.errors import InputError, ModelError, OutputError
from transforms.embed.exact import Hits, exact_search
from transforms.embed.index import VectorIndex, metric_of
from transforms.embed.text import TextTemplate
from transforms.embed.vectors import FloatArray, Place, VectorShards
from transforms.shards.files import Folder
from transforms.shards.formats import format_of, get_format

_ID_FIELDS = ("_id", "id", "query_id", "qid")
_TEXT_FIELDS = ("text", "query", "query_text", "question")
_BATCH_QUERIES = 1024


class Query(NamedTuple):
    """A query and its id."""

    id: str
    text: str


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    Attributes:
        exact: Look at every vector, even where there is an index.
        probe: How much of the index to look at; None takes what reached the recall it was built for.
        metric: Of an exact search: auto, cosine, dot or l2.
        prompt_name: Prompt of the model for queries, by name; None takes its own query prompt.
        prefix: Text before every query, instead of a prompt of the model.
        query_encoder: Encoder of the queries, one that was trained against these vectors; None takes the one that made them.
        device: auto, cpu, cuda ...
        threads: torch threads.
    """

    exact: bool = False
    probe: int | None = None
    metric: str = "auto"
    prompt_name: str | None = None
    prefix: str | None = None
    query_encoder: str | None = None
    device: str = "auto"
    threads: int = 1


class Searcher:
    """An embedded corpus that can be asked.

    Args:
        url: Output of `tamis embed`.
        options: How to search.
        storage: fsspec options.

    Raises:
        OutputError: The folder holds no embeddings.
        ModelError: The model that made them cannot be had, or has other weights now; the queries' encoder was not
            trained against them.
    """

    def __init__(
        self,
        url: str,
        options: SearchOptions = SearchOptions(),
        storage: Mapping[str, Any] | None = None,
    ) -> None:
        self.shards = VectorShards(url, None, storage)
        self._config: Mapping[str, Any] = self.shards.manifest["config"]
        if self.shards.manifest.get("job") != "embed":
            raise OutputError(f"{url} is the output of another job; pass the --output of `tamis embed`")
        self._options = options
        entry = self.shards.manifest.get("index")
        self.index = VectorIndex(self.shards.folder, entry) if entry and not options.exact else None
        self.metric = self.index.metric if self.index else metric_of(self.shards.manifest, options.metric)
        self.encoder_name = encoder_name(options.query_encoder or str(self._config["encoder"]))
        self.encoder = self._load()
        settings = read_settings(find_folder(self.encoder_name))
        self.prompt = settings.prompt("query", options.prompt_name, options.prefix)

    def vectors(self, queries: Sequence[str]) -> FloatArray:
        """Embed queries as the corpus was, with the query prompt: float32 (q, dimension)."""
        return self.encoder.embed(
            queries,
            prompt=self.prompt,
            kind="query",
            long=self._config["long"],
            normalize=self._config["normalize"],
            dimensions=self._config["dimensions"],
        ).vectors

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The k nearest rows of each query.

        Raises:
            InputError: A query is blank.
        """
        blank = [i for i, q in enumerate(queries) if not q.strip()]
        if blank:
            raise InputError(f"query {blank[0] + 1} is empty; write what you are looking for")
        return self.search_vectors(self.vectors(queries), k)

    def search_vectors(self, vectors: FloatArray, k: int) -> Hits:
        """The k nearest rows of each query vector, by the index, or by looking at all where there is none."""
        if self.index is not None:
            return self.index.search(vectors, k, self._options.probe)
        return exact_search(self.shards, vectors, k, self.metric)

    def places(self, hits: Hits) -> dict[int, Place]:
        """Where the hits lie, by ordinal."""
        return (self.index or self.shards).locate(hits.ordinals)

    def texts(self, places: Iterable[Place]) -> dict[Place, str]:
        """The texts of rows, as they were embedded; only the shards they lie in are read."""
        by_shard: dict[str, list[Place]] = {}
        for place in places:
            by_shard.setdefault(place.shard, []).append(place)
        template = TextTemplate(str(self._config["text"]))
        found: dict[Place, str] = {}
        for shard, wanted in by_shard.items():
            rows = sorted({p.position for p in wanted})
            texts = dict(zip(rows, read_texts(self.shards.folder, shard, rows, template), strict=True))
            found |= {p: texts[p.position] for p in wanted}
        return found

    def _load(self) -> SentenceEncoder:
        config, options = self._config, self._options
        given: dict[str, Any] = {
            "device": options.device,
            "threads": options.threads,
            "dtype": config["dtype"],
        }
        if config["pooling"]:
            given["pooling"] = config["pooling"]
        name = self.encoder_name
        then = next(m for m in self.shards.manifest["models"] if m["kind"] == "encoder")
        now = registry.describe("encoder", name, **given)
        if now.revision != then["revision"] and options.query_encoder is not None:
            given.pop("pooling", None)
            check_trained_against(find_folder(name), name, then["name"], then["revision"])
        elif now.revision != then["revision"]:
            raise ModelError(
                f"{name} has other weights ({now.revision}) than those that embedded this corpus "
                f"({then['revision']}); embed it again, or bring the old weights back"
            )
        return registry.load("encoder", name, **given)  # type: ignore[return-value]


def check_trained_against(folder: Path, name: str, base: str, revision: str) -> None:
    """Whether an encoder's queries are meant for vectors of another: `tamis train retriever --documents fixed` says so.

    Raises:
        ModelError: They are not.
    """
    try:
        record = orjson.loads((folder / "train.json").read_bytes())
        start, documents = record["data"]["encoder_revision"], record["run"]["settings"]["documents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{name} does not say what it was trained against (no train.json of `tamis train retriever`); embed the corpus with "
            "it instead"
        ) from error
    if documents == "shared":
        raise ModelError(
            f"{name} was trained on both sides: embed the corpus with it (tamis embed ... --encoder {name})"
        )
    if start != revision:
        raise ModelError(
            f"{name} was trained against vectors of {record['model']['name']} ({start}), and these were made by {base} ({revision})"
        )
    if documents != "fixed":
        raise ModelError(
            f"{name} was trained with --documents {documents}: its documents have other vectors than these; embed the corpus "
            f"with it (tamis embed ... --encoder {name})"
        )


def read_texts(output: Folder, shard: str, rows: Sequence[int], template: TextTemplate) -> list[str]:
    """Texts of some rows of `data/<shard>`, by their numbers in ascending order."""
    data = output.child("data")
    if format_of(shard) == "parquet" and data.is_local:
        tables = _parquet_rows(data, shard, rows, template)
    else:
        tables = _scanned_rows(data, shard, rows, template)
    texts: list[str] = []
    for table in tables:
        for batch in table.combine_chunks().to_batches():
            texts += [t or "" for t in template.render(batch).to_pylist()]
    return texts


def _parquet_rows(data: Folder, shard: str, rows: Sequence[int], template: TextTemplate) -> list[pa.Table]:
    tables = []
    with pq.ParquetFile(data.path(shard), memory_map=True, pre_buffer=False) as file:
        start = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            mine = [r - start for r in rows if start <= r < start + count]
            if mine:
                table = file.read_row_group(group, columns=list(template.columns), use_threads=False)
                tables.append(table.take(pa.array(mine)))
            start += count
    return tables


def _scanned_rows(data: Folder, shard: str, rows: Sequence[int], template: TextTemplate) -> list[pa.Table]:
    tables = []
    start = 0
    for table in get_format(str(format_of(shard))).scan(data, shard):
        mine = [r - start for r in rows if start <= r < start + table.num_rows]
        if mine:
            chosen = table.take(pa.array(mine))
            tables.append(_from_lines(chosen, template) if "raw" in chosen.column_names else chosen)
        start += table.num_rows
        if start > rows[-1]:
            break
    return tables


def _from_lines(table: pa.Table, template: TextTemplate) -> pa.Table:
    rows = [orjson.loads(raw.removeprefix(b"\xef\xbb\xbf")) for raw in table.column("raw").to_pylist()]
    columns = {}
    for name in template.columns:
        values = [row.get(name) for row in rows]
        columns[name] = pa.array(
            [v if v is None or isinstance(v, str) else str(v) for v in values], pa.string()
        )
    return pa.table(columns)


def read_queries(path: str) -> list[Query]:
    """Queries of a file: JSONL (`_id`, `text` and the like), TSV or plain text lines (`id<TAB>text`), Parquet.

    Raises:
        InputError: It is not there, holds no queries, or lacks an id or a text.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no such file of queries: {path}")
    try:
        queries = list(_parse_queries(file))
    except (ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as queries: {error}") from error
    if not queries:
        raise InputError(f"{path} holds no queries")
    ids = [q.id for q in queries]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise InputError(f"{path}: query id '{twice}' stands there twice; ids must differ")
    return queries


def _parse_queries(file: Path) -> Iterable[Query]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        table = pq.read_table(file)
        ids, texts = (_field(table.column_names, names, file) for names in (_ID_FIELDS, _TEXT_FIELDS))
        pairs = zip(
            to_text(table.column(ids)).to_pylist(), to_text(table.column(texts)).to_pylist(), strict=True
        )
        return [Query(str(i), str(t)) for i, t in pairs]
    lines = file.read_text("utf-8-sig").splitlines()
    if suffix in (".jsonl", ".json", ".ndjson"):
        rows = [orjson.loads(line) for line in lines if line.strip()]
        return [
            Query(str(r[_field(r, _ID_FIELDS, file)]), str(r[_field(r, _TEXT_FIELDS, file)])) for r in rows
        ]
    found = []
    for number, line in enumerate(filter(str.strip, lines), 1):
        id_, tab, text = line.partition("\t")
        found.append(Query(id_, text) if tab else Query(str(number), line.strip()))
    return found


def _field(names: Iterable[str], wanted: Sequence[str], file: Path) -> str:
    has = list(names)
    for name in wanted:
        if name in has:
            return name
    raise ValueError(f"{file.name} has none of the fields {', '.join(wanted)} (it has: {', '.join(has)})")


def run_file(
    searcher: Searcher, queries: Sequence[Query], k: int, target: str | None, *, tag: str = "tamis"
) -> str:
    """Search for every query and write the run.

    Args:
        searcher: The corpus.
        queries: Queries with ids.
        k: Hits a query.
        target: `.parquet` (query_id, doc_id, rank, score), else a TREC run; None gives the TREC run back.
        tag: Last column of a TREC run.

    Returns:
        The TREC run where there is no target, else an empty string.
    """
    rows: dict[str, list[Any]] = {"query_id": [], "doc_id": [], "rank": [], "score": []}
    for start in range(0, len(queries), _BATCH_QUERIES):
        part = queries[start : start + _BATCH_QUERIES]
        hits = searcher.search([q.text for q in part], k)
        for query, ids, scores in zip(part, hits.ids, hits.scores, strict=True):
            for rank, (id_, score) in enumerate(zip(ids, scores, strict=True), 1):
                if np.isfinite(score):
                    for name, value in zip(rows, (query.id, id_, rank, float(score)), strict=True):
                        rows[name].append(value)
    if target and target.endswith(".parquet"):
        types = (pa.string(), pa.string(), pa.int32(), pa.float32())
        table = pa.table({n: pa.array(v, t) for (n, v), t in zip(rows.items(), types, strict=True)})
        pq.write_table(table, target, compression="zstd")
        return ""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=" ", lineterminator="\n", quoting=csv.QUOTE_NONE, escapechar="\\")
    for query_id, doc_id, rank, score in zip(*rows.values(), strict=True):
        writer.writerow([query_id, "Q0", doc_id, rank, f"{score:.6f}", tag])
    if target:
        Path(target).write_text(text.getvalue(), "utf-8")
        return ""
    return text.getvalue()


def show_hits(searcher: Searcher, query: str, k: int, *, as_json: bool = False, width: int = 160) -> None:
    """Search and print: rank, score, id, and how the text begins."""
    hits = searcher.search([query], k)
    places = searcher.places(hits)
    texts = searcher.texts(places.values())
    rows = [
        (rank, float(score), places[int(o)], texts[places[int(o)]])
        for rank, (o, score) in enumerate(zip(hits.ordinals[0], hits.scores[0], strict=True), 1)
        if o >= 0
    ]
    if as_json:
        for rank, score, place, text in rows:
            row = {"rank": rank, "score": score, "id": place.id, "shard": place.shard, "row": place.position}
            print(orjson.dumps({**row, "text": text}).decode())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False, box=None, header_style="bold")
    for name in ("", "score", "id", "text"):
        table.add_column(name, justify="right" if name in ("", "score") else "left", overflow="fold")
    for rank, score, place, text in rows:
        line = " ".join(text.split())
        short = line if len(line) <= width else line[: width - 1] + "…"
        table.add_row(str(rank), f"{score:.4f}", Text(place.id), Text(short))
    Console().print(table)
