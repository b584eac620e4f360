"""The queries' encoder trained alone, documents behind a linear head or as they are: losses, noise, seeds.

    python benchmarks/retriever_queries.py nfcorpus/ --source human --vectors vectors/ --work runs/retriever

Through `tamis train retriever --documents head --all-documents`, three minutes of a core a run; runs go on where they were
killed, and one that is there is not trained again. `--vectors` is an output of `tamis embed` of the documents. The documents are
searched as an index would be: those vectors, through the trained head. Writes benchmarks/results/retriever_queries.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import retrieval_common as common
from benchmarks.retriever_full import noisy_groups
from benchmarks.retriever_grid import LOSSES, document_vectors, embed

RESULTS = Path(__file__).parent / "results" / "retriever_queries.json"
CONFIRMED = ("single_lh", "lse_pair", "sum_marg_lh")
NOISE = (0.1, 0.3)
BASE: dict[str, Any] = {
    "documents": "head", "all_documents": True, "query_length": 48, "chunk": 128, "threads": 1, "device": "cpu",
    "precision": "bfloat16", "save_steps": 40, "log_steps": 20,
}  # fmt: skip


def cells(seeds: int) -> list[dict[str, Any]]:
    """What is run, the most telling first."""
    made = [{"loss": loss, "noise": 0.0, "documents": "head", "seed": 0} for loss in LOSSES]
    made.append({"loss": "sum_marg_lh", "noise": 0.0, "documents": "fixed", "seed": 0})
    made += [{"loss": x, "noise": n, "documents": "head", "seed": 0} for n in NOISE for x in CONFIRMED]
    for seed in range(1, seeds):
        made += [{"loss": x, "noise": 0.0, "documents": "head", "seed": seed} for x in LOSSES]
        made.append({"loss": "sum_marg_lh", "noise": 0.0, "documents": "fixed", "seed": seed})
    for seed in range(1, seeds):
        made += [{"loss": x, "noise": n, "documents": "head", "seed": seed} for n in NOISE for x in CONFIRMED]
    return made


def judge(folder: Path, queries: list[str], documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of queries by the saved model, and of documents as an index is mapped: by the saved head."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    asked = model.encode_query(queries, show_progress_bar=False, convert_to_numpy=True)
    for module in model[0].sub_modules["document"]:
        if type(module).__name__ == "Dense":
            documents = documents @ module.linear.weight.detach().numpy().T
    return asked, documents


def summarise(
    rows: list[dict[str, Any]], figures: dict[str, dict[str, list[float]]], plain: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Mean and deviation over seeds, and the differences by query from SingleLH and from the untrained model."""
    made = []
    kinds = dict.fromkeys((r["loss"], r["documents"], r["noise"]) for r in rows)
    for loss, documents, noise in kinds:
        mine = {
            r["seed"]: figures[r["name"]]
            for r in rows
            if (r["loss"], r["documents"], r["noise"]) == (loss, documents, noise)
        }
        base = {
            r["seed"]: figures[r["name"]]
            for r in rows
            if (r["loss"], r["documents"], r["noise"]) == ("single_lh", "head", noise)
        }
        row: dict[str, Any] = {"loss": loss, "documents": documents, "noise": noise, "seeds": len(mine)}
        for name in ("nDCG@10", "RR@10", "R@100"):
            by_seed = [float(np.mean(f[name])) for f in mine.values()]
            mean = np.mean([f[name] for f in mine.values()], axis=0)
            row[name] = {
                "mean": float(np.mean(by_seed)),
                "sd_seeds": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
            }
            others = {"untrained": np.array(plain[name])}
            shared = sorted(set(mine) & set(base))
            if shared and loss != "single_lh":
                others["single_lh"] = np.mean([base[s][name] for s in shared], axis=0)
            for other, values in others.items():
                own = np.mean([mine[s][name] for s in shared], axis=0) if other == "single_lh" else mean
                row[name][f"minus_{other}"] = float(np.mean(own - values))
                row[name][f"interval_{other}"] = common.paired_interval(own, values)
        row["seconds"] = float(
            np.mean(
                [
                    r["seconds"]
                    for r in rows
                    if (r["loss"], r["documents"], r["noise"]) == (loss, documents, noise)
                ]
            )
        )
        made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/retriever"))
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arguments.model = "minilm"
    from pipelines.train_retriever import TrainRetrieverConfig, run

    folder, source, work = arguments.folder, arguments.source, arguments.work
    clean = common.make_groups(folder, source, work)
    split = common.read_split(folder, source, "test")
    ids, texts = common.read_corpus(folder, source)
    documents = document_vectors(arguments, ids, texts)
    asked = embed("minilm", split.texts, "query", work / "queries-test.npy")
    plain = common.measure(split, ids, *common.search(asked, documents))
    record: dict[str, Any] = {
        "collection": folder.name,
        "source": source,
        "device": common.device(),
        "settings": BASE,
        "untrained": {m: float(np.mean(v)) for m, v in plain.items()},
    }
    rows, figures = [], {}
    for cell in cells(arguments.seeds):
        name = "{loss}-{noise:g}-{seed}".format(**cell) + ("" if cell["documents"] == "head" else "-fixed")
        kept = work / "queries" / f"{name}.json"
        if not kept.exists():
            groups = noisy_groups(
                clean, cell["noise"], cell["seed"], work / f"groups-{cell['noise']:g}-{cell['seed']}"
            )
            began = time.process_time()
            told = {**BASE, "documents": cell["documents"]}
            done = run(
                TrainRetrieverConfig(
                    data=str(groups), output=str(work / "queries" / name), loss=cell["loss"], seed=cell["seed"],
                    vectors=str(arguments.vectors), allow_poisoned=bool(cell["noise"]), overwrite=True, **told,
                )
            )  # fmt: skip
            seconds = round(time.process_time() - began, 1)
            found = common.measure(split, ids, *common.search(*judge(done.output, split.texts, documents)))
            common.write_json(kept, {"figures": found, "seconds": seconds})
        read = json.loads(kept.read_text())
        figures[name] = read["figures"]
        rows.append({**cell, "name": name, "seconds": read["seconds"]})
        print(name, {m: round(100 * float(np.mean(v)), 2) for m, v in figures[name].items()}, flush=True)
        common.write_json(arguments.results, {**record, "cells": summarise(rows, figures, plain)})


if __name__ == "__main__":
    main()
