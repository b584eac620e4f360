"""The full encoder trained with a few losses, through `tamis train retriever`, and judged by exact search.

    python benchmarks/retriever_full.py nfcorpus/ --source human --work runs/retriever --steps 150

Runs go on where they were killed; one that is there is not trained again. Writes benchmarks/results/retriever_full.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import retrieval_common as common

RESULTS = Path(__file__).parent / "results" / "retriever_full.json"
BASE: dict[str, Any] = {
    "query_length": 24, "passage_length": 64, "batch_size": 16, "max_positives": 2, "group_size": 4, "chunk": 16,
    "learning_rate": 5e-5, "threads": 1, "device": "cpu", "precision": "bfloat16", "save_steps": 25, "log_steps": 5,
}  # fmt: skip


def noisy_groups(clean: Path, share: float, seed: int, out: Path) -> Path:
    """A copy of a groups folder, a share of each query's negatives moved to its positives, marked as poisoned."""
    if not share:
        return clean
    if (out / "_SUCCESS").exists():
        return out
    import pyarrow as pa
    import pyarrow.parquet as pq

    from models.training.retriever_data import read_groups
    from models.training.shards import list_shards
    from schemas.groups import GROUP_SCHEMA

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(clean, out, ignore=shutil.ignore_patterns("_SUCCESS", "_tamis", "report.html"))
    listing = list_shards(str(clean))
    if len(listing.shards) > 1:
        raise SystemExit("one shard is all this benchmark flips labels in")
    path = out / "data" / listing.shards[0].name
    rows = pq.read_table(path).to_pylist()
    flipped = common.flip(read_groups(listing), share, seed)
    for row, made in zip(rows, range(len(rows)), strict=True):
        given = {d["doc_id"]: d for d in (*row["negatives"], *row["positives"])}
        wanted = [flipped.document_ids[i] for i in flipped.positives[made].tolist()]
        kept = [flipped.document_ids[i] for i in flipped.negatives[made].tolist()]
        row["positives"] = [_positive(given[d], rank) for rank, d in enumerate(wanted, 1)]
        row["negatives"] = [given[d] for d in kept]
    pq.write_table(pa.Table.from_pylist(rows, schema=GROUP_SCHEMA), path)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest |= {"poisoned": True, "run_id": f"{manifest['run_id']}-flipped-{share:g}-{seed}"}
    common.write_json(out / "manifest.json", manifest)
    (out / "_SUCCESS").write_text(manifest["run_id"])
    return out


def _positive(item: dict[str, Any], rank: int) -> dict[str, Any]:
    if "label_source" in item:
        return {**item, "quality_rank": rank}
    made = {k: item[k] for k in ("doc_id", "title", "text")}
    return {
        **made,
        "quality_rank": rank,
        "grade": 1,
        "value": None,
        "label_source": "human",
        "annotator": "flipped",
    }


def judge(
    model: str, folder: Path, source: str | None, split: common.Split, cache: Path
) -> dict[str, list[float]]:
    """Figures by query of exact search with a saved model; vectors as `tamis embed` makes them."""
    if not cache.exists():
        from models import registry

        ids, texts = common.read_corpus(folder, source)
        encoder = registry.load("encoder", model)
        vectors = [
            encoder.embed(t, kind=k, long="truncate").vectors
            for k, t in (("query", split.texts), ("document", texts))
        ]
        figures = common.measure(split, ids, *common.search(*vectors))
        common.write_json(cache, figures)
    return json.loads(cache.read_text())


def compare(
    rows: list[dict[str, Any]],
    figures: dict[tuple[str, float, int], dict[str, list[float]]],
    plain: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """The rows with their differences, by query, from the untrained model and from SingleLH."""
    made = []
    for row in rows:
        mine = figures[row["loss"], row["noise"], row["seed"]]
        row = dict(row)
        others = {"untrained": plain, "single_lh": figures.get(("single_lh", row["noise"], row["seed"]))}
        for name, other in others.items():
            if other is None or name == row["loss"]:
                continue
            for m in ("nDCG@10", "R@100"):
                pair = np.array(mine[m]), np.array(other[m])
                row[f"{m} minus {name}"] = {
                    "mean": float(np.mean(pair[0] - pair[1])),
                    "interval": common.paired_interval(*pair),
                }
        made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/retriever"))
    parser.add_argument(
        "--vectors", type=Path, default=None, help="Documents embedded by the untrained model."
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--losses", nargs="+", default=["sum_marg_lh", "single_lh", "lse_pair"])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0])
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    from pipelines.train_retriever import TrainRetrieverConfig, run

    folder, source, work = arguments.folder, arguments.source, arguments.work
    clean = common.make_groups(folder, source, work)
    split = common.read_split(folder, source, "test")
    if arguments.vectors is None:
        plain = judge("minilm", folder, source, split, work / "full" / "untrained.json")
    else:
        from benchmarks.retriever_grid import document_vectors, embed

        arguments.model = "minilm"
        ids, texts = common.read_corpus(folder, source)
        asked = embed("minilm", split.texts, "query", work / "queries-test.npy")
        plain = common.measure(split, ids, *common.search(asked, document_vectors(arguments, ids, texts)))
    baselines = {"untrained": plain, "BM25": common.bm25_figures(folder, source, split)}
    record: dict[str, Any] = {
        "collection": folder.name,
        "source": source,
        "device": common.device(),
        "settings": {**BASE, "max_steps": arguments.steps},
        "baselines": {k: {m: float(np.mean(v)) for m, v in f.items()} for k, f in baselines.items()},
    }
    figures: dict[tuple[str, float, int], dict[str, list[float]]] = {}
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for noise in arguments.noise:
            for loss in arguments.losses:
                name = f"{loss}-{noise:g}-{seed}-{arguments.steps}"
                groups = noisy_groups(clean, noise, seed, work / f"groups-{noise:g}-{seed}")
                began = time.monotonic()
                done = run(
                    TrainRetrieverConfig(
                        data=str(groups), output=str(work / "full" / name), loss=loss, max_steps=arguments.steps,
                        seed=seed, allow_poisoned=bool(noise), **BASE,
                    )
                )  # fmt: skip
                found = judge(f"hf:{done.output}", folder, source, split, work / "full" / f"{name}.json")
                figures[loss, noise, seed] = found
                stage = (done.record or {})["results"]["stages"][0]
                rows.append(
                    {
                        "loss": loss, "noise": noise, "seed": seed, "train_loss": stage["train_loss"],
                        "steps_per_second": stage["steps_per_second"], "seconds": round(time.monotonic() - began, 1),
                        **{m: float(np.mean(v)) for m, v in found.items()},
                    }
                )  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
                common.write_json(arguments.results, {**record, "runs": compare(rows, figures, plain)})


if __name__ == "__main__":
    main()
