"""Recall of candidate pools against human judgments: BM25, a dense retriever, and both together.

    tamis embed corpus/human.jsonl --output vectors --id-column _id --text "{title} {text}"
    python benchmarks/pools.py nfcorpus/ --source human --split test --vectors vectors

Pools of the split's queries with several settings of BM25, alone and with the dense retriever: recall at 100 of each, of
both fused to 100 documents a query, and of the union of both lists. Writes benchmarks/results/pools.json.
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

from pipelines import pool
from pipelines.pool import PoolConfig

RESULTS = Path(__file__).parent / "results" / "pools.json"
BM25 = {
    "k1 0.9, b 0.4": {},
    "k1 0.9, b 0.4, Snowball": {"stemmer": "english"},
    "k1 0.82, b 0.68": {"k1": 0.82, "b": 0.68},
    "k1 1.5, b 0.75, Snowball": {"k1": 1.5, "b": 0.75, "stemmer": "english"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collection")
    parser.add_argument("--source", default=None)
    parser.add_argument("--split", default="test")
    parser.add_argument("--vectors", required=True, help="output of tamis embed, or an encoder by name")
    parser.add_argument("--positive-from", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
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
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
