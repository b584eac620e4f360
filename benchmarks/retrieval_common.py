"""What the retriever benchmarks share: groups of a BEIR folder, false positives on purpose, exact search, figures."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from models.training.retriever_data import GroupData, Ragged
from schemas.fingerprint import derive_seed
from transforms.retrieval import formats
from transforms.retrieval.collection import frame
from transforms.retrieval.formats.base import ImportOptions

DEPTH = 100


def make_groups(
    folder: Path, source: str | None, out: Path, *, negatives: int = 30, random: int = 16
) -> Path:
    """Groups of the train queries: human labels, BM25's best unlabelled documents and some at random."""
    from benchmarks.groups import bm25_run
    from pipelines import groups

    if not (out / "groups" / "_SUCCESS").exists():
        out.mkdir(parents=True, exist_ok=True)
        run = out / "bm25-train.run"
        if not run.exists():
            bm25_run(folder, source, "train", run)
        groups.run(
            groups.GroupsConfig(
                judgments=(str(folder),), corpus_source=source, splits=("train",), pools=(str(run),),
                output=str(out / "groups"), max_negatives=negatives, random_negatives=random,
                sources=("bm25", "random"), progress="quiet", overwrite=True,
            )
        )  # fmt: skip
    return out / "groups"


def flip(groups: GroupData, share: float, seed: int) -> GroupData:
    """Make positives of a share of every query's negatives, at random places of the ranking of its positives.

    Which are flipped is a function of seed, query and document, so a larger share flips what a smaller one did and more.
    """
    if not share:
        return groups
    positives, negatives, grades, others = [], [], [], []
    for row in range(len(groups.query_ids)):
        good, bad = groups.positives[row].tolist(), groups.negatives[row].tolist()
        worth = groups.positive_grades[slice(*groups.positives.offsets[row : row + 2])].tolist()
        little = groups.negative_grades[slice(*groups.negatives.offsets[row : row + 2])].tolist()
        name = groups.query_ids[row]
        draws = [
            np.random.default_rng(derive_seed(seed, "flip", name, groups.document_ids[d])).random(2)
            for d in bad
        ]
        order = sorted(range(len(bad)), key=lambda i: draws[i][0])
        chosen = set(order[: round(share * len(bad))])
        for i in sorted(chosen):
            at = int(draws[i][1] * (len(good) + 1))
            good.insert(at, bad[i])
            worth.insert(at, 1.0)
        positives.append(good)
        grades += worth
        kept = [i for i in range(len(bad)) if i not in chosen]
        negatives.append([bad[i] for i in kept])
        others += [little[i] for i in kept]
    made = Ragged.of(positives)
    mask = Ragged.of([sorted({*groups.mask[i].tolist(), *made[i].tolist()}) for i in range(len(made))])
    return dataclasses.replace(
        groups,
        positives=made,
        negatives=Ragged.of(negatives),
        positive_grades=np.array(grades, np.float32),
        negative_grades=np.array(others, np.float32),
        mask=mask,
    )


@dataclasses.dataclass(frozen=True)
class Split:
    """Queries of a split with their labels.

    Attributes:
        ids: Of the queries.
        texts: Theirs.
        qrels: query id -> document id -> grade.
    """

    ids: list[str]
    texts: list[str]
    qrels: dict[str, dict[str, int]]


def read_split(folder: Path, source: str | None, split: str) -> Split:
    data, _ = formats.read(str(folder), ImportOptions(splits=(split,), corpus_source=source))
    qrels: dict[str, dict[str, int]] = {}
    for query, document, grade in frame(data.judgments).select("query_id", "doc_id", "grade").iter_rows():
        qrels.setdefault(query, {})[document] = int(grade)
    texts = dict(frame(data.queries).select("query_id", "text").iter_rows())
    ids = sorted(qrels)
    return Split(ids, [texts[i] for i in ids], qrels)


def read_corpus(folder: Path, source: str | None) -> tuple[list[str], list[str]]:
    """Ids and texts (title first) of all documents."""
    from models.training.retriever_data import join_title

    data, _ = formats.read(str(folder), ImportOptions(splits=("test",), corpus_source=source))
    assert data.documents is not None
    rows = [row for batch in data.documents() for row in batch.to_pylist()]
    return [r["doc_id"] for r in rows], [join_title(r["title"], r["text"]) or "" for r in rows]


def search(
    queries: np.ndarray, documents: np.ndarray, *, cosine: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Exact search: places and scores of each query's best documents, ties by place."""
    if cosine:
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        documents = documents / np.linalg.norm(documents, axis=1, keepdims=True)
    scores = queries @ documents.T
    places = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
    return places, np.take_along_axis(scores, places, axis=1)


def measure(split: Split, ids: list[str], places: np.ndarray, scores: np.ndarray) -> dict[str, list[float]]:
    """nDCG@10, RR@10 and R@100 of every query, in the order of `split.ids`; a query that found nothing has 0."""
    import ir_measures
    from ir_measures import RR, R, nDCG

    measures = {"nDCG@10": nDCG @ 10, "RR@10": RR @ 10, "R@100": R @ 100}
    run = {
        query: {ids[int(p)]: float(s) for p, s in zip(row, points, strict=True)}
        for query, row, points in zip(split.ids, places, scores, strict=True)
    }
    values = {name: dict.fromkeys(split.ids, 0.0) for name in measures}
    named = {str(m): name for name, m in measures.items()}
    for metric in ir_measures.iter_calc(list(measures.values()), split.qrels, run):
        values[named[str(metric.measure)]][metric.query_id] = metric.value
    return {name: [by_query[i] for i in split.ids] for name, by_query in values.items()}


def bm25_figures(folder: Path, source: str | None, split: Split) -> dict[str, list[float]]:
    """BM25 (bm25s, k1 0.9, b 0.4, English stop words, no stemming) on a split."""
    import bm25s

    ids, texts = read_corpus(folder, source)
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(split.texts, stopwords="en", show_progress=False)
    places, scores = index.retrieve(tokens, k=DEPTH, show_progress=False)
    # A document that shares no word has the score 0, and was not found.
    run = [[(p, s) for p, s in zip(*row, strict=True) if s > 0] for row in zip(places, scores, strict=True)]
    out: dict[str, list[float]] = {}
    for i, row in enumerate(run):
        one = Split([split.ids[i]], [""], {split.ids[i]: split.qrels[split.ids[i]]})
        found = measure(one, ids, np.array([[p for p, _ in row]], np.int64), np.array([[s for _, s in row]]))
        for name, values in found.items():
            out.setdefault(name, []).extend(values)
    return out


def paired_interval(
    ours: np.ndarray, theirs: np.ndarray, *, seed: int = 0, samples: int = 10_000
) -> list[float]:
    """95 % bootstrap interval, over queries, of the mean difference."""
    gap = np.asarray(ours) - np.asarray(theirs)
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    means = [gap[rng.integers(0, len(gap), len(gap))].mean() for _ in range(samples)]
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def device() -> str:
    return f"CPU ({platform.machine()}), {os.cpu_count()} cores, shared, one thread"


def write_json(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
