"""TREC files: qrels of four columns, runs of six."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from schemas.errors import InputError
from transforms.retrieval.collection import RetrievalData, frame
from transforms.retrieval.formats.base import (
    ExportData,
    Exported,
    ExportOptions,
    Format,
    ImportOptions,
    Source,
    pool_table,
)
from transforms.retrieval.formats.beir import whole
from transforms.retrieval.formats.lines import bury, separated_lines, write_lines
from transforms.shards.files import Folder

_LOOK = (
    20  # lines by which a file is recognised: most of them must fit, the others are set aside when it is read
)


def recognises_qrels(source: Source) -> bool:
    """A file of four columns, the last a whole number."""
    return _looks(source, 4, lambda parts: whole(parts[3]) is not None)


def recognises_run(source: Source) -> bool:
    """A file of six columns: query, Q0, document, rank, score, tag."""
    return _looks(source, 6, lambda parts: whole(parts[3]) is not None and _number(parts[4]) is not None)


def read_qrels(source: Source, options: ImportOptions) -> RetrievalData:
    """Qrels: query, iteration, document, grade; negative grades (junk) are kept."""
    assert source.file is not None
    data = RetrievalData()
    columns: dict[str, list[Any]] = {"query_id": [], "doc_id": [], "grade": []}
    iterations: set[str] = set()
    for number, line in separated_lines(source.folder, source.file):
        parts = line.split()
        grade = whole(parts[3]) if len(parts) == 4 else None
        if grade is None:
            bury(data.dead, source.file, number, "not query, iteration, document and a whole grade", line)
            continue
        columns["query_id"].append(parts[0])
        columns["doc_id"].append(parts[2])
        columns["grade"].append(grade)
        iterations.add(parts[1])
    if len(options.splits) == 1:
        columns["split"] = [options.splits[0]] * len(columns["grade"])
    data.judgments = options.judgments(columns)
    if iterations - {"0", "Q0"}:
        data.notes.append(
            f"the second column ({', '.join(sorted(iterations)[:3])} ...) has no meaning in qrels and is not kept"
        )
    return data


def read_run(source: Source, options: ImportOptions) -> RetrievalData:
    """A run, as a pool: its tag is the source; ranks are recounted from scores as evaluation tools do.

    The rank column is not to be trusted (tools order by score), so candidates are ranked by score; of equal scores the
    one written first is ahead.
    """
    assert source.file is not None
    data = RetrievalData()
    rows: list[tuple[str, str, str, float]] = []
    for number, line in separated_lines(source.folder, source.file):
        parts = line.split()
        score = _number(parts[4]) if len(parts) >= 6 else None
        if score is None:
            bury(data.dead, source.file, number, "not query, Q0, document, rank, score and tag", line)
            continue
        rows.append((parts[0], parts[2], " ".join(parts[5:]), score))
    found = pl.DataFrame(rows, schema=["query_id", "doc_id", "source", "score"], orient="row")
    found = found.cast({"query_id": pl.String, "doc_id": pl.String, "source": pl.String, "score": pl.Float64})
    found = found.with_columns(
        pl.col("score").rank("ordinal", descending=True).over("query_id", "source").alias("rank")
    )
    data.pool = pool_table({c: found[c].to_list() for c in found.columns})
    return data


def write_qrels(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """One qrels file a split."""
    done = Exported()
    labels = export.labels.with_columns(pl.col("split").fill_null(options.split))
    _no_spaces(labels, "query_id", "doc_id")
    for key, part in labels.sort("place").group_by("split", maintain_order=True):
        name = f"{key[0]}.qrels"
        lines = (f"{q} 0 {d} {g}" for q, d, g in part.select("query_id", "doc_id", "grade").iter_rows())
        done.files[name] = write_lines(folder, name, lines)
    return done


def write_run(export: ExportData, folder: Folder, options: ExportOptions) -> Exported:
    """One run file a source of the pool.

    Raises:
        InputError: The collection has no pool with scores or ranks.
    """
    done = Exported()
    pool = frame(export.data.pool)
    scored = pool.filter(pl.col("score").is_not_null() | pl.col("rank").is_not_null())
    if not scored.height:
        raise InputError("there is no pool with ranks or scores to write a run of")
    _no_spaces(scored, "query_id", "doc_id")
    for key, part in scored.group_by("source", maintain_order=True):
        tag = "-".join(str(key[0]).split()) or options.tag
        # Where a source gave ranks only, a falling score says the same to every tool.
        ranked = part.with_columns(
            pl.col("score").fill_null(-pl.col("rank").cast(pl.Float64)),
        ).with_columns(
            pl.col("rank").fill_null(
                pl.col("score").rank("ordinal", descending=True).over("query_id").cast(pl.Int32)
            )
        )
        name = f"{tag.replace('/', '_')}.run"
        lines = (
            f"{q} Q0 {d} {r} {s!r} {tag}"
            for q, d, r, s in ranked.select("query_id", "doc_id", "rank", "score").iter_rows()
        )
        done.files[name] = write_lines(folder, name, lines)
    if pool.height > scored.height:
        done.lost.append(f"{pool.height - scored.height:,} candidates without rank and score")
    return done


def _looks(source: Source, width: int, fits: Any) -> bool:
    if source.file is None or source.file.endswith((".json", ".jsonl", ".parquet", ".arrow", ".csv")):
        return False
    seen = good = 0
    try:
        for _, line in separated_lines(source.folder, source.file):
            parts = line.split()
            good += len(parts) == width and fits(parts)
            seen += 1
            if seen == _LOOK:
                break
    except InputError:
        return False
    return good * 2 > seen


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _no_spaces(rows: pl.DataFrame, *columns: str) -> None:
    for name in columns:
        bad = rows.filter(pl.col(name).str.contains(r"\s"))
        if bad.height:
            raise InputError(
                f"{name} '{bad[name][0]}' holds a space, which TREC files cannot; export to beir instead"
            )


QRELS = Format(
    "trec-qrels",
    "TREC qrels (4 columns)",
    recognises_qrels,
    read_qrels,
    write_qrels,
    frozenset({"grade", "split", "ids"}),
)
RUN = Format(
    "trec-run", "TREC run (6 columns)", recognises_run, read_run, write_run, frozenset({"pool", "ids"})
)
