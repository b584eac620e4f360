"""A small collection with everything a label can have, and how to write and read it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from pipelines import judgments_export
from pipelines.judgments_export import ExportConfig, ExportResult
from tests.conftest import ROOT
from transforms.retrieval import formats
from transforms.retrieval.collection import RetrievalData, frame
from transforms.retrieval.formats.base import ImportOptions

SAMPLE = ROOT / "examples" / "retrieval"


def read(source: Path | str, format_name: str | None = None, **options: Any) -> RetrievalData:
    """Read a collection."""
    return formats.read(str(source), ImportOptions(**options), format_name)[0]


def export(out: Path, format_name: str, source: Path | str = SAMPLE, **settings: Any) -> ExportResult:
    """Write a collection, by default the sample."""
    sources = source if isinstance(source, tuple) else (str(source),)
    return judgments_export.run(ExportConfig(source=sources, output=str(out), format=format_name, **settings))


def labels(data: RetrievalData, *columns: str) -> set[tuple[Any, ...]]:
    """Labels as a set of tuples."""
    names = columns or ("query_id", "doc_id", "grade", "split")
    return set(frame(data.judgments).select(names).iter_rows())


def documents(data: RetrievalData) -> list[dict[str, Any]]:
    """Documents, whole."""
    assert data.documents is not None
    return [row for batch in data.documents() for row in batch.to_pylist()]


def rows(path: Path) -> pl.DataFrame:
    """A Parquet file."""
    return pl.read_parquet(path)
