"""`tamis judgments export`: a collection in another tool's format, and a word on everything that tool cannot hold."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from pipelines.retrieval.inputs import read_all
from schemas.errors import InputError, OutputError
from schemas.judgments import JUDGMENT_SCHEMA, READABLE
from transforms.retrieval import formats
from transforms.retrieval.collection import RetrievalData
from transforms.retrieval.formats.base import ExportData, Exported, ExportOptions, Format
from transforms.retrieval.groups import quality_order
from transforms.retrieval.unify import LabelFilter, PositiveRule, unify
from transforms.shards.files import Folder

if TYPE_CHECKING:
    import polars as pl

RECORD = ".tamis-export.json"  # hidden, so that no reader takes it for data
# What every reader takes for granted where a format has no place for it.
_TAKEN_FOR_GRANTED = {
    "label_source": "human",
    "annotator": "human",
    "signal": "qrels",
    "signal_class": None,
    "parse_status": "ok",
}


class ExportConfig(BaseModel):
    """Settings of `tamis judgments export`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: tuple[str, ...] = Field(description="Collections of any format.")
    output: str = Field(description="Folder to write.")
    format: str = Field(description="Format to write.")
    pools: tuple[str, ...] = ()
    corpus: str | None = None
    queries: str | None = None
    corpus_source: str | None = None
    label_source: str | None = None
    annotators: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()
    target_models: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    unify: str = "apart"
    across_targets: bool = False
    positive_from: int = 1
    positive_value: float = 0.0
    positive_rank: int | None = None
    split: str = Field("test", description="Name of the split of labels that have none.")
    negatives: int | None = Field(None, ge=1, description="Negatives a row, where the format has them.")
    layout: str | None = Field(None, description="sentence-transformers: pair, triplet, n-tuple, ...")
    overwrite: bool = False
    storage_options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class ExportResult:
    """What came of it.

    Attributes:
        output: The folder.
        format: What was written.
        files: Name -> rows.
        lost: What the format could not hold, a line each.
        notes: What else the reader should know.
    """

    output: str
    format: str
    files: dict[str, int]
    lost: list[str]
    notes: list[str]


def run(config: ExportConfig) -> ExportResult:
    """Run it.

    Raises:
        InputError: No such format, labels nobody said how to merge, texts missing that the format needs.
        OutputError: The folder holds something else.
    """
    format_ = formats.find(config.format)
    if format_.write is None:
        raise InputError(
            f"format '{config.format}' is only read; there are {', '.join(formats.names(writable=True))}"
        )
    folder = _open(config)
    data = read_all(
        config.source,
        pools=config.pools,
        corpus=config.corpus,
        queries=config.queries,
        splits=config.splits,
        corpus_source=config.corpus_source,
        options=config.storage_options,
    )
    if format_.needs_texts and data.documents is None:
        raise InputError(f"format '{config.format}' carries texts, and there are no documents: pass --corpus")
    chosen = LabelFilter(
        config.label_source, config.annotators, config.signals, config.target_models, config.splits
    )
    rows = chosen.apply(data.labels())
    labels, merged = labels_to_write(rows, config, data.queries_with_labels_first())
    if not labels.height and "pool" not in format_.holds:
        raise InputError("there is no readable label to write")
    options = ExportOptions(config.split, config.positive_from, config.negatives, config.layout)
    done = format_.write(ExportData(labels, data), folder, options)
    lost = [*what_is_lost(rows, data, format_, merged), *done.lost]
    _record(folder, config, done, lost)
    return ExportResult(config.output, format_.name, done.files, lost, data.notes)


def labels_to_write(
    rows: pl.DataFrame, config: ExportConfig, queries: Sequence[str]
) -> tuple[pl.DataFrame, int]:
    """One label a pair with a grade, best first within a query; and how many labels were merged away.

    Args:
        rows: Judgments.
        config: How labels merge, and when one is positive.
        queries: The order of queries.

    Returns:
        query_id, doc_id, grade, positive, value, rank, pool_rank, split, place; and the number.
    """
    import polars as pl

    rule = PositiveRule(config.positive_from, config.positive_value, config.positive_rank)
    rows = rows.with_row_index("place")
    one = unify(rows, config.unify, rule, across_targets=config.across_targets, contributors=False)
    read = rows.filter(pl.col("parse_status").is_in(list(READABLE))).height
    yes = pl.coalesce("binary", "positive").cast(pl.Int32)
    one = one.with_columns(pl.coalesce(pl.col("grade"), yes).alias("grade"))
    place = {q: i for i, q in enumerate(queries)}
    order = quality_order(one).select("query_id", "doc_id", "quality_rank")
    labels = one.join(order, on=["query_id", "doc_id"], how="left", maintain_order="left")
    labels = labels.sort(
        pl.col("query_id").replace_strict(place, return_dtype=pl.Int64, default=0) if place else "query_id",
        "quality_rank",
        maintain_order=True,
    )
    labels = labels.filter(pl.col("grade").is_not_null())
    columns = ("query_id", "doc_id", "grade", "positive", "value", "rank", "pool_rank", "split", "place")
    return labels.select(columns), read - one.height


def what_is_lost(rows: pl.DataFrame, data: RetrievalData, format_: Format, merged: int) -> list[str]:
    """What a reader of the format will not get back, a line each.

    Args:
        rows: The judgments that were to be written.
        data: The collection.
        format_: The format.
        merged: Labels that were merged away.
    """
    import polars as pl

    lost = []
    readable = rows.filter(pl.col("parse_status").is_in(list(READABLE)))
    if unread := rows.height - readable.height:
        lost.append(f"{unread:,} replies that could not be read")
    if merged:
        lost.append(f"{merged:,} labels merged into others")
    holds = format_.holds
    if not holds & {"grade", "positives", "value"}:
        return [*lost, f"{readable.height:,} labels"] if readable.height else lost
    for field in JUDGMENT_SCHEMA:
        name = field.name
        if name in holds or name in ("query_id", "doc_id", "context_hash"):
            continue
        if name == "grade" and "positives" in holds:
            lost += _coarser(readable)
            continue
        if name == "context_ids":
            some = readable.filter(pl.col(name).list.len() > 0).height
        else:
            granted = _TAKEN_FOR_GRANTED.get(name)
            some = readable.filter(
                pl.col(name).is_not_null() & (pl.col(name) != granted if granted is not None else True)
            ).height
        if some:
            values = readable[name].drop_nulls().unique().sort() if name != "context_ids" else []
            said = f" ({', '.join(str(v) for v in values)})" if 0 < len(values) <= 3 else ""
            lost.append(f"{name} of {some:,} labels{said}")
    if data.pool.num_rows and "pool" not in holds:
        lost.append(f"{data.pool.num_rows:,} candidates of the pool")
    elif data.pool.num_rows and "positives" in holds:
        lost.append("which source found a negative")
    silent = len(set(data.queries["query_id"].to_pylist()) - set(readable["query_id"].to_list()))
    if silent and "positives" in holds:
        lost.append(f"{silent:,} queries without a label")
    if data.documents is not None and "documents" not in holds:
        lost.append("texts of documents")
    elif data.documents is not None and "ids" not in holds:
        lost.append("ids of queries and documents (their texts stand for them), and titles as such")
    if data.queries.num_rows and "queries" not in holds:
        lost.append("texts of queries")
    known = data.queries["known_to"]
    if known.null_count < len(known) and "known_to" not in holds:
        lost.append("which queries a model answers unaided")
    return lost


def _coarser(readable: pl.DataFrame) -> list[str]:
    """What positive and negative do not say of grades."""
    import polars as pl

    lost = []
    if graded := readable.filter(pl.col("grade") > 1).height:
        lost.append(f"grades above 1 of {graded:,} labels (positives stand in order of quality)")
    if below := readable.filter((pl.col("grade") < 1) | ~pl.col("binary")).height:
        lost.append(f"that {below:,} negatives were judged, not only found")
    return lost


def _open(config: ExportConfig) -> Folder:
    folder = Folder(config.output, **config.storage_options)
    there = folder.find() if folder.exists() else []
    if there and not (config.overwrite and folder.exists(RECORD)):
        ours = folder.exists(RECORD)
        what = "an export; pass --overwrite to replace it" if ours else f"{there[0]}; pass another -o"
        raise OutputError(f"{folder.url} holds {what}")
    for name in {n.split("/")[0] for n in there}:
        folder.remove(name)
    return folder


def _record(folder: Folder, config: ExportConfig, done: Exported, lost: list[str]) -> None:
    import importlib.metadata

    record = {
        "job": "judgments export",
        "tamis_version": importlib.metadata.version("tamis"),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.model_dump(exclude={"storage_options"}),
        "files": done.files,
        "lost": lost,
    }
    folder.write(RECORD, orjson.dumps(record, option=orjson.OPT_INDENT_2) + b"\n")
    folder.remove("_tamis")  # where files were written before they were renamed: this is no folder of a job


def print_result(result: ExportResult) -> None:
    """Say what came of it."""
    from rich.console import Console

    console = Console()
    for name, rows in result.files.items():
        console.print(f"{rows:>12,}  {result.output}/{name}", soft_wrap=True, highlight=False)
    for note in result.notes:
        console.print(note, soft_wrap=True)
    if result.lost:
        console.print(f"{result.format} has no place for:", soft_wrap=True)
        for line in result.lost:
            console.print(f"  {line}", soft_wrap=True)
    else:
        console.print("nothing is lost: importing it again gives the same tables")
