"""Training groups of a BEIR folder: what margins against BM25 scores reject, and what it takes.

    python benchmarks/groups.py nfcorpus/ --source human --split train

The pool is BM25 (bm25s, k1 0.9, b 0.4, English stop words, no stemming) at depth 100. Writes benchmarks/results/groups.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines import groups, judgments_import
from pipelines.groups import GroupsConfig
from pipelines.judgments_import import ImportConfig
from transforms.retrieval import formats
from transforms.retrieval.collection import frame
from transforms.retrieval.formats.base import ImportOptions

RESULTS = Path(__file__).parent / "results" / "groups.json"
DEPTH = 100
SETTINGS: dict[str, dict[str, Any]] = {
    "BM25, no margin": {},
    "relative 0.05, weakest": {"relative_margin": 0.05},
    "relative 0.05, mean": {"relative_margin": 0.05, "margin_against": "mean"},
    "relative 0.05, strongest": {"relative_margin": 0.05, "margin_against": "strongest"},
    "relative 0.05, weakest, unscored dropped": {"relative_margin": 0.05, "without_score": "drop"},
    "ranks 10-100": {"first_rank": 10, "last_rank": 100},
}


def bm25_run(folder: Path, source: str | None, split: str, out: Path) -> float:
    """Write a TREC run of the split's queries; returns seconds of processor time."""
    import bm25s

    began = time.process_time()
    data, _ = formats.read(str(folder), ImportOptions(splits=(split,), corpus_source=source))
    assert data.documents is not None
    docs = [row for batch in data.documents() for row in batch.to_pylist()]
    judged = set(frame(data.judgments)["query_id"])
    queries = [(q, t) for q, t in frame(data.queries).select("query_id", "text").iter_rows() if q in judged]
    tokens = bm25s.tokenize(
        [f"{d['title'] or ''} {d['text']}" for d in docs], stopwords="en", show_progress=False
    )
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(tokens, show_progress=False)
    found, scores = index.retrieve(
        bm25s.tokenize([t for _, t in queries], stopwords="en", show_progress=False),
        k=DEPTH,
        show_progress=False,
    )
    with out.open("w") as file:
        for (query, _), row, points in zip(queries, found, scores, strict=True):
            for rank, (place, score) in enumerate(zip(row, points, strict=True), 1):
                if score > 0:
                    file.write(f"{query} Q0 {docs[place]['doc_id']} {rank} {float(score)} bm25\n")
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default=None)
    parser.add_argument("--split", default="train")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        results: dict[str, Any] = {
            "collection": arguments.folder.name,
            "split": arguments.split,
            "device": f"CPU ({platform.machine()}), {os.cpu_count()} cores, shared",
            "bm25_seconds": bm25_run(arguments.folder, arguments.source, arguments.split, root / "bm25.run"),
            "groups": {},
        }
        began = time.process_time()
        made = judgments_import.run(
            ImportConfig(
                source=str(arguments.folder), output=str(root / "labels"), corpus_source=arguments.source
            )
        )
        results["import"] = {**made.manifest["totals"], "cpu_seconds": time.process_time() - began}
        for name, settings in SETTINGS.items():
            began = time.process_time()
            config = GroupsConfig(
                judgments=(str(root / "labels"),),
                output=str(root / name.replace(" ", "-")),
                pools=(str(root / "bm25.run"),),
                splits=(arguments.split,),
                **settings,
            )
            manifest = groups.run(config).manifest
            results["groups"][name] = {
                **manifest["stages"][0],
                "dropped_by_reason": {d["reason"]: d["queries"] for d in manifest["dropped"]},
                "rejected_by_reason": {r["reason"]: r["candidates"] for r in manifest["rejected"]},
                "cpu_seconds": time.process_time() - began,
            }
            print(name, json.dumps(results["groups"][name]))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
