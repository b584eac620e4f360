"""Heads over a frozen encoder: every loss, some of the negatives flipped to positives, several seeds.

    python benchmarks/retriever_grid.py nfcorpus/ --source human --work runs/retriever --vectors vectors/

`--vectors` is an output of `tamis embed` of the documents (text `{title} {text}`); without it they are embedded here.
Every cell is a file in WORK/cells, so a killed run goes on. Writes benchmarks/results/retriever_grid.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import retrieval_common as common
from models.training.retriever_data import GroupData, read_groups
from models.training.retriever_settings import RetrieverSettings

RESULTS = Path(__file__).parent / "results" / "retriever_grid.json"
LOSSES = ("single_lh", "rand1_lh", "joint_lh", "sum_marg_lh", "lse_pair", "mnrl")
VARIANTS: dict[str, dict[str, Any]] = {
    **{loss: {"loss": loss} for loss in LOSSES},
    "lse_pair min": {"loss": "lse_pair", "positive_side": "min"},
    "lse_pair max": {"loss": "lse_pair", "positive_side": "max"},
    "lse_pair rotate": {"loss": "lse_pair", "positives": "rotate"},
}
NOISE = (0.0, 0.1, 0.3)
BASE: dict[str, Any] = {
    "train": "head", "head": "linear", "batch_size": 128, "max_positives": 4, "group_size": 8,
    "threads": 1, "device": "cpu", "log_steps": 1000, "save_steps": 1_000_000,
}  # fmt: skip


def embed(name: str, texts: list[str], kind: str, path: Path) -> np.ndarray:
    if not path.exists():
        from models import registry

        vectors = registry.load("encoder", name).embed(texts, kind=kind, long="truncate").vectors
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    return np.load(path)


def document_vectors(arguments: argparse.Namespace, ids: list[str], texts: list[str]) -> np.ndarray:
    if arguments.vectors is None:
        return embed(arguments.model, texts, "document", arguments.work / "documents.npy")
    from pipelines.train_retriever import _pick
    from transforms.embed.vectors import VectorShards

    return _pick(VectorShards(str(arguments.vectors)), ids, "document")


def train_head(groups: GroupData, queries: np.ndarray, documents: np.ndarray, /, **settings: Any) -> Any:
    """A trained head, and seconds; nothing is saved."""
    import tempfile

    from models.training.loading import BaseModel
    from models.training.retriever_batches import VectorFeatures
    from models.training.retriever_session import PreparedGroups, RetrieverSession
    from models.training.shards import ShardListing

    told = RetrieverSettings(**{**BASE, **settings})
    told.check()
    session = RetrieverSession(
        settings=told, base=BaseModel("minilm", "", ""), listing=ShardListing("", ()), identity="", command="",
        data={}, say=lambda line: None, emit=lambda kind, fields: None,
    )  # fmt: skip
    prepared = PreparedGroups(groups, told.draw({}), True, None)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        plan = session.plan(prepared)
        model, results, _ = session.fit(prepared, VectorFeatures(queries, documents), plan, Path(folder))
    return model, results["stages"][0], time.process_time() - began


class Collection:
    """Everything a cell needs, read once; groups are made of the train labels, or read from a folder."""

    def __init__(self, arguments: argparse.Namespace, made: Path | None = None) -> None:
        from models.training.shards import list_shards

        folder, source, work = arguments.folder, arguments.source, arguments.work
        self.groups = read_groups(list_shards(str(made or common.make_groups(folder, source, work))))
        ids, texts = common.read_corpus(folder, source)
        self.ids = ids
        self.documents = document_vectors(arguments, ids, texts)
        place = {name: i for i, name in enumerate(ids)}
        self.group_documents = self.documents[[place[d] for d in self.groups.document_ids]]
        self.group_queries = embed(
            arguments.model,
            [q or "" for q in self.groups.queries],
            "query",
            work / f"queries-{'train' if made is None else made.name}.npy",
        )
        self.splits = {name: common.read_split(folder, source, name) for name in ("dev", "test")}
        self.asked = {
            name: embed(arguments.model, split.texts, "query", work / f"queries-{name}.npy")
            for name, split in self.splits.items()
        }

    def judge(self, split: str, model: Any = None) -> dict[str, list[float]]:
        """Figures by query of the untrained model, or of a head."""
        queries, documents = self.asked[split], self.documents
        if model is not None:
            queries, documents = model.map(queries, "query"), model.map(documents, "document")
        return common.measure(self.splits[split], self.ids, *common.search(queries, documents))

    def cell(self, split: str, noise: float, seed: int, **settings: Any) -> dict[str, Any]:
        groups = common.flip(self.groups, noise, seed)
        model, stage, seconds = train_head(
            groups, self.group_queries, self.group_documents, seed=seed, **settings
        )
        return {"figures": self.judge(split, model), "stage": stage, "cpu_seconds": round(seconds, 2)}


def tune(data: Collection, arguments: argparse.Namespace) -> None:
    """Dev figures of a few settings, to choose those all cells share."""
    for rate, epochs, scale in itertools.product(arguments.rates, arguments.epochs, arguments.scales):
        line = [f"rate {rate:g} epochs {epochs:g} scale {scale:g}"]
        for loss in ("single_lh", "lse_pair"):
            made = data.cell("dev", 0.0, 0, loss=loss, learning_rate=rate, epochs=epochs, scale=scale)
            line.append(f"{loss} {np.mean(made['figures']['nDCG@10']):.4f} ({made['cpu_seconds']} s)")
        print("  ".join(line), flush=True)


def summarise(cells: dict[tuple[str, float, int], dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    """Mean and deviation over seeds, and the interval by query of the difference from SingleLH."""
    rows = []
    for variant in VARIANTS:
        for noise in NOISE:
            mine = [cells[variant, noise, s] for s in seeds if (variant, noise, s) in cells]
            base = [cells["single_lh", noise, s] for s in seeds if ("single_lh", noise, s) in cells]
            if not mine:
                continue
            row: dict[str, Any] = {"loss": variant, "noise": noise, "seeds": len(mine)}
            for name in ("nDCG@10", "RR@10", "R@100"):
                by_seed = [float(np.mean(c["figures"][name])) for c in mine]
                row[name] = {
                    "mean": float(np.mean(by_seed)),
                    "sd_seeds": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
                }
                if variant != "single_lh" and len(base) == len(mine):
                    gap = [np.mean([c["figures"][name] for c in side], axis=0) for side in (mine, base)]
                    row[name]["minus_single_lh"] = float(np.mean(gap[0] - gap[1]))
                    row[name]["interval"] = common.paired_interval(*gap)
            row["cpu_seconds"] = float(np.mean([c["cpu_seconds"] for c in mine]))
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/retriever"))
    parser.add_argument("--vectors", type=Path, default=None)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tune", action="store_true", help="Print dev figures of a few settings, and stop.")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--epochs", type=float, nargs="+", default=[10.0])
    parser.add_argument("--scales", type=float, nargs="+", default=[20.0])
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    data = Collection(arguments)
    if arguments.tune:
        print("untrained", np.mean(data.judge("dev")["nDCG@10"]), flush=True)
        tune(data, arguments)
        return
    chosen = {
        "learning_rate": arguments.rates[0],
        "epochs": arguments.epochs[0],
        "scale": arguments.scales[0],
    }
    seeds = list(range(arguments.seeds))
    name = "-".join(f"{v:g}" for v in chosen.values())
    split = data.splits["test"]
    plain = {
        "untrained": data.judge("test"),
        "BM25": common.bm25_figures(arguments.folder, arguments.source, split),
    }
    record: dict[str, Any] = {
        "collection": arguments.folder.name,
        "source": arguments.source,
        "model": arguments.model,
        "device": common.device(),
        "test_queries": len(split.ids),
        "groups": len(data.groups.query_ids),
        "settings": {**BASE, **chosen},
        "baselines": {k: {m: float(np.mean(v)) for m, v in f.items()} for k, f in plain.items()},
    }
    cells = {}
    for seed in seeds:
        for noise, variant in itertools.product(NOISE, VARIANTS):
            path = arguments.work / "cells" / name / f"{variant.replace(' ', '-')}-{noise:g}-{seed}.json"
            if not path.exists():
                made = data.cell("test", noise, seed, **VARIANTS[variant], **chosen)
                common.write_json(path, made)
                score = np.mean(made["figures"]["nDCG@10"])
                print(
                    f"{variant} noise {noise:g} seed {seed}: {score:.4f} in {made['cpu_seconds']} s",
                    flush=True,
                )
            cells[variant, noise, seed] = json.loads(path.read_text())
        common.write_json(arguments.results, {**record, "cells": summarise(cells, seeds)})


if __name__ == "__main__":
    main()
