"""BEIR folders: corpus.jsonl, queries.jsonl, qrels/<split>.tsv; and Cocktail's corpus/<source>.jsonl.

Cocktail holds the same documents several times over, written by people and by models; ids are shared between the copies
and become `<id>-<source>` where the copies are mixed (S. Dai et al., "Cocktail", Findings of ACL 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl
import pyarrow as pa

from schemas.errors import InputError
from schemas.judgments import QUERY_SCHEMA
from transforms.retrieval.collection import DeadLine, RetrievalData, document_batches, frame
from transforms.retrieval.formats.base import (
    ExportData,
    Exported,
    ExportOptions,
    Format,
    ImportOptions,
    Source,
)
from transforms.retrieval.formats.lines import (
    as_id,
    bury,
    extra_back,
    extra_of,
    json_lines,
    separated_lines,
    write_json_lines,
    write_lines,
)
from transforms.shards.files import Folder

QRELS_HEADER = ("query-id", "corpus-id", "score")
_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2")


def recognises(source: Source) -> bool:
    """A folder with qrels/*.tsv and a corpus."""
    names = source.files() if source.file is None else []
    return any(n.startswith("qrels/") and n.endswith(".tsv") for n in names) and bool(
        _one(names, "queries") or _corpora(names)
    )


def read(source: Source, options: ImportOptions) -> RetrievalData:
    """Read a BEIR or Cocktail folder.

    Raises:
        InputError: No qrels of the wanted splits; several copies of the corpus and none chosen.
    """
    names = source.files()
    data = RetrievalData()
    copies = _corpora(names)
    chosen = _choose(copies, options.corpus_source, source.url)
    suffixed = options.corpus_source == "all" and len(copies) > 1
    data.judgments = _read_qrels(source.folder, names, options, data.dead, source.url)
    if suffixed:
        data.judgments = _for_every_copy(data.judgments, list(chosen))
        data.notes.append(
            f"labels were given to base ids; each of the {len(chosen)} copies of a document inherits its label "
            "(signal qrels:inherited for copies that are not human)"
        )
    if queries := _one(names, "queries"):
        data.queries = read_queries(source.folder, queries, data.dead)
    if chosen:
        # The first pass is where bad lines are found; later ones pass over them.
        first = [True]

        def documents() -> Iterator[pa.RecordBatch]:
            dead = data.dead if first[0] else None
            first[0] = False
            for copy, name in chosen.items():
                yield from document_batches(
                    read_documents(source.folder, name, dead, copy if len(copies) > 1 else None, suffixed)
                )

        data.documents = documents
    return data


def read_queries(folder: Folder, name: str, dead: list[DeadLine]) -> pa.Table:
    """queries.jsonl: {_id, text, ...}."""
    rows = []
    for number, row in json_lines(folder, name, dead):
        try:
            query_id = as_id(row.get("_id", row.get("query_id", row.get("id"))), "_id")
        except ValueError as error:
            bury(dead, name, number, str(error), repr(row))
            continue
        text = row.get("text", row.get("query"))
        if text is not None and not isinstance(text, str):
            bury(dead, name, number, f"text is {type(text).__name__}", repr(row))
            continue
        extra = extra_of(row, ("_id", "query_id", "id", "text", "query", "known_to"))
        rows.append({"query_id": query_id, "text": text, "known_to": row.get("known_to"), "extra": extra})
    return pa.Table.from_pylist(rows, schema=QUERY_SCHEMA)


def read_documents(
    folder: Folder, name: str, dead: list[DeadLine] | None, copy: str | None, suffixed: bool
) -> Iterator[dict[str, Any]]:
    """corpus.jsonl: {_id, title, text, ...}."""
    for number, row in json_lines(folder, name, dead):
        try:
            base = as_id(row.get("_id", row.get("doc_id", row.get("docid", row.get("id")))), "_id")
        except ValueError as error:
            bury(dead, name, number, str(error), repr(row))
            continue
        title, text = row.get("title"), row.get("text")
        if not all(t is None or isinstance(t, str) for t in (title, text)):
            bury(dead, name, number, "title or text is not text", repr(row))
            continue
        yield {
            "doc_id": f"{base}-{copy}" if suffixed else base,
            "title": title,
            "text": text,
            "base_id": base if copy is not None else row.get("base_id"),
            "source": copy if copy is not None else row.get("source"),
            "extra": extra_of(row, ("_id", "doc_id", "docid", "id", "title", "text", "base_id", "source")),
        }


def _read_qrels(
    folder: Folder, names: list[str], options: ImportOptions, dead: list[DeadLine], where: str
) -> pa.Table:
    files = {
        n[len("qrels/") : -len(".tsv")]: n for n in names if n.startswith("qrels/") and n.endswith(".tsv")
    }
    wanted = {split: name for split, name in files.items() if options.wants(split)}
    if not wanted:
        have = ", ".join(files) or "none"
        raise InputError(f"{where}: no qrels of split {', '.join(options.splits)} (there are: {have})")
    columns: dict[str, list[Any]] = {"query_id": [], "doc_id": [], "grade": [], "split": []}
    for split, name in sorted(wanted.items()):
        for query, doc, grade in read_qrels_tsv(folder, name, dead):
            columns["query_id"].append(query)
            columns["doc_id"].append(doc)
            columns["grade"].append(grade)
            columns["split"].append(split)
    return options.judgments(columns)


def read_qrels_tsv(folder: Folder, name: str, dead: list[DeadLine]) -> Iterator[tuple[str, str, int]]:
    """Lines of three tab-separated columns under a header."""
    import csv

    for number, line in separated_lines(folder, name):
        parts = next(csv.reader([line], delimiter="\t"))
        if number == 1 and parts[-1].strip().lower() in ("score", "rel", "relevance", "label"):
            continue
        grade = whole(parts[2]) if len(parts) == 3 else None
        if grade is None or not parts[0] or not parts[1]:
            bury(dead, name, number, "not query-id, corpus-id and a whole score, by tabs", line)
            continue
        yield parts[0], parts[1], grade


def whole(text: str) -> int | None:
    """A grade: a whole number (also written 1.0); None where it is not."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _one(names: list[str], stem: str) -> str | None:
    return next((n for n in names if n in {stem + e for e in _ENDINGS}), None)


def _corpora(names: list[str]) -> dict[str, str]:
    """File by copy; one corpus has the copy ''."""
    if single := _one(names, "corpus"):
        return {"": single}
    found = {}
    for name in names:
        ending = next((e for e in _ENDINGS if name.endswith(e)), None)
        if ending and name.startswith("corpus/"):
            found[name[len("corpus/") : -len(ending)]] = name
    return found


def _choose(copies: dict[str, str], wanted: str | None, where: str) -> dict[str, str]:
    if len(copies) <= 1 or wanted == "all":
        return copies
    if wanted is None:
        raise InputError(
            f"{where} holds {len(copies)} copies of its documents ({', '.join(copies)}); pass --source with one of them, or "
            "--source all to keep each under <id>-<source>"
        )
    if wanted not in copies:
        raise InputError(f"{where}: no corpus '{wanted}' (there are: {', '.join(copies)})")
    return {wanted: copies[wanted]}


def _for_every_copy(judgments: pa.Table, copies: list[str]) -> pa.Table:
    parts = []
    for copy in copies:
        rows = frame(judgments).with_columns((pl.col("doc_id") + f"-{copy}").alias("doc_id"))
        if copy != "human":
            rows = rows.with_columns(pl.lit("qrels:inherited").alias("signal"))
        parts.append(rows)
    return pl.concat(parts).to_arrow().cast(judgments.schema)


def write(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """Write a BEIR folder; copies of documents that name their source become corpus/<source>.jsonl."""
    done = Exported()
    inherited: set[str] = set()
    if export.data.documents is not None:
        inherited = _write_corpus(export, folder, done)
    queries = [
        {"_id": q, **({} if t is None else {"text": t}), **({"known_to": k} if k else {}), **extra_back(x)}
        for q, t, k, x in zip(
            *(export.data.queries[c].to_pylist() for c in ("query_id", "text", "known_to", "extra")),
            strict=True,
        )
    ]
    if queries:
        done.files["queries.jsonl"] = write_json_lines(folder, "queries.jsonl", queries)
    labels = export.labels.with_columns(pl.col("split").fill_null(options.split))
    if inherited:
        labels = _to_base_ids(labels, inherited)
    for key, part in labels.sort("place").group_by("split", maintain_order=True):
        name = f"qrels/{key[0]}.tsv"
        rows = part.select("query_id", "doc_id", "grade").iter_rows()
        done.files[name] = write_lines(folder, name, (_tsv(r) for r in (QRELS_HEADER, *rows))) - 1
    return done


def _tsv(row: tuple[Any, ...]) -> str:
    """A line as every reader of such files takes it apart: quoted only where an id holds a tab or a quote."""
    import csv
    import io

    out = io.StringIO()
    csv.writer(out, delimiter="\t", lineterminator="").writerow(row)
    return out.getvalue()


def _write_corpus(export: ExportData, folder: Folder, done: Exported) -> set[str]:
    """Write the documents; returns the sources whose copies share base ids."""
    assert export.data.documents is not None
    sources: dict[str | None, None] = {}
    for batch in export.data.documents():
        sources.update(dict.fromkeys(batch.column("source").to_pylist()))
    several = len(sources) > 1 and None not in sources
    for source in list(sources) if several else [None]:

        def rows(source: str | None = source) -> Iterator[dict[str, Any]]:
            assert export.data.documents is not None
            for batch in export.data.documents():
                for row in batch.to_pylist():
                    if several and row["source"] != source:
                        continue
                    out = {"_id": row["base_id"] if several else row["doc_id"]}
                    out |= {k: row[k] for k in ("title", "text") if row[k] is not None}
                    if not several:
                        out |= {k: row[k] for k in ("base_id", "source") if row[k] is not None}
                    yield out | extra_back(row["extra"])

        name = f"corpus/{source}.jsonl" if several else "corpus.jsonl"
        done.files[name] = write_json_lines(folder, name, rows())
    return {s for s in sources if s} if several else set()


def _to_base_ids(labels: pl.DataFrame, sources: set[str]) -> pl.DataFrame:
    """Labels of copies as labels of base ids, once each; the longest matching source is the suffix."""
    suffixes = sorted((f"-{s}" for s in sources), key=len, reverse=True)
    bases = []
    for doc in labels["doc_id"].to_list():
        suffix = next((s for s in suffixes if doc.endswith(s)), "")
        bases.append(doc[: len(doc) - len(suffix)] if suffix else doc)
    return labels.with_columns(pl.Series("doc_id", bases, pl.String)).unique(
        ["split", "query_id", "doc_id", "grade"], keep="first", maintain_order=True
    )


FORMAT = Format(
    "beir",
    "BEIR or Cocktail folder",
    recognises,
    read,
    write,
    frozenset({"grade", "split", "queries", "documents", "titles", "ids", "known_to", "extra"}),
)
