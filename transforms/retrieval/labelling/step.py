"""The step of the shard engine that labels: a row is a query, its candidates are looked up, a method is asked.

Resuming, workers, dead rows and progress are the engine's. What is paid for is in the request cache the moment it is
answered, so neither a kill nor an exception pays for a pair twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pyarrow as pa

from models.prompts import Prompt
from models.protocols import LanguageModel, ModelInfo
from schemas import flight
from transforms.retrieval.labelling.budget import Ledger
from transforms.retrieval.labelling.judge import Judge
from transforms.retrieval.labelling.method import Method, QueryLabels, load_method
from transforms.retrieval.labelling.queries import PoolDocument, PooledQuery
from transforms.retrieval.labelling.rows import LABEL_SCHEMA, complete_row, label_table
from transforms.retrieval.labelling.texts import TextStore
from transforms.shards.files import Folder
from transforms.shards.steps import StepContext

LABELS, FACTS = "labels", "facts"
LABELS_TYPE = pa.list_(pa.struct(list(LABEL_SCHEMA)))
# Columns of the planned queries; all are text to the engine.
QUERY_COLUMNS = ("query_id", "text", "documents", "answers", "split")
UNASKED = "label.unasked"  # counter: pairs the budget had no room for

Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Model:
    """A language model by name, with what is recorded of it."""

    name: str
    options: Options
    info: ModelInfo

    def load(self) -> LanguageModel:
        """The model, loaded once a process."""
        from models.registry import load

        return load("lm", self.name, **dict(self.options))


@dataclass(frozen=True)
class LabelCandidates:
    """Step: label every candidate of every query.

    Attributes:
        method: Name of the method.
        options: Its options.
        judge: Who is asked.
        reader: Target model, where it is another one than the judge.
        prompts: Role -> prompt, as pairs.
        texts: Folder with the documents' texts.
        texts_options: fsspec options of its filesystem.
        ledger: Folder that spent tokens are written down in.
        budget: Tokens that may be spent; None = no bound.
        passage_tokens: Longest passage shown to the judge; None = what the context leaves room for.
    """

    method: str
    options: Options
    judge: Model
    prompts: tuple[tuple[str, Prompt], ...]
    texts: str
    texts_options: Options = ()
    reader: Model | None = None
    ledger: str | None = None
    budget: int | None = None
    passage_tokens: int | None = None
    label: str = field(default="LabelCandidates")

    def setup(self, context: StepContext) -> None:
        """Load the method and the models."""
        self._method()
        self.judge.load()
        if self.reader is not None:
            self.reader.load()

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Set the attributes `labels` (a list of `LABEL_SCHEMA` rows a query) and `facts` (JSON)."""
        queries = read_queries(batch, TextStore(Folder(self.texts, **dict(self.texts_options))))
        found: list[QueryLabels] = []
        method = self._method()
        asked = [q for q in queries if q.text.strip()]
        if asked:
            labelled = iter(method.label(asked, self._judge(context)))
            found = [next(labelled) if q.text.strip() else _blank(q) for q in queries]
        else:
            found = [_blank(q) for q in queries]
        rows = [
            _complete(labels, query, method, self.judge.info)
            for labels, query in zip(found, queries, strict=True)
        ]
        facts = [
            orjson.dumps(
                {"known_to": list(f.known_to), "facts": dict(f.facts), "unasked": list(f.unasked)}
            ).decode()
            for f in found
        ]
        for own, labels in zip(rows, found, strict=True):
            context.count("label.pairs", len(own))
            context.count(
                "label.unreadable", sum(r.get("parse_status", "ok") not in ("ok", "repaired") for r in own)
            )
            context.count(UNASKED, len(labels.unasked))
        batch = flight.set_attribute(batch, LABELS, _lists(rows))
        return flight.set_attribute(batch, FACTS, pa.array(facts, pa.string()))

    def _method(self) -> Method:
        return load_method(self.method, dict(self.options))

    def _judge(self, context: StepContext) -> Judge:
        ledger = Ledger(self.ledger, self.budget) if self.ledger is not None else None

        def made(model: Model, reader: Judge | None) -> Judge:
            return Judge(
                model.load,
                model.info,
                prompts=dict(self.prompts),
                cache=context.cache,
                ledger=ledger,
                count=context.count,
                heartbeat=context.heartbeat,
                seed=context.seed,
                passage_tokens=self.passage_tokens,
                reader=reader,
            )

        return made(self.judge, made(self.reader, None) if self.reader is not None else None)


def read_queries(batch: pa.RecordBatch, texts: TextStore) -> list[PooledQuery]:
    """The planned queries of a batch, with their documents' texts."""
    columns = {name: batch.column(name).to_pylist() for name in QUERY_COLUMNS}
    planned = [orjson.loads(d or "[]") for d in columns["documents"]]
    known = texts.get([d["id"] for own in planned for d in own]) if planned else {}
    return [
        PooledQuery(
            query_id=columns["query_id"][i],
            text=columns["text"][i] or "",
            documents=tuple(_document(d, known) for d in own),
            answers=tuple(orjson.loads(columns["answers"][i] or "[]")),
            split=columns["split"][i] or None,
        )
        for i, own in enumerate(planned)
    ]


def _document(planned: dict[str, Any], known: dict[str, tuple[str, str]]) -> PoolDocument:
    title, text = known.get(planned["id"], ("", ""))
    return PoolDocument(
        doc_id=planned["id"],
        title=title,
        text=text,
        pool_source=planned.get("source"),
        pool_rank=planned.get("rank"),
        human=planned.get("human"),
        human_grade=planned.get("grade"),
        missing=planned["id"] not in known,
    )


def _blank(query: PooledQuery) -> QueryLabels:
    """What is said of a query without text: nobody can judge for it."""
    why = {
        "parse_status": "empty",
        "error": "the query has no text",
        "prompt_tokens": 0,
        "completion_tokens": 0,
    }
    return QueryLabels(tuple({"doc_id": d.doc_id, **why} for d in query.documents))


def _complete(
    labels: QueryLabels, query: PooledQuery, method: Method, judge: ModelInfo
) -> list[dict[str, Any]]:
    documents = {d.doc_id: d for d in query.documents}
    return [complete_row(row, query, documents, method, judge.tag) for row in labels.rows]


def _lists(rows: Sequence[list[dict[str, Any]]]) -> pa.Array:
    """Rows by query as a list column."""
    table = label_table([row for own in rows for row in own]).combine_chunks()
    structs = pa.StructArray.from_arrays(
        [table[f.name].combine_chunks() for f in LABEL_SCHEMA], fields=list(LABEL_SCHEMA)
    )
    offsets = [0]
    for own in rows:
        offsets.append(offsets[-1] + len(own))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs).cast(LABELS_TYPE)
