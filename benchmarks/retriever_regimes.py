"""Heads trained on different labels of the same queries: people's, a model's, both in one stage, one after the other.

    python benchmarks/retriever_regimes.py nfcorpus/ --source human --groups human=groups-human llm=groups-llm

Each NAME=FOLDER is an output of `tamis groups`; its stages are trained in order. Writes benchmarks/results/retriever_regimes.json:
figures on the test queries by regime and loss, and intervals by query against the first regime.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import retrieval_common as common
from benchmarks.retriever_grid import BASE, Collection

RESULTS = Path(__file__).parent / "results" / "retriever_regimes.json"
LOSSES = ("single_lh", "rand1_lh", "sum_marg_lh", "lse_pair")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--groups", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--source", default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/retriever"))
    parser.add_argument("--vectors", type=Path, default=None)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    told = {"learning_rate": arguments.rate, "epochs": arguments.epochs, "scale": arguments.scale}
    figures: dict[tuple[str, str], dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    plain: dict[str, list[float]] = {}
    for item in arguments.groups:
        name, _, folder = item.partition("=")
        data = Collection(arguments, Path(folder))
        plain = plain or data.judge("test")
        for loss in LOSSES:
            cells = [data.cell("test", 0.0, s, loss=loss, **told)["figures"] for s in range(arguments.seeds)]
            mean = {m: np.mean([c[m] for c in cells], axis=0) for m in cells[0]}
            figures[name, loss] = mean
            row: dict[str, Any] = {"regime": name, "loss": loss, "groups": len(data.groups.query_ids)}
            for m, values in mean.items():
                row[m] = {
                    "mean": float(values.mean()),
                    "sd_seeds": float(np.std([np.mean(c[m]) for c in cells], ddof=1))
                    if len(cells) > 1
                    else None,
                }
            rows.append(row)
            print(name, loss, round(row["nDCG@10"]["mean"], 4), flush=True)
    first = arguments.groups[0].partition("=")[0]
    for row, measure in itertools.product(rows, ("nDCG@10", "R@100")):
        if row["regime"] != first:
            pair = figures[row["regime"], row["loss"]][measure], figures[first, row["loss"]][measure]
            row[measure] |= {
                f"minus_{first}": float(np.mean(pair[0] - pair[1])),
                "interval": common.paired_interval(*pair),
            }
    common.write_json(
        arguments.results,
        {
            "collection": arguments.folder.name,
            "device": common.device(),
            "seeds": arguments.seeds,
            "settings": {**BASE, **told},
            "untrained": {m: float(np.mean(v)) for m, v in plain.items()},
            "cells": rows,
        },
    )


if __name__ == "__main__":
    main()
