"""Tevatron: rows with their passages (version 1), and rows of ids beside a corpus (version 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from transforms.retrieval.collection import DeadLine, RetrievalData, document_batches
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
    write_json_lines,
)
from transforms.retrieval.formats.rows import GivenDocument, GivenRow, OutDocument, collect, out_rows
from transforms.shards.files import Folder

_V1 = ("query_id", "query", "positive_passages", "negative_passages")
_V2 = ("query_id", "query_text", "positive_document_ids", "negative_document_ids")


def recognises_v1(source: Source) -> bool:
    """JSONL whose rows have `positive_passages`."""
    return _first_has(source, "positive_passages")


def recognises_v2(source: Source) -> bool:
    """JSONL whose rows have `positive_document_ids`."""
    return _first_has(source, "positive_document_ids")


def read_v1(source: Source, options: ImportOptions) -> RetrievalData:
    """Rows with their passages; passages without docid are known by their text."""
    names = _row_files(source, "positive_passages")

    def rows(dead: list[DeadLine] | None) -> Iterator[GivenRow]:
        for name in names:
            for number, row in json_lines(source.folder, name, dead):
                try:
                    yield GivenRow(
                        row["query"],
                        [_passage(p) for p in row["positive_passages"]],
                        [_passage(p) for p in row.get("negative_passages") or ()],
                        query_id=None if row.get("query_id") is None else as_id(row["query_id"], "query_id"),
                        extra=extra_of(row, _V1),
                    )
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    bury(dead, name, number, f"not a row of Tevatron ({error!r})", repr(row))

    return collect(rows, options, signal="given_positive")


def read_v2(source: Source, options: ImportOptions) -> RetrievalData:
    """Rows of ids; documents from the corpus file beside them, where there is one."""
    names = _row_files(source, "positive_document_ids")

    def rows(dead: list[DeadLine] | None) -> Iterator[GivenRow]:
        for name in names:
            for number, row in json_lines(source.folder, name, dead):
                try:
                    yield GivenRow(
                        row.get("query_text", row.get("query")),
                        [GivenDocument(as_id(d, "document id"), None) for d in row["positive_document_ids"]],
                        [
                            GivenDocument(as_id(d, "document id"), None)
                            for d in row.get("negative_document_ids") or ()
                        ],
                        query_id=as_id(row["query_id"], "query_id"),
                        extra=extra_of(row, _V2),
                    )
                except (KeyError, TypeError, ValueError) as error:
                    bury(dead, name, number, f"not a row of Tevatron ({error!r})", repr(row))

    data = collect(rows, options, signal="given_positive")
    corpora = [n for n in _json_files(source) if n not in names and _has(source, n, "docid")]
    if source.file is None and corpora:

        def documents() -> Any:
            yield from document_batches(
                {
                    "doc_id": as_id(row["docid"], "docid"),
                    "title": row.get("title"),
                    "text": row.get("text"),
                    "extra": extra_of(row, ("docid", "title", "text")),
                }
                for name in corpora
                for _, row in json_lines(source.folder, name)
                if row.get("docid") is not None
            )

        data.documents = documents
    return data


def write_v1(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """train.jsonl, and corpus.jsonl to encode."""
    done = Exported()
    titled = _has_titles(export)
    rows = (
        {
            **extra_back(row.extra),
            "query_id": row.query_id,
            "query": row.query,
            "positive_passages": [_out(d, titled) for d in row.positives],
            "negative_passages": [_out(d, titled) for d in row.negatives],
        }
        for row in out_rows(export, options, done)
    )
    done.files["train.jsonl"] = write_json_lines(folder, "train.jsonl", rows)
    _write_corpus(export, folder, done, titled=titled)
    return done


def write_v2(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """train.jsonl of ids, and corpus.jsonl.

    Training reads a document's `text` alone and encoding puts the title before it, so titles are joined to the texts
    here: both then see the same.
    """
    done = Exported()
    texts = export.query_texts()
    rows = (
        {
            **extra_back(row.extra),
            "query_id": row.query_id,
            "query_text": texts[row.query_id],
            "positive_document_ids": [d.doc_id for d in row.positives],
            "negative_document_ids": [d.doc_id for d in row.negatives],
        }
        for row in out_rows(export, options, done, texts=False)
    )
    done.files["train.jsonl"] = write_json_lines(folder, "train.jsonl", rows)
    if _has_titles(export):
        done.lost.append("titles as such: they are joined to the texts by one space")
    _write_corpus(export, folder, done, titled=None)
    return done


def _write_corpus(export: ExportData, folder: Folder, done: Exported, *, titled: bool | None) -> None:
    if export.data.documents is None:
        return

    def rows() -> Iterator[dict[str, Any]]:
        assert export.data.documents is not None
        for batch in export.data.documents():
            for row in batch.to_pylist():
                document = OutDocument(row["doc_id"], row["title"], row["text"] or "", None, None)
                if titled is None:
                    yield {"docid": document.doc_id, "text": document.joined}
                else:
                    yield _out(document, titled)

    done.files["corpus.jsonl"] = write_json_lines(folder, "corpus.jsonl", rows())


def _out(document: OutDocument, titled: bool) -> dict[str, Any]:
    # All passages of a file have a title or none has: readers join what is there, and a missing one would be null.
    title = {"title": document.title or ""} if titled else {}
    return {"docid": document.doc_id, **title, "text": document.text or ""}


def _has_titles(export: ExportData) -> bool:
    if export.data.documents is None:
        return False
    return any(
        pc.any(pc.greater(pc.utf8_length(b.column("title")), 0)).as_py() for b in export.data.documents()
    )


def _passage(row: dict[str, Any]) -> GivenDocument:
    if not isinstance(row["text"], str):
        raise TypeError("a passage's text is not text")
    docid = row.get("docid")
    title = row.get("title") or None
    return GivenDocument(None if docid is None else as_id(docid, "docid"), row["text"], title)


def _json_files(source: Source) -> list[str]:
    return [n for n in source.files() if n.split(".gz")[0].endswith((".jsonl", ".json"))]


def _row_files(source: Source, field: str) -> list[str]:
    return [n for n in _json_files(source) if _has(source, n, field)]


def _has(source: Source, name: str, field: str) -> bool:
    first = next(iter(json_lines(source.folder, name)), None)
    return first is not None and field in first[1]


def _first_has(source: Source, field: str) -> bool:
    return any(_has(source, n, field) for n in _json_files(source)[:8])


_HOLDS = frozenset({"positives", "rank", "pool", "queries", "documents", "titles", "ids", "extra"})
V1 = Format("tevatron", "Tevatron rows with passages", recognises_v1, read_v1, write_v1, _HOLDS, True)
V2 = Format(
    "tevatron-v2", "Tevatron rows of ids", recognises_v2, read_v2, write_v2, _HOLDS - {"titles"}, True
)
