"""Which documents are put to the judge for which query: candidates of all sources in one order, and what people said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import polars as pl
import pyarrow as pa

from schemas.errors import InputError
from schemas.fingerprint import fingerprint
from transforms.retrieval.labelling.step import QUERY_COLUMNS
from transforms.retrieval.unify import LabelFilter, PositiveRule

ANSWER_KEYS = ("answers", "answer", "gold_answers", "gold", "short_answers")
HUMAN = "human"  # source of candidates that people put up
_SCHEMA = pa.schema([pa.field(name, pa.string()) for name in QUERY_COLUMNS])


@dataclass(frozen=True)
class Planned:
    """What is to be judged.

    Attributes:
        table: One row a query (`QUERY_COLUMNS`, all text; documents and answers as JSON), in the order of the queries.
        candidates: Pairs in it.
        documents: Ids of the documents in it, sorted.
        queries: Its query ids, in order.
        without_text: Queries of the pool whose text is not known; they are left out.
        beyond_depth: Candidates left out, for they stand below the depth.
    """

    table: pa.Table
    candidates: int
    documents: tuple[str, ...]
    queries: tuple[str, ...]
    without_text: tuple[str, ...]
    beyond_depth: int


def plan_queries(
    pool: pl.DataFrame,
    queries: pl.DataFrame,
    human: pl.DataFrame,
    *,
    depth: int | None = None,
    limit: int | None = None,
    splits: Sequence[str] = (),
) -> Planned:
    """Plan.

    A candidate stands at its best rank over the sources (ties: by source, then id); what has no rank anywhere comes last.
    What people put up, and what has no rank, is kept whatever the depth: training on a pool without them hurts.

    Args:
        pool: Of `schemas.pools.POOL_SCHEMA`.
        queries: Of `schemas.judgments.QUERY_SCHEMA`.
        human: Judgments of people (any others are passed over).
        depth: Candidates a query, besides those that stay in any case; None = all.
        limit: So many queries, chosen by the hashes of their ids; None = all.
        splits: Only queries people judged in one of these; empty = all.

    Raises:
        InputError: No candidates, or no query of them has a text.
    """
    if not pool.height:
        raise InputError("the pool holds no candidates (columns query_id, doc_id, source, rank, score)")
    labels = _human(human)
    vouched = (
        pool.filter(pl.col("source") == HUMAN)
        .select("query_id", "doc_id", pl.lit(True).alias("vouched"))
        .unique()
    )
    best = (
        pool.sort("query_id", "doc_id", pl.col("rank").is_null(), "rank", "source")
        .group_by("query_id", "doc_id", maintain_order=True)
        .first()
        .select("query_id", "doc_id", "source", "rank")
        .join(labels, on=("query_id", "doc_id"), how="left")
        .join(vouched, on=("query_id", "doc_id"), how="left")
        .sort("query_id", pl.col("rank").is_null(), "rank", "source", "doc_id")
        .with_columns(pl.int_range(pl.len()).over("query_id").alias("place"))
    )
    stays = pl.col("rank").is_null() | pl.col("vouched").fill_null(False)
    kept = best if depth is None else best.filter((pl.col("place") < depth) | stays)
    named = queries.unique("query_id", keep="first", maintain_order=True)
    chosen = named.join(kept.select("query_id").unique(), on="query_id", how="semi", maintain_order="left")
    split_of = (
        human.filter(pl.col("split").is_not_null()).group_by("query_id").agg(pl.col("split").sort().first())
        if "split" in human.columns and human.height
        else pl.DataFrame(schema={"query_id": pl.String, "split": pl.String})
    )
    chosen = chosen.join(split_of, on="query_id", how="left", maintain_order="left")
    if splits:
        chosen = chosen.filter(pl.col("split").is_in(list(splits)))
    if limit is not None and limit < chosen.height:
        ids = sorted(chosen["query_id"].to_list(), key=lambda q: (fingerprint("query", q), q))[:limit]
        chosen = chosen.filter(pl.col("query_id").is_in(ids))
    if not chosen.height:
        first = kept["query_id"][0]
        why = (
            f"in split {', '.join(splits)}" if splits else f"(the pool's first is '{first}'); pass --queries"
        )
        raise InputError(f"no query of the pool is known {why}")
    of_these = chosen.select("query_id")
    every = best.join(of_these, on="query_id", how="semi").height
    kept = kept.join(of_these, on="query_id", how="semi", maintain_order="left")
    return Planned(
        table=_table(chosen, kept),
        candidates=kept.height,
        documents=tuple(sorted(kept["doc_id"].unique().to_list())),
        queries=tuple(chosen["query_id"].to_list()),
        without_text=tuple(sorted(set(pool["query_id"].unique()) - set(named["query_id"]))),
        beyond_depth=every - kept.height,
    )


def _human(judgments: pl.DataFrame) -> pl.DataFrame:
    """query_id, doc_id, human (positive or not), grade: the best label people gave a pair."""
    schema = {"query_id": pl.String, "doc_id": pl.String, "human": pl.Boolean, "grade": pl.Int32}
    if not judgments.height:
        return pl.DataFrame(schema=schema)
    labels = LabelFilter(label_source="human").apply(judgments)
    return (
        labels.with_columns(PositiveRule().expression())
        .group_by("query_id", "doc_id", maintain_order=True)
        .agg(pl.col("positive").max().alias("human"), pl.col("grade").max())
        .cast({"grade": pl.Int32})
        .select(list(schema))
    )


def _table(queries: pl.DataFrame, kept: pl.DataFrame) -> pa.Table:
    documents: dict[str, list[dict[str, Any]]] = {q: [] for q in queries["query_id"].to_list()}
    columns = ("query_id", "doc_id", "source", "rank", "human", "grade")
    for query, doc, source, rank, human, grade in kept.select(columns).iter_rows():
        fields = {"id": doc, "source": source, "rank": rank, "human": human, "grade": grade}
        documents[query].append({k: v for k, v in fields.items() if v is not None})
    rows = [
        {
            "query_id": q["query_id"],
            "text": q["text"] or "",
            "documents": orjson.dumps(documents[q["query_id"]]).decode(),
            "answers": orjson.dumps(gold_answers(q["extra"])).decode(),
            "split": q["split"],
        }
        for q in queries.iter_rows(named=True)
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def gold_answers(extra: str | None) -> list[str]:
    """Gold answers in what a queries file says besides (`answers`, `answer`; a string or a list of strings)."""
    if not extra:
        return []
    try:
        facts = orjson.loads(extra)
    except orjson.JSONDecodeError:
        return []
    if not isinstance(facts, dict):
        return []
    for key in ANSWER_KEYS:
        value = facts.get(key)
        if isinstance(value, str) and value.strip():
            try:  # a list that a table without lists holds as JSON
                inner = orjson.loads(value) if value.lstrip().startswith("[") else value
            except orjson.JSONDecodeError:
                inner = value
            value = inner
        found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        texts = [str(v) for v in found if str(v).strip()]
        if texts:
            return texts
    return []
