"""What ranks before anything is trained: BM25 and an encoder as it comes, by `tamis eval retrieval`.

    python benchmarks/retrieval_baselines.py nfcorpus/ --source human --split test --encoder minilm

Writes benchmarks/results/retrieval_baselines.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

from pipelines import eval_retrieval
from pipelines.eval_retrieval import RetrievalEvalConfig

RESULTS = Path(__file__).parent / "results" / "retrieval_baselines.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collection")
    parser.add_argument("--source", default=None)
    parser.add_argument("--split", default="test")
    parser.add_argument("--encoder", default="minilm", help="an encoder, or an output of tamis embed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", default=None, help="where the evaluation stays; default nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        config = RetrievalEvalConfig(
            collection=arguments.collection,
            output=arguments.output or place + "/eval",
            corpus_source=arguments.source,
            splits=(arguments.split,),
            systems={
                "bm25": "bm25",
                "bm25, stemmed": "bm25:stemmer=english",
                "minilm": arguments.encoder,
            },
            baseline="bm25, stemmed",
            exact=True,
            progress="plain",
        )
        result = eval_retrieval.run(config)
    eval_retrieval.print_result(result)
    kept = ("queries", "labels", "corpus", "conventions", "baseline", "systems", "comparisons", "notes")
    found = {
        "collection": Path(arguments.collection).name,
        "split": arguments.split,
        "device": f"CPU ({platform.machine()}), {os.cpu_count()} cores, shared",
        **{k: result.record[k] for k in kept},
    }
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
