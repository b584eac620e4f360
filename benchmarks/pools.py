"""Recall of candidate pools against human judgments: BM25, a dense retriever, and both together.

    tamis embed corpus/human.jsonl --output vectors --id-column _id --text "{title} {text}"
    python benchmarks/pools.py nfcorpus/ --source human --split test --vectors vectors

    python benchmarks/pools.py nfcorpus/ --source human --memory 20000 200000

Pools of the split's queries with several settings of BM25, alone and with the dense retriever: recall at 100 of each, of
both fused to 100 documents a query, and of the union of both lists. `--memory`: peak memory and time of a process that pools
200 queries with BM25 over so many short documents (titles with numbers, so that all differ). Writes
benchmarks/results/pools.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipelines import pool
from pipelines.pool import PoolConfig

RESULTS = Path(__file__).parent / "results" / "pools.json"
BM25 = {
    "k1 0.9, b 0.4": {},
    "k1 0.9, b 0.4, Snowball": {"stemmer": "english"},
    "k1 0.82, b 0.68": {"k1": 0.82, "b": 0.68},
    "k1 1.5, b 0.75, Snowball": {"k1": 1.5, "b": 0.75, "stemmer": "english"},
}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and seconds by number of documents."""
    from transforms.retrieval import formats
    from transforms.retrieval.formats.base import ImportOptions

    data, _ = formats.read(arguments.collection, ImportOptions(corpus_source=arguments.source))
    assert data.documents is not None
    titles = [t for batch in data.documents() for t in batch.column("title").to_pylist() if t]
    queries = data.queries.select(["query_id", "text"]).to_pylist()[:200]
    found = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        lines = [json.dumps({"_id": q["query_id"], "text": q["text"]}) for q in queries]
        (root / "queries.jsonl").write_text("\n".join(lines))
        for count in arguments.memory:
            with (root / f"{count}.jsonl").open("w") as file:
                for i in range(count):
                    text = f"{titles[i % len(titles)]} {titles[(i * 7 + i // len(titles)) % len(titles)]} {i}"
                    file.write(json.dumps({"_id": f"d{i}", "text": text}) + "\n")
            done = subprocess.run(
                [sys.executable, __file__, "child", f"{place}/{count}.jsonl", f"{place}/queries.jsonl", f"{place}/{count}"],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found[str(count)] = json.loads(done.stdout.splitlines()[-1])
            print(count, found[str(count)])
    return found


def child(corpus: str, queries: str, output: str) -> None:
    """One pool, and what the process took."""
    began = time.process_time()
    pool.run(PoolConfig(corpus=corpus, queries=queries, output=output, progress="quiet"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    index = sum(f.stat().st_size for f in Path(output).rglob("bm25-*/*")) / 1e6
    seconds = time.process_time() - began
    print(json.dumps({"peak_mb": round(peak), "cpu_seconds": round(seconds, 1), "index_mb": round(index, 1)}))


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collection")
    parser.add_argument("--source", default=None)
    parser.add_argument("--split", default="test")
    parser.add_argument("--vectors", help="output of tamis embed, or an encoder by name")
    parser.add_argument("--memory", type=int, nargs="+", default=[])
    parser.add_argument("--positive-from", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.memory:
        held = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
        held["memory"] = memory(arguments)
        arguments.results.write_text(json.dumps(held, indent=2) + "\n")
        return
    results: dict[str, Any] = {
        "collection": Path(arguments.collection).name,
        "split": arguments.split,
        "device": f"CPU ({platform.machine()}), {os.cpu_count()} cores, shared",
        "pools": {},
    }
    with tempfile.TemporaryDirectory() as place:
        for name, settings in BM25.items():
            began = time.process_time()
            config = PoolConfig(
                collection=arguments.collection,
                output=f"{place}/{len(results['pools'])}",
                corpus_source=arguments.source,
                splits=(arguments.split,),
                dense={"minilm": arguments.vectors},
                exact=True,
                positive_from=arguments.positive_from,
                progress="quiet",
                **settings,
            )
            manifest = pool.run(config).manifest
            results["pools"][name] = {
                "totals": manifest["totals"],
                "corpus": manifest["corpus"],
                "recall": manifest["recall"],
                "overlap": manifest["overlap"],
                "sources": [{k: v for k, v in s.items() if k != "model"} for s in manifest["sources"]],
                "cpu_seconds": round(time.process_time() - began, 1),
            }
            systems = manifest["recall"]["systems"]
            print(name, {s: v.get("100", v.get("all")) for s, v in systems.items()})
    for found in results["pools"].values():
        found["corpus"].pop("path", None)  # of the machine it was made on
    if arguments.results.exists():
        results |= {k: v for k, v in json.loads(arguments.results.read_text()).items() if k == "memory"}
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
