"""`tamis judgments import`: a collection of any format as tables, with nothing lost on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from pipelines.retrieval.folder import TableFolder, input_fingerprints
from schemas.errors import InputError
from schemas.judgments import DOCUMENT_SCHEMA, LABEL_KEY, QUERY_SCHEMA, check_judgments
from schemas.pools import POOL_KEY, POOL_SCHEMA
from transforms.retrieval import formats
from transforms.retrieval.collection import DEAD_SCHEMA, RetrievalData, frame, without_repeats
from transforms.retrieval.formats.base import ImportOptions
from transforms.retrieval.unify import label_sets

CORPUS_ROWS = 100_000
MOST_SHOWN = 8


class ImportConfig(BaseModel):
    """Settings of `tamis judgments import`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="File, folder or URL.")
    output: str = Field(description="Folder to write.")
    format: str | None = Field(None, description="Format of the source; None looks.")
    label_source: str | None = Field(None, description="human or llm, where the source does not say.")
    annotator: str | None = Field(None, description="Who judged, where the source does not say.")
    signal: str | None = Field(None, description="What the labels are; default by the format.")
    target_model: str | None = Field(None, description="Reader the labels hold for; None = any.")
    splits: tuple[str, ...] = Field((), description="Splits to read; default all.")
    corpus_source: str | None = Field(None, description="Which copy of the documents, or `all`.")
    negatives: str = Field("pool", description="Given negatives are candidates (pool) or labels (judged).")
    corpus: bool = Field(True, description="Also write the documents.")
    overwrite: bool = False
    storage_options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class ImportResult:
    """What came of it.

    Attributes:
        output: The folder.
        state: `finished`, or `already finished`.
        manifest: Its manifest.
    """

    output: str
    state: str
    manifest: dict[str, Any]


def run(config: ImportConfig) -> ImportResult:
    """Run it.

    Raises:
        InputError: Nothing there, of no known format, or contradicting itself.
        OutputError: The folder holds something else.
    """
    settings = config.model_dump(exclude={"output", "overwrite", "storage_options"})
    settings["input"] = input_fingerprints(config.source, config.storage_options)
    out = TableFolder(
        config.output,
        "judgments import",
        settings,
        overwrite=config.overwrite,
        options=config.storage_options,
    )
    if (manifest := out.finished) is not None:
        return ImportResult(config.output, "already finished", manifest)
    options = ImportOptions(
        config.label_source,
        config.annotator,
        config.signal,
        config.target_model,
        config.splits,
        config.corpus_source,
        config.negatives,
    )
    data, format_name = formats.read(config.source, options, config.format, config.storage_options)
    write_data(out, data, config.source, corpus=config.corpus)
    return ImportResult(
        config.output,
        "finished",
        out.finish(
            _totals(data, out),
            format=format_name,
            notes=data.notes,
            label_sets=[] if not data.judgments.num_rows else label_sets(frame(data.judgments)).to_dicts(),
        ),
    )


def write_data(out: TableFolder, data: RetrievalData, where: str, *, corpus: bool = True) -> None:
    """Write a collection as tables.

    Raises:
        InputError: It is empty, or contradicts itself.
    """
    data.judgments, repeats = without_repeats(data.judgments, LABEL_KEY, "judgment", where)
    if repeats:
        data.notes.append(f"{repeats:,} judgments said the same again and were left out")
    data.pool, repeats = without_repeats(data.pool, POOL_KEY, "candidate", where)
    if repeats:
        data.notes.append(f"{repeats:,} candidates were named again and left out")
    check_judgments(data.judgments, where)
    if not (data.judgments.num_rows or data.pool.num_rows):
        first = f" (line {data.dead[0].line}: {data.dead[0].error})" if data.dead else ""
        raise InputError(f"{where} holds neither a judgment nor a candidate{first}")
    out.start()
    out.write("data", "judgments.parquet", data.judgments, data.judgments.schema)
    if data.queries.num_rows:
        out.write("queries", "queries.parquet", data.queries, QUERY_SCHEMA)
    if data.pool.num_rows:
        out.write("pool", "pool.parquet", data.pool, POOL_SCHEMA)
    if corpus and data.documents is not None:
        _write_corpus(out, data)
    if data.dead:  # after the corpus, whose bad lines are found while it is read
        out.write("dead", "judgments.parquet", data.dead_table(), DEAD_SCHEMA)


def _write_corpus(out: TableFolder, data: RetrievalData) -> None:
    assert data.documents is not None
    batches = data.documents()
    part, waiting = 0, next(batches, None)
    while waiting is not None:

        def some() -> Any:
            nonlocal waiting
            rows = 0
            while waiting is not None and rows < CORPUS_ROWS:
                rows += waiting.num_rows
                yield waiting
                waiting = next(batches, None)

        out.write("corpus", f"part-{part:05d}.parquet", some(), DOCUMENT_SCHEMA)
        part += 1


def _totals(data: RetrievalData, out: TableFolder) -> dict[str, int]:
    judged = data.judgments
    documents = sum(t["rows"] for t in out._sides if t["path"].startswith("corpus/"))
    unnamed = 0
    if data.queries.num_rows and judged.num_rows:
        known = pc.is_in(pc.unique(judged["query_id"]), data.queries["query_id"])
        unnamed = len(known) - int(pc.sum(known).as_py() or 0)
    if unnamed:
        data.notes.append(f"{unnamed:,} judged queries are not among the queries and have no text")
    return {
        "judgments": judged.num_rows,
        "queries": data.queries.num_rows,
        "judged_queries": len(pc.unique(judged["query_id"])),
        "candidates": data.pool.num_rows,
        "documents": documents,
        "dead": len(data.dead),
    }


def print_result(result: ImportResult) -> None:
    """Say what came of it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    m = result.manifest
    counts = "   ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in m["totals"].items() if n)
    console.print(f"{result.state}: {m['format']}   {counts}", soft_wrap=True)
    if m["label_sets"]:
        table = Table(box=None, title="labels by", title_justify="left")
        for heading in ("annotator", "labels", "queries", "positive", "unreadable"):
            table.add_column(heading, justify="left" if heading == "annotator" else "right")
        for row in m["label_sets"][:MOST_SHOWN]:
            numbers = (row["labels"], row["queries"], row["positives"], row["unreadable"])
            table.add_row(row["name"], *(f"{n:,}" for n in numbers))
        console.print(table)
    for note in m["notes"]:
        console.print(note, soft_wrap=True)
    if dead := m["totals"]["dead"]:
        console.print(f"{dead:,} lines could not be read: see {result.output}/dead", soft_wrap=True)
    console.print(f"tables: {result.output}", soft_wrap=True)
