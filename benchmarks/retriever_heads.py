"""Heads against every document: losses, and what becomes of the documents; seconds a cell.

    python benchmarks/retriever_heads.py nfcorpus/ --source human --vectors vectors/ --work runs/retriever

As `tamis train retriever --train head --all-documents`: vectors of queries and documents are there, every document is a candidate
in every step, and all positives of a query are in the loss. `--documents` shared, fixed and head side by side. Cells are kept in
WORK/heads. Writes benchmarks/results/retriever_heads.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import retrieval_common as common
from benchmarks.retriever_grid import LOSSES, Collection

RESULTS = Path(__file__).parent / "results" / "retriever_heads.json"
SIDES = ("shared", "fixed", "head")
BASE: dict[str, Any] = {
    "all_documents": True, "group_size": None, "max_positives": None, "epochs": 10, "scale": 20, "learning_rate": 1e-3,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/retriever"))
    parser.add_argument("--vectors", type=Path, default=None)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="test")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    data = Collection(arguments)
    plain = data.judge(arguments.split)
    rows = []
    for loss, side in itertools.product(LOSSES, SIDES):
        found = []
        for seed in range(arguments.seeds):
            path = arguments.work / "heads" / f"{arguments.split}-{loss}-{side}-{seed}.json"
            if not path.exists():
                made = data.cell(arguments.split, 0.0, seed, loss=loss, documents=side, **BASE)
                common.write_json(path, made)
            found.append(json.loads(path.read_text()))
        row: dict[str, Any] = {"loss": loss, "documents": side, "seeds": len(found)}
        for name in ("nDCG@10", "RR@10", "R@100"):
            by_seed = [float(np.mean(f["figures"][name])) for f in found]
            mean = np.mean([f["figures"][name] for f in found], axis=0)
            row[name] = {
                "mean": float(np.mean(by_seed)),
                "sd_seeds": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
                "minus_untrained": float(np.mean(mean - np.array(plain[name]))),
                "interval": common.paired_interval(mean, np.array(plain[name])),
            }
        row["cpu_seconds"] = float(np.mean([f["cpu_seconds"] for f in found]))
        rows.append(row)
        print(loss, side, {k: round(100 * row[k]["mean"], 2) for k in ("nDCG@10", "R@100")}, flush=True)
        record = {
            "collection": arguments.folder.name,
            "source": arguments.source,
            "split": arguments.split,
            "device": common.device(),
            "settings": BASE,
            "untrained": {m: float(np.mean(v)) for m, v in plain.items()},
            "cells": rows,
        }
        common.write_json(arguments.results, record)


if __name__ == "__main__":
    main()
