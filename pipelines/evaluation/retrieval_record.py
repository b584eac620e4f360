"""Settings, figures and record of an evaluation of retrievers: what the job makes, and what its page reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models.metrics.bootstrap import DRAWS, Interval
from pipelines.retrieval.corpus import DEFAULT_TEXT
from transforms.retrieval.scoring import OURS, Comparison, Measure, holm

MEASURES = ("nDCG@10", "RR@10", "R@100", "R@1000", "AP")


class RetrievalEvalConfig(BaseModel):
    """Settings of `tamis eval retrieval`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    collection: str = Field(description="Collection of any format: documents, queries, labels.")
    output: str = Field(description="Folder for the results.")
    systems: dict[str, str] = Field(
        default_factory=dict,
        description="Name -> bm25, encoder (name or folder), or output of tamis embed.",
    )
    runs: dict[str, str] = Field(
        default_factory=dict, description="Name -> ranking that is there (TREC run)."
    )
    baseline: str | None = Field(None, description="System the others are compared with; default the first.")
    corpus: str | None = Field(None, description="Documents; default those of the collection.")
    queries: str | None = Field(None, description="Queries; default those of the collection.")
    corpus_source: str | None = Field(
        None, description="Which copy of the documents, where there are several."
    )
    splits: tuple[str, ...] = Field((), description="Labels of these splits; default all.")
    measures: tuple[str, ...] = Field(MEASURES, description="As ir-measures writes them.")
    depth: int = Field(1000, ge=1, description="Documents a query.")
    text: str = Field(DEFAULT_TEXT, description="Text of a document, made of title and text.")
    k1: float = 0.9
    b: float = 0.4
    stopwords: str = "en"
    stemmer: str = "none"
    dense_options: dict[str, Any] = Field(default_factory=dict, description="How encoders by name are used.")
    index: str | None = Field(None, description="Search encoders by name through an index: flat, ivf, hnsw.")
    exact: bool = Field(False, description="Look at every vector, even where there is an index.")
    keep_self: bool = Field(False, description="Keep a document whose id is the query's.")
    denominator: str = Field("judged", description="Means are over judged queries, or over answered ones.")
    label_source: str | None = Field(None, description="Only human, or only llm labels.")
    annotators: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()
    unify: str = Field("apart", description="How labels of several annotators merge.")
    seed: int = 0
    draws: int = Field(DRAWS, ge=100)
    work: str | None = Field(None, description="Where indexes, vectors and answers are kept; default inside.")
    device: str = "auto"
    threads: int = Field(1, ge=1)
    workers: int = Field(1, ge=1)
    progress: str = Field("auto", description="auto, plain, quiet.")
    storage_options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class SystemResult:
    """How one system did.

    Attributes:
        name: Of the system.
        kind: bm25, dense or run.
        values: By measure, one number a query.
        means: By measure.
        answered: Queries it gave any document for.
        settings: What decided its rankings.
    """

    name: str
    kind: str
    values: dict[str, list[float]]
    means: dict[str, Interval]
    answered: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class RetrievalEvalResult:
    """What came of it.

    Attributes:
        output: The folder; None of a dry run.
        measures: Names, in order.
        queries: The queries that counted.
        systems: In the order they were named.
        comparisons: By (a, b), by measure.
        record: What `results.json` holds.
    """

    output: str | None
    measures: list[str]
    queries: list[str]
    systems: list[SystemResult]
    comparisons: dict[tuple[str, str], dict[str, Comparison]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict, repr=False)

    def system(self, name: str) -> SystemResult:
        """A system by its name."""
        return next(s for s in self.systems if s.name == name)


def baseline_of(config: RetrievalEvalConfig) -> str:
    """The system the others are compared with."""
    return config.baseline or next(iter({**config.systems, **config.runs}))


def make_record(
    config: RetrievalEvalConfig,
    measures: Sequence[Measure],
    result: RetrievalEvalResult,
    *,
    labels: Mapping[str, Mapping[str, int]],
    fingerprints: Mapping[str, Mapping[str, str]],
    corpus: Mapping[str, int],
    notes: Sequence[str],
) -> dict[str, Any]:
    """What `results.json` holds.

    Args:
        config: The settings.
        measures: What was measured, and by whom.
        result: The figures.
        labels: Grade by judged query and document.
        fingerprints: Of every file that was read.
        corpus: Counts of documents.
        notes: What the reader should know.
    """
    pairs = list(result.comparisons)
    together = {
        m.name: dict(zip(pairs, holm([result.comparisons[p][m.name].t_p for p in pairs]), strict=True))
        for m in measures
    }
    return {
        "config": config.model_dump(exclude={"storage_options", "output", "work", "progress"}),
        "input": {k: dict(v) for k, v in fingerprints.items()},
        "models": {s.name: s.settings["model"] for s in result.systems if "model" in s.settings},
        "queries": len(result.queries),
        "judged_queries": len(labels),
        "labels": sum(len(labels[q]) for q in result.queries),
        "corpus": dict(corpus),
        "baseline": baseline_of(config),
        "conventions": conventions(config, measures),
        "systems": [
            {
                "name": s.name,
                "kind": s.kind,
                "answered": s.answered,
                "measures": {m: x.as_dict() for m, x in s.means.items()},
                "settings": {k: v for k, v in s.settings.items() if k != "model"},
            }
            for s in result.systems
        ],
        "comparisons": [
            {
                "a": a,
                "b": b,
                "measures": {
                    m: {**x.as_dict(), "t_p_value_holm": together[m][a, b]} for m, x in by_measure.items()
                },
            }
            for (a, b), by_measure in result.comparisons.items()
        ],
        "notes": list(notes),
    }


def conventions(config: RetrievalEvalConfig, measures: Sequence[Measure]) -> dict[str, str]:
    """The rules figures depend on, in words."""
    others = [m for m in measures if m.provider != OURS]
    found = {
        "ties": "equal scores are ordered by document id descending, as trec_eval does; at the cut of a list by id "
        "ascending",
        "gain": "the grade itself (linear); documents nobody judged, and negative grades, gain 0",
        "denominator": "every query with a positive label; one a system does not answer counts 0"
        if config.denominator == "judged"
        else "queries with a positive label that every system answers",
        "self_match": "kept" if config.keep_self else "a document whose id is the query's is left out",
        "depth": f"{config.depth:,} documents a query; rankings that were given count as deep as they are",
        "intervals": f"95 %, queries drawn with replacement, {config.draws:,} draws",
        "tests": "two-sided, paired by query: t-test (Holm's correction over all pairs of systems), and bootstrap",
    }
    if others:
        said = ", ".join(f"{m.name} by {m.provider}" for m in others)
        found["other_tools"] = f"{said}, by that tool's own rules; all else by trec_eval's"
    return found
