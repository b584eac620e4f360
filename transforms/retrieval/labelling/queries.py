"""What a method labels: a query with the documents a pool put up for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolDocument:
    """A document to be judged for one query.

    Attributes:
        doc_id: Its id.
        title: Its title; empty where it has none.
        text: Its text, whole.
        pool_source: Retriever that put it up; where several did, the one that ranked it best.
        pool_rank: Its rank there, 1 = best; None where that source gives no order.
        human: Whether people judged it relevant; None where nobody judged it.
        human_grade: Their grade, where they gave one.
        missing: The corpus holds no document of this id; there is no text to judge.
    """

    doc_id: str
    title: str
    text: str
    pool_source: str | None = None
    pool_rank: int | None = None
    human: bool | None = None
    human_grade: int | None = None
    missing: bool = False

    @property
    def passage(self) -> str:
        """Title and text as one passage, as the shipped judge was trained to read it: `Title. Text`."""
        title, text = self.title.strip(), self.text.strip()
        return f"{title}. {text}" if title else text


@dataclass(frozen=True)
class PooledQuery:
    """A query with its candidates.

    Attributes:
        query_id: Its id.
        text: The query as it was asked.
        documents: Candidates, best pool rank first (human positives without a rank last); no id twice. This order is the
            same whatever the pool's files looked like.
        answers: Gold answers, where the queries carry any (`answers`, `answer`); empty = none known.
        split: Part of the collection it belongs to, where its labels say so.
    """

    query_id: str
    text: str
    documents: tuple[PoolDocument, ...]
    answers: tuple[str, ...] = ()
    split: str | None = None
