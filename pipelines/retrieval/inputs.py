"""Several collections, pools and files of texts as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.retrieval.corpus import CorpusSource
from pipelines.retrieval.folder import input_fingerprints
from schemas.errors import InputError, TamisError
from schemas.fingerprint import config_hash
from schemas.judgments import QUERY_SCHEMA
from transforms.embed.text import TextTemplate
from transforms.retrieval import formats
from transforms.retrieval.collection import RetrievalData, frame
from transforms.retrieval.formats.base import ImportOptions


def read_all(
    judgments: Sequence[str],
    *,
    pools: Sequence[str] = (),
    corpus: str | None = None,
    queries: str | None = None,
    splits: Sequence[str] = (),
    corpus_source: str | None = None,
    options: dict[str, Any] | None = None,
) -> RetrievalData:
    """Read them.

    Args:
        judgments: Collections of any format.
        pools: Collections whose candidates are wanted: pools, runs.
        corpus: Documents; None takes those of the first collection that has any.
        queries: Queries; None takes those of the collections.
        splits: Splits to read; empty = all.
        corpus_source: Which copy of the documents, where there are several.
        options: fsspec options of the filesystem.

    Raises:
        InputError: One cannot be read, or a pool holds no candidate.
    """
    from transforms.retrieval.texts import open_documents, read_queries

    wanted = ImportOptions(splits=tuple(splits), corpus_source=corpus_source)
    parts = [formats.read(url, wanted, storage=options)[0] for url in judgments]
    more = [formats.read(url, storage=options)[0] for url in pools]
    for url, part in zip(pools, more, strict=True):
        if not part.pool.num_rows:
            raise InputError(
                f"--pool {url} holds no candidates (columns query_id, doc_id, source, rank, score)"
            )
    data = RetrievalData(
        judgments=pa.concat_tables([p.judgments for p in parts], promote_options="default"),
        pool=pa.concat_tables([p.pool for p in (*parts, *more)]),
        notes=[n for p in (*parts, *more) for n in p.notes],
        dead=[d for p in (*parts, *more) for d in p.dead],
    )
    if data.dead:
        first = data.dead[0]
        data.notes.append(
            f"{len(data.dead):,} lines could not be read, the first {first.file}, line {first.line} ({first.error})"
        )
    if queries is not None:
        data.queries = read_queries(queries, options)
    else:
        found = frame(pa.concat_tables([p.queries for p in (*parts, *more)])).unique(
            "query_id", keep="first", maintain_order=True
        )
        data.queries = found.to_arrow().cast(QUERY_SCHEMA)
    if corpus is not None:
        data.documents = open_documents(corpus, options)
    else:
        data.documents = next((p.documents for p in parts if p.documents is not None), None)
    return data


@dataclass(frozen=True)
class Searchable:
    """A collection that is to be searched.

    Attributes:
        data: Queries, labels.
        source: Its documents and their texts.
        fingerprints: By place, the fingerprint of every file that was read.
    """

    data: RetrievalData
    source: CorpusSource
    fingerprints: dict[str, dict[str, str]]


def open_collection(
    collection: str | None,
    *,
    corpus: str | None = None,
    queries: str | None = None,
    splits: Sequence[str] = (),
    corpus_source: str | None = None,
    text: str,
    options: dict[str, Any] | None = None,
    need_documents: bool = True,
) -> Searchable:
    """Open a collection, or documents and queries alone, to be searched.

    Args:
        collection: Of any format; None: documents and queries alone.
        corpus: Documents; None takes those of the collection.
        queries: Queries; None takes those of the collection.
        splits: Splits to read; empty = all.
        corpus_source: Which copy of the documents, where there are several.
        text: Text of a document, made of its columns.
        options: fsspec options of the filesystem.
        need_documents: Whether it is an error that there are none.

    Raises:
        InputError: Something cannot be read, or there are no documents.
        TamisError: Nothing was named.
    """
    from transforms.retrieval.texts import open_documents, read_queries

    places = [url for url in (collection, corpus, queries) if url is not None]
    if collection is not None:
        data = read_all(
            (collection,),
            corpus=corpus,
            queries=queries,
            splits=splits,
            corpus_source=corpus_source,
            options=options,
        )
    elif corpus is not None and queries is not None:
        data = RetrievalData(
            documents=open_documents(corpus, options), queries=read_queries(queries, options)
        )
    else:
        raise TamisError("name a collection, or pass both --corpus and --queries")
    if data.documents is None and need_documents:
        raise InputError(f"{collection} holds no documents: pass --corpus")
    fingerprints = {url: input_fingerprints(url, options) for url in places}
    files = fingerprints[corpus or collection or ""]
    mark = config_hash({"files": files, "copy": corpus_source})
    return Searchable(
        data, CorpusSource(data.documents or no_documents, TextTemplate(text), mark), fingerprints
    )


def no_documents() -> Iterator[pa.RecordBatch]:
    """None at all."""
    return iter(())
