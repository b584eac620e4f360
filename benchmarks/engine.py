"""The shard engine against a hand-written loop, and against datatrove, on the same documents.

    python benchmarks/engine.py --docs 400000                        # engine, loop, (datatrove if importable)
    python benchmarks/engine.py --docs 2000000 --workers 2           # two worker processes, and memory
    python benchmarks/engine.py --datatrove-python /path/to/python   # datatrove from another environment

Work: read Parquet shards, score every document with a word list, leave the corpus and a row-aligned score column on
disk. Each run is a process of its own; the order is A B C, A B C, ...; figures are medians, ratios are within one
round. `loop` writes the corpus again through pyarrow as such loops do; `loop-copy` copies untouched files as the
engine does, so it is the physical limit.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def make_corpus(folder: Path, docs: int, shards: int) -> None:
    """Write generated documents: 20 to 120 words from a Zipf-like vocabulary, one in twenty with a listed word."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (folder / "_made").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (i + 10) for i in range(len(words))]
    listed = terms()
    per = docs // shards
    number = 0
    for shard in range(shards):
        pool = rng.choices(words, weights, k=400_000)
        texts = []
        for _ in range(per):
            at = rng.randrange(len(pool) - 120)
            chosen = pool[at : at + rng.randint(20, 120)]
            if rng.random() < 0.05:
                chosen[rng.randrange(len(chosen))] = rng.choice(listed)
            texts.append(" ".join(chosen))
        ids = [f"doc-{number + i}" for i in range(per)]
        number += per
        table = pa.table({"id": ids, "text": texts, "url": [f"https://example.org/{i}" for i in ids]})
        pq.write_table(table, folder / f"part-{shard:05d}.parquet", compression="zstd", row_group_size=50_000)
    (folder / "_made").touch()


def terms() -> list[str]:
    """The embedded word list."""
    from models import registry

    return sorted(registry.load("scorer", "lexicon").terms)


def run_engine(source: Path, target: Path, workers: int) -> None:
    """The score job, as `tamis score` runs it."""
    from pipelines.run import RunSettings
    from pipelines.score import ScoreConfig, run

    run(
        ScoreConfig(input=str(source), output=str(target), id_column="id"),
        RunSettings(workers=workers, progress="quiet"),
    )


def run_loop(source: Path, target: Path, *, copy: bool) -> None:
    """A careful hand-written single-process loop: batches, the same scorer, the corpus and a score file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from models import registry

    scorer = registry.load("scorer", "lexicon")
    target.mkdir(parents=True)
    for path in sorted(source.glob("*.parquet")):
        file = pq.ParquetFile(path)
        data = None if copy else pq.ParquetWriter(target / path.name, file.schema_arrow, compression="zstd")
        scores = None
        columns = ["id", "text"] if copy else None
        for batch in file.iter_batches(batch_size=50_000, columns=columns):
            values = scorer.score(batch.column("text").to_pylist())
            table = pa.table({"id": batch.column("id"), "score": values[:, 0]})
            if scores is None:
                scores = pq.ParquetWriter(target / f"score-{path.name}", table.schema, compression="zstd")
            scores.write_table(table)
            if data is not None:
                data.write_batch(batch)
        if copy:
            shutil.copyfile(path, target / path.name)
        for writer in (data, scores):
            if writer is not None:
                writer.close()


DATATROVE = """
import json, re, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.filters import C4BadWordsFilter
from datatrove.pipeline.writers import ParquetWriter
source, target, shards, workers, words = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
keep = C4BadWordsFilter(keep_fraction=1.0)   # looks every document up, keeps all, counts the hits: the same work
listed = [re.escape(w) for w in json.load(open(words))]
keep._badwords_regex["en"] = re.compile(r"(?:\\W|^)({})(?:\\W|$)".format("|".join(listed)))
LocalPipelineExecutor(
    pipeline=[ParquetReader(source, glob_pattern="*.parquet"), keep, ParquetWriter(target + "/data")],
    tasks=shards, workers=workers, logging_dir=target + "/logs",
).run()
"""


def child(kind: str, source: Path, target: Path, workers: int) -> None:
    """One measured run, in this process."""
    shutil.rmtree(target, ignore_errors=True)
    if kind == "engine":
        import pipelines.score  # noqa: F401  imports are not the work
    else:
        import pyarrow.parquet  # noqa: F401
    from models import registry

    registry.load("scorer", "lexicon")
    started = time.perf_counter()
    if kind == "engine":
        run_engine(source, target, workers)
    else:
        run_loop(source, target, copy=kind == "loop-copy")
    seconds = time.perf_counter() - started
    peaks = [resource.getrusage(w).ru_maxrss / 1024 for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": seconds, "peak_mb": max(peaks)}))


def measure(kind: str, args: argparse.Namespace, source: Path, work: Path) -> dict[str, float]:
    """Run one contestant in a fresh process."""
    if kind == "datatrove":
        words = work / "words.json"
        words.write_text(json.dumps(terms()))
        target = work / "datatrove"
        shutil.rmtree(target, ignore_errors=True)
        command = [args.datatrove_python, "-c", DATATROVE, str(source), str(target), str(args.shards)]
        started = time.perf_counter()
        subprocess.run([*command, str(args.workers), str(words)], check=True, capture_output=True)
        return {"seconds": time.perf_counter() - started, "peak_mb": 0.0}
    command = [sys.executable, __file__, "--child", kind, "--workers", str(args.workers)]
    command += ["--source", str(source), "--work", str(work)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main() -> None:
    """Run the contest and write `benchmarks/results/engine-*.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=int, default=400_000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/engine"))
    parser.add_argument("--source", type=Path)
    parser.add_argument("--contestants", default="engine,loop,loop-copy,datatrove")
    parser.add_argument("--datatrove-python", default=sys.executable)
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child == "corpus":
        make_corpus(args.source, args.docs, args.shards)
        return
    if args.child:
        child(args.child, args.source, args.work / args.child, args.workers)
        return
    source = args.work / f"corpus-{args.docs}"
    # In a process of its own: a child's peak memory would count what its parent had held when it was forked.
    command = [
        sys.executable,
        __file__,
        "--child",
        "corpus",
        "--source",
        str(source),
        "--docs",
        str(args.docs),
    ]
    subprocess.run([*command, "--shards", str(args.shards)], check=True)
    kinds = args.contestants.split(",")
    if (
        "datatrove" in kinds
        and subprocess.run([args.datatrove_python, "-c", "import datatrove"], capture_output=True).returncode
    ):
        print("datatrove is not importable: left out", file=sys.stderr)
        kinds.remove("datatrove")
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        rounds.append({kind: measure(kind, args, source, args.work) for kind in kinds})
        print(number, {k: round(v["seconds"], 2) for k, v in rounds[-1].items()}, file=sys.stderr)
    summary = {
        "docs": args.docs,
        "shards": args.shards,
        "workers": args.workers,
        "rounds": args.rounds,
        "seconds": {k: statistics.median(r[k]["seconds"] for r in rounds) for k in kinds},
        "docs_per_second": {k: args.docs / statistics.median(r[k]["seconds"] for r in rounds) for k in kinds},
        "peak_mb": {k: max(r[k]["peak_mb"] for r in rounds) for k in kinds},
        "speed_of_engine_over": {
            k: statistics.median(r[k]["seconds"] / r["engine"]["seconds"] for r in rounds)
            for k in kinds
            if k != "engine" and "engine" in kinds
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"engine-{args.docs}-{args.workers}w.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
