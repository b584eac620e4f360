"""Which judge orders a pool best? Labels of several runs over the same pairs, and the retrievers that made the pool.

    tamis label POOL -o judge --method likelihood --depth 15 --limit-queries 100 --passage-tokens 110 ...
    tamis label POOL -o base --method likelihood --adapter none ...
    python benchmarks/judges.py POOL --qrels test.tsv --labels judge=judge --labels base=base

For every query with relevant and other documents among its candidates the area under the ROC curve of each order: of the values of each run (`value`, else
`grade`), and of each retriever's scores (0 or the least where it did not find the document). Means with intervals by query, and
paired differences to the first run, into `benchmarks/results/judges.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models.metrics.bootstrap import mean_interval, paired_difference  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "judges.json"


def area(relevant: np.ndarray, values: np.ndarray) -> float:
    """Share of (relevant, other) pairs in the right order; ties are half right."""
    gaps = values[relevant][:, None] - values[~relevant][None, :]
    return float((gaps > 0).mean() + (gaps == 0).mean() / 2)


def read_qrels(path: Path) -> set[tuple[str, str]]:
    """The pairs people judged relevant, of a BEIR file."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return {(query, document) for query, document, grade in rows if float(grade) > 0}


def values_of(folder: Path, name: str) -> pl.DataFrame:
    """query_id, doc_id and what a run gives by; pairs without a label have none."""
    labels = pl.read_parquet(folder / "data" / "*.parquet")
    value = pl.coalesce("value", pl.col("grade").cast(pl.Float64)).alias(name)
    return labels.select("query_id", "doc_id", value)


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pool", type=Path)
    parser.add_argument("--qrels", type=Path, required=True)
    parser.add_argument("--labels", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--keep", default="nfcorpus")
    args = parser.parse_args()
    good = read_qrels(args.qrels)
    names = [given.split("=", 1)[0] for given in args.labels]
    pairs = None
    for given in args.labels:
        name, folder = given.split("=", 1)
        own = values_of(Path(folder), name)
        pairs = own if pairs is None else pairs.join(own, on=["query_id", "doc_id"], how="left")
    assert pairs is not None
    pool = pl.read_parquet(args.pool / "data" / "*.parquet")
    for source in sorted(pool["source"].unique()):
        found = pool.filter(pl.col("source") == source).select(
            "query_id", "doc_id", pl.col("score").alias(source)
        )
        pairs = pairs.join(found, on=["query_id", "doc_id"], how="left")
        names.append(source)
    areas: dict[str, dict[str, float]] = {name: {} for name in names}
    for (query,), rows in pairs.group_by("query_id", maintain_order=True):
        relevant = np.array([(query, document) in good for document in rows["doc_id"]])
        if relevant.all() or not relevant.any():
            continue
        for name in names:
            column = rows[name]
            if column.null_count() < len(column):
                # A document a source says nothing of stands below all it speaks of.
                filled = column.fill_null(float(column.min()) - 1.0).to_numpy()  # type: ignore[arg-type]
                areas[name][str(query)] = area(relevant, filled)
    figures: dict[str, Any] = {"pairs": len(pairs), "queries": pairs["query_id"].n_unique()}
    first = names[0]
    for name in names:
        mean = mean_interval(np.array(list(areas[name].values())))
        figures[name] = {"auc": mean.mean, "low": mean.low, "high": mean.high, "queries": mean.n}
        common = sorted(areas[name].keys() & areas[first].keys())
        if name != first and common:
            sides = [np.array([areas[n][q] for q in common]) for n in (first, name)]
            against = paired_difference(sides[0], sides[1])
            d = against.difference
            figures[name][f"{first} minus it"] = [d.mean, d.low, d.high, against.p_value]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[args.keep] = figures
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
