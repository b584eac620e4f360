"""Settings of `tamis pool`, and which of them contradict one another."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.retrieval.corpus import DEFAULT_TEXT
from schemas.errors import TamisError
from transforms.retrieval.candidates import FUSIONS, HUMAN, RANDOM

BM25 = "bm25"


class PoolConfig(BaseModel):
    """Settings of `tamis pool`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    collection: str | None = Field(
        None, description="Collection of any format: documents, queries, judgments."
    )
    output: str = Field(description="Folder to write.")
    corpus: str | None = Field(None, description="Documents; default those of the collection.")
    queries: str | None = Field(None, description="Queries; default those of the collection.")
    corpus_source: str | None = Field(
        None, description="Which copy of the documents, where there are several."
    )
    splits: tuple[str, ...] = Field((), description="Only queries judged in these splits.")
    sample_queries: int | None = Field(None, ge=1, description="Only so many queries, drawn by seed and id.")
    text: str = Field(DEFAULT_TEXT, description="Text of a document, made of title and text.")
    # sources
    bm25: bool = True
    k1: float = 0.9
    b: float = 0.4
    stopwords: str = "en"
    stemmer: str = "none"
    dense: dict[str, str] = Field(
        default_factory=dict, description="Name -> output of tamis embed, or encoder."
    )
    dense_options: dict[str, Any] = Field(default_factory=dict, description="How encoders by name are used.")
    runs: dict[str, str] = Field(default_factory=dict, description="Name -> TREC run.")
    human: bool = Field(False, description="Put what people judged good into the pool too.")
    positive_from: int = Field(1, description="Least grade of a human positive.")
    random: int = Field(0, ge=0, description="Documents drawn at random for each query.")
    depth: dict[str, int] = Field(
        default_factory=dict, description='Documents a query by source; "" for all.'
    )
    budget: int | None = Field(None, ge=1, description="Documents a query keeps of what was found.")
    fusion: str = Field("rrf", description="By which the budget is spent: rrf, interleave.")
    keep_self: bool = Field(False, description="Keep a document whose id is the query's.")
    exact: bool = Field(False, description="Look at every vector, even where there is an index.")
    documents: str = Field("pooled", description="Documents written beside the pool: pooled, all, none.")
    seed: int = 0
    queries_per_shard: int = Field(5_000, ge=1)
    # running
    device: str = "auto"
    threads: int = Field(1, ge=1)
    workers: int = Field(1, ge=1)
    overwrite: bool = False
    progress: str = Field("auto", description="auto, plain, quiet.")
    storage_options: dict[str, Any] = Field(default_factory=dict)

    def depth_of(self, name: str) -> int:
        """How deep a source is asked."""
        return self.depth.get(name, self.depth.get("", 100))


COSMETIC = {"output", "overwrite", "progress", "storage_options", "device", "threads", "workers"}


def check(config: PoolConfig) -> None:
    """Refuse settings that contradict one another.

    Raises:
        TamisError: They do.
    """
    names = [*([BM25] if config.bm25 else []), *config.dense, *config.runs]
    twice = next((n for n in names if names.count(n) > 1 or n in (HUMAN, RANDOM)), None)
    if twice is not None:
        raise TamisError(f"two sources are called '{twice}'; give one of them another name: NAME=...")
    if not names and not config.human and not config.random:
        raise TamisError("nothing to pool: leave out --no-bm25, or pass --dense, --run or --human")
    strange = [n for n in config.depth if n and n not in names]
    if strange:
        raise TamisError(f"--depth {strange[0]}: no such source (there are: {', '.join(names)})")
    wrong = next((d for d in config.depth.values() if d < 1), None)
    if wrong is not None:
        raise TamisError(f"--depth {wrong} must be 1 or more")
    if config.fusion not in FUSIONS:
        raise TamisError(f"--fuse '{config.fusion}' is not one of {', '.join(FUSIONS)}")
    if config.documents not in ("pooled", "all", "none"):
        raise TamisError(f"--documents '{config.documents}' is not one of pooled, all, none")
