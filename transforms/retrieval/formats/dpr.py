"""DPR: questions with gold answers; training rows with positive and negative contexts, or a reader's rows of `ctxs`.

The reader's rows are what open-domain question answering passes around: {question, answers, ctxs: [{id, title, text,
score, hasanswer, isgold}]}, the contexts in the order a retriever gave them. All of them are candidates; those marked
`isgold` are labels, for `hasanswer` is a string match and no judgment. The original files are one JSON array each, newer
ones JSONL; both are read, gzipped or not. Gold answers come along in the queries' `extra`, where labels by gain find them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from schemas.errors import InputError
from transforms.retrieval.collection import DeadLine, RetrievalData
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
    lines_of,
    write_json_lines,
)
from transforms.retrieval.formats.rows import GivenDocument, GivenRow, OutDocument, collect, out_rows
from transforms.shards.files import Folder

_TRAINING = ("positive_ctxs", "negative_ctxs", "hard_negative_ctxs")
_KNOWN = ("question", "query_id", "ctxs", *_TRAINING)
_IDS = ("passage_id", "psg_id", "docid", "doc_id", "id")


def recognises(source: Source) -> bool:
    """JSON whose rows have `question` and `ctxs` or `positive_ctxs`."""
    return bool(_files(source))


def read(source: Source, options: ImportOptions) -> RetrievalData:
    """Read rows; contexts without an id are known by title and text, questions by their text."""
    names = _files(source) if source.file is None else [source.file]

    def rows(dead: list[DeadLine] | None) -> Iterator[GivenRow]:
        for name in names:
            for number, row in _objects(source.folder, name, dead):
                try:
                    yield _row(row)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    bury(dead, name, number, f"not a row of DPR ({error!r})", repr(row))

    return collect(rows, options, signal="given_positive")


def write(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """train.jsonl: training rows; negatives are hard negatives, as they come from pools or judges."""
    done = Exported()
    rows = (
        {
            **{"answers": [], **extra_back(row.extra)},
            "query_id": row.query_id,
            "question": row.query,
            "positive_ctxs": [_out(d) for d in row.positives],
            "negative_ctxs": [],
            "hard_negative_ctxs": [_out(d) for d in row.negatives],
        }
        for row in out_rows(export, options, done)
    )
    done.files["train.jsonl"] = write_json_lines(folder, "train.jsonl", rows)
    return done


def _row(row: dict[str, Any]) -> GivenRow:
    if not isinstance(row["question"], str):
        raise TypeError("question is no text")
    contexts = row.get("ctxs") or ()
    gold = [c for c in contexts if c.get("isgold") in (True, 1, "true", "True")]
    return GivenRow(
        row["question"],
        [_document(c, score=False) for c in (*(row.get("positive_ctxs") or ()), *gold)],
        [
            _document(c)
            for c in (*contexts, *(row.get("hard_negative_ctxs") or ()), *(row.get("negative_ctxs") or ()))
        ],
        query_id=None if row.get("query_id") is None else as_id(row["query_id"], "query_id"),
        extra=extra_of(row, _KNOWN),
    )


def _document(context: dict[str, Any], *, score: bool = True) -> GivenDocument:
    key = next((context[k] for k in _IDS if context.get(k) not in (None, "")), None)
    text = context["text"]
    if not isinstance(text, str):
        raise TypeError("a context's text is no text")
    # A retriever's score belongs to the candidate; it is no label.
    value = context.get("score") if score else None
    return GivenDocument(
        None if key is None else as_id(key, "passage id"),
        text,
        context.get("title") or None,
        score=None if value is None else float(value),
    )


def _out(document: OutDocument) -> dict[str, Any]:
    return {"passage_id": document.doc_id, "title": document.title or "", "text": document.text or ""}


def _objects(
    folder: Folder, name: str, dead: list[DeadLine] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of the rows: lines, or items of one array (which is read whole, as JSON must be)."""
    with lines_of(folder, name) as stream:
        begins = stream.read(64).lstrip()[:1]
        if begins != b"[":
            yield from json_lines(folder, name, dead)
            return
    with lines_of(folder, name) as stream:
        try:
            items: Sequence[Any] = orjson.loads(stream.read())
        except orjson.JSONDecodeError as error:
            raise InputError(f"{name} begins like a JSON array but is none ({error})") from error
    for number, item in enumerate(items, 1):
        if isinstance(item, dict):
            yield number, item
        else:
            bury(dead, name, number, "not a JSON object", repr(item))


def _files(source: Source) -> list[str]:
    found = []
    for name in source.files():
        if name.split(".gz")[0].endswith((".jsonl", ".json")):
            try:
                first = next(iter(_objects(source.folder, name)), None)
            except InputError:  # a broken array; whoever names the format is told
                continue
            if first is not None and "question" in first[1] and {"ctxs", "positive_ctxs"} & first[1].keys():
                found.append(name)
    return found


FORMAT = Format(
    "dpr",
    "DPR: questions with answers and contexts",
    recognises,
    read,
    write,
    frozenset({"positives", "rank", "pool", "queries", "documents", "titles", "ids", "extra"}),
    True,
)
