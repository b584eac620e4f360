"""FlagEmbedding: JSONL rows {query, pos, neg, pos_scores, neg_scores, prompt, type}, texts without ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transforms.retrieval.collection import DeadLine, RetrievalData
from transforms.retrieval.formats.base import (
    ExportData,
    Exported,
    ExportOptions,
    Format,
    ImportOptions,
    Source,
)
from transforms.retrieval.formats.lines import bury, extra_back, extra_of, json_lines, write_json_lines
from transforms.retrieval.formats.rows import GivenDocument, GivenRow, collect, out_rows
from transforms.shards.files import Folder

_KNOWN = ("query", "pos", "neg", "pos_scores", "neg_scores")


def recognises(source: Source) -> bool:
    """JSONL whose rows have `query`, `pos` and `neg`."""
    return bool(_files(source))


def read(source: Source, options: ImportOptions) -> RetrievalData:
    """Read rows; scores of positives are values, scores of negatives the candidates' scores."""
    names = _files(source)

    def rows(dead: list[DeadLine] | None) -> Iterator[GivenRow]:
        for name in names:
            for number, row in json_lines(source.folder, name, dead):
                try:
                    yield GivenRow(
                        _text(row["query"]),
                        _documents(row["pos"], row.get("pos_scores")),
                        _documents(row.get("neg") or (), row.get("neg_scores")),
                        extra=extra_of(row, _KNOWN),
                    )
                except (KeyError, TypeError, ValueError) as error:
                    bury(dead, name, number, f"not a row of FlagEmbedding ({error!r})", repr(row))

    return collect(rows, options, signal="given_positive")


def write(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """train.jsonl; scores only where every document of a row has one, as readers want it."""
    done = Exported()
    incomplete = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal incomplete
        for row in out_rows(export, options, done):
            out: dict[str, Any] = {
                "query": row.query,
                "pos": [d.joined for d in row.positives],
                "neg": [d.joined for d in row.negatives],
            }
            scores = [d.score for d in (*row.positives, *row.negatives)]
            if scores and None not in scores:
                out["pos_scores"] = scores[: len(row.positives)]
                out["neg_scores"] = scores[len(row.positives) :]
            elif any(s is not None for s in scores):
                incomplete += 1
            yield {**out, **extra_back(row.extra)}

    done.files["train.jsonl"] = write_json_lines(folder, "train.jsonl", rows())
    if incomplete:
        done.lost.append(f"scores of {incomplete:,} rows in which not every document has one")
    return done


def _documents(texts: Sequence[Any], scores: Sequence[Any] | None) -> list[GivenDocument]:
    if isinstance(texts, str):
        raise TypeError("pos and neg are lists of texts")
    if scores is not None and len(scores) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(scores)} scores")
    return [
        GivenDocument(None, _text(t), score=None if scores is None else float(scores[i]))
        for i, t in enumerate(texts)
    ]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _files(source: Source) -> list[str]:
    found = []
    for name in source.files():
        if name.split(".gz")[0].endswith((".jsonl", ".json")):
            first = next(iter(json_lines(source.folder, name)), None)
            if first is not None and {"query", "pos", "neg"} <= first[1].keys():
                found.append(name)
    return found


FORMAT = Format(
    "flagembedding",
    "FlagEmbedding rows",
    recognises,
    read,
    write,
    frozenset({"positives", "rank", "value", "pool", "queries", "documents", "extra"}),
    True,
)
