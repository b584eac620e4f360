"""Embedding: throughput against `SentenceTransformer.encode`, equality of vectors, memory as a corpus grows tenfold.

    python benchmarks/embedding.py speed  --corpus corpus.jsonl --queries queries.jsonl   # minutes on one core
    python benchmarks/embedding.py memory --corpus corpus.jsonl
    python benchmarks/embedding.py quality --corpus corpus.jsonl --queries queries.jsonl --qrels test.tsv --output OUT

`corpus.jsonl` and `queries.jsonl` are in the BEIR layout (`_id`, `title`, `text`); the published figures are of NFCorpus.

Speed: the same model and the same texts, of mixed lengths (queries, titles, beginnings, whole abstracts), in one
process with one torch thread; contestants take turns, processor time is compared within a round, and texts over the
model's limit are cut on both sides, as the library does. Memory: the whole job, and the building of an index, each in a
process of its own over N and 10 N documents; peak resident memory is what the kernel says at its end. Quality: what the
finished output finds, judged by human grades.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "embedding.json"
sys.path.insert(0, str(ROOT))


def read_jsonl(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line.strip()]


def mixed_texts(corpus: str, queries: str, count: int, seed: int) -> list[str]:
    """A third queries, a third titles, a sixth beginnings, a sixth whole documents, shuffled."""
    draw = random.Random(seed)
    documents, asked = read_jsonl(corpus), read_jsonl(queries)
    chosen = draw.sample(documents, count)
    texts = [q["text"] for q in draw.sample(asked, count // 3)]
    texts += [d["title"] for d in chosen[: count // 3]]
    texts += [" ".join(d["text"].split()[: draw.randint(8, 120)]) for d in chosen[count // 3 : count // 2]]
    texts += [f"{d['title']} {d['text']}" for d in chosen[count // 2 :]][: count - len(texts)]
    draw.shuffle(texts)
    return texts


def timed(work: Any) -> tuple[float, Any]:
    """Processor seconds and result: with one thread, what a clock shows on an idle machine."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """The contest, and how far the vectors agree."""
    import numpy as np
    import sentence_transformers
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer

    from models import registry, store
    from models.lm.packed import has_fast_bfloat16

    torch.set_num_threads(1)
    texts = mixed_texts(args.corpus, args.queries, args.texts, args.seed)
    peer = SentenceTransformer(str(store.path("minilm")), device="cpu")
    ours = registry.load("encoder", "minilm", device="cpu", threads=1)
    contestants = {"tamis": lambda: ours.embed(texts, long="truncate").vectors}
    if has_fast_bfloat16():
        half = registry.load("encoder", "minilm", device="cpu", threads=1, dtype="bfloat16")
        contestants["tamis, bfloat16"] = lambda: half.embed(texts, long="truncate").vectors
    library = {size: (lambda size=size: peer.encode(texts, batch_size=size)) for size in args.batch_sizes}
    for warm in (peer.encode, ours.encode):
        warm(texts[:8])
    rounds: list[dict[str, float]] = []
    vectors: dict[str, Any] = {}
    for number in range(args.rounds):
        seconds = {}
        for size, work in library.items():
            if number == 0 or size == args.batch_sizes[0]:
                seconds[f"encode, batch {size}"], vectors[f"encode, batch {size}"] = timed(work)
        for name, work in contestants.items():
            seconds[name], vectors[name] = timed(work)
        rounds.append(seconds)
        print(number, {k: round(v, 2) for k, v in seconds.items()}, file=sys.stderr)
    default = f"encode, batch {args.batch_sizes[0]}"
    tokens = np.array([len(t) for t in peer.tokenizer(texts)["input_ids"]])
    few = list(range(0, len(texts), max(1, len(texts) // 24)))
    alone = np.concatenate([ours.embed([texts[i]], long="truncate").vectors for i in few])
    peer_alone = np.concatenate([peer.encode([texts[i]]) for i in few])
    return {
        "model": "minilm (all-MiniLM-L6-v2), float32",
        "texts": len(texts),
        "tokens": {
            "median": float(np.median(tokens)),
            "mean": float(tokens.clip(max=ours.limit).mean()),
            "over_limit": int((tokens > ours.limit).sum()),
        },
        "processor_seconds": rounds,
        "texts_per_second": {
            name: round(len(texts) / statistics.median(r[name] for r in rounds if name in r), 2)
            for name in rounds[0]
        },
        "speed_over_encode": {
            name: round(statistics.median(r[default] / r[name] for r in rounds), 3) for name in contestants
        },
        "speed_over_encode_by_batch_size": {
            size: round(rounds[0][f"encode, batch {size}"] / rounds[0]["tamis"], 3) for size in library
        },
        "largest_difference": {n: float(np.abs(vectors[n] - vectors[default]).max()) for n in contestants},
        "alone_or_in_company": {
            "texts": len(few),
            "tamis_equal_bit_for_bit": bool((alone == vectors["tamis"][few]).all()),
            "encode_equal_bit_for_bit": int((peer_alone == vectors[default][few]).all(axis=1).sum()),
        },
        "threads": 1,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentence-transformers": sentence_transformers.__version__,
        },
    }


def child_embed(source: str, out: str) -> None:
    """The whole job, as `tamis embed` runs it."""
    from pipelines.embed import EmbedConfig, run
    from pipelines.run import RunSettings

    run(EmbedConfig(input=source, output=out, id_column="_id"), RunSettings(progress="quiet"))


def child_index(out: str) -> None:
    """An IVF index in parts of 8 MB, over vectors that are there."""
    from transforms.embed.build import build_index
    from transforms.embed.faiss_parts import IndexSpec

    build_index(out, IndexSpec(kind="ivf", lists=128, part_mb=8, train_mb=16, queries=20))


def peak(*arguments: str) -> dict[str, float]:
    """Run this file as a child; its seconds and its peak resident memory in MB."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    return {"peak_mb": round(report["peak_mb"], 1), "processor_seconds": round(report["seconds"], 1)}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of the job over N and 10 N documents, and of indexing N and 10 N vectors."""
    titles = [d["title"] for d in read_jsonl(args.corpus)]
    found: dict[str, Any] = {"documents": {}, "vectors": {}}
    with tempfile.TemporaryDirectory() as place:
        for count in (args.documents, 10 * args.documents):
            source = Path(place) / f"{count}.jsonl"
            with source.open("w", encoding="utf-8") as file:
                for i in range(count):  # the number makes every text another one
                    text = f"{i} {titles[i % len(titles)]}"
                    file.write(json.dumps({"_id": str(i), "text": text}) + "\n")
            found["documents"][count] = peak("child-embed", str(source), f"{place}/{count}-out")
            print("documents", count, found["documents"][count], file=sys.stderr)
        for count in (args.vectors, 10 * args.vectors):
            out = Path(place) / f"{count}-vectors"
            make_vectors(out, count)
            found["vectors"][count] = peak("child-index", str(out)) | {"vector_mb": count * 384 * 4 / 1e6}
            print("vectors", count, found["vectors"][count], file=sys.stderr)
    for name in ("documents", "vectors"):
        small, large = found[name].values()
        found[f"growth_over_tenfold_{name}"] = round(large["peak_mb"] / small["peak_mb"], 3)
    return found


def make_vectors(out: Path, count: int, dimension: int = 384) -> None:
    """An output that holds nothing but random vectors in clusters, with the sidecars `tamis embed` writes."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from transforms.embed.vectors import INFO_TYPE, to_arrow

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, dimension)).astype(np.float32)
    writers: dict[str, Any] = {}
    for start in range(0, count, 4096):
        n = min(4096, count - start)
        vectors = centres[rng.integers(0, 200, n)] + rng.standard_normal((n, dimension)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        values, _ = to_arrow(vectors.astype(np.float32), np.zeros(n, bool), "float32")
        small = pa.array(np.ones(n, np.int32))
        info = pa.StructArray.from_arrays(
            [pa.repeat(pa.scalar("ok"), n), small, small, pa.array(np.ones(n, np.float32))],
            fields=list(INFO_TYPE),
        )
        head = {"id": [str(i) for i in range(start, start + n)], "row": pa.array(range(start, start + n))}
        for name, column in (("embedding", values), ("embedding_info", info)):
            table = pa.table({**head, "value": column})
            if name not in writers:
                path = out / "attributes" / name / "a.parquet"
                path.parent.mkdir(parents=True)
                writers[name] = pq.ParquetWriter(path, table.schema, compression="none")
            writers[name].write_table(table)
    for writer in writers.values():
        writer.close()
    manifest = {
        "config_hash": "synthetic",
        "config": {"attribute": "embedding"},
        "models": [],
        "outputs": {"attributes": list(writers)},
        "shards": [{"path": "a.parquet", "rows_kept": count}],
    }
    (out / "manifest.json").write_text(json.dumps(manifest))


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """nDCG@10 and recall@100 of an embedded corpus against human grades, by exact search and by its index."""
    import ir_measures
    from ir_measures import R, nDCG

    from pipelines.search import Query, Searcher, SearchOptions

    grades: dict[str, dict[str, int]] = {}
    for line in Path(args.qrels).read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        grades.setdefault(query, {})[document] = int(grade)
    queries = [Query(q["_id"], q["text"]) for q in read_jsonl(args.queries) if q["_id"] in grades]
    found: dict[str, Any] = {"queries": len(queries)}
    for name, exact in (("exact", True), ("index", False)):
        searcher = Searcher(args.output, SearchOptions(exact=exact))
        if not exact and searcher.index is None:
            continue
        hits = searcher.search([q.text for q in queries], 100)
        run = {
            q.id: {i: float(s) for i, s in zip(ids, scores, strict=True) if i}
            for q, ids, scores in zip(queries, hits.ids, hits.scores, strict=True)
        }
        values = ir_measures.calc_aggregate([nDCG @ 10, R @ 100], grades, run)
        found[name] = {str(measure): round(value, 4) for measure, value in values.items()}
    manifest = json.loads((Path(args.output) / "manifest.json").read_text())
    found["job"] = {
        "rows": manifest["totals"]["rows_kept"],
        "counters": {k: v for k, v in manifest["counters"].items() if k.startswith("embed.")},
        "index": {k: manifest["index"][k] for k in ("factory", "vectors", "probe", "recall")},
    }
    return found


def main() -> None:
    """Run one part and write it into `benchmarks/results/embedding.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("speed", "memory", "quality", "child-embed", "child-index"))
    parser.add_argument("places", nargs="*")
    parser.add_argument("--corpus")
    parser.add_argument("--queries")
    parser.add_argument("--qrels")
    parser.add_argument("--output")
    parser.add_argument("--texts", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 8, 128])
    parser.add_argument("--documents", type=int, default=1800)
    parser.add_argument("--vectors", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.part.startswith("child"):
        started = time.process_time()
        {"child-embed": child_embed, "child-index": child_index}[args.part](*args.places)
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({"peak_mb": used.ru_maxrss / 1024, "seconds": time.process_time() - started}))
        return
    result = {"speed": speed, "memory": memory, "quality": quality}[args.part](args)
    held = json.loads(args.results.read_text()) if args.results.exists() else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps({**held, args.part: result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
