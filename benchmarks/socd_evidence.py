"""Does steering pay? The decoding modes side by side on the same texts, candidates and seeds.

    python -m benchmarks.socd_evidence run --data ../shared/data --toxic-adapter ADAPTER --work runs/socd
    python -m benchmarks.socd_evidence run --corpora hate --arms logratio,official --bare ...   # a part of it
    python -m benchmarks.socd_evidence run ... --variant NAME -- --scorer NAME             more options of `tamis detox`
    python -m benchmarks.socd_evidence report --data ../shared/data --work runs/socd

`run` makes two corpora of 300 rows and runs `tamis detox --gate none` over each in every mode, with the embedded adapter
and (`--bare`) without it; what is done is not done again. `report` reads the outputs and writes
`benchmarks/results/socd_evidence.json`: per arm the share of sentences accepted without fallback, the judge's mean over the
corpus, similarity of each row to its source, perplexity of the output under the untouched base model; with 95 %
bootstrap intervals, and each arm's paired difference to `prompt_only`.

`hate` is a sample of the HSPD input, `paradetox` rows of ParaDetox that the adapter's training never saw. The judge is a
logistic regression over character n-grams (benchmarks/detox_corpus.py), fitted without those rows; it ranks nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.adapter import normalise, split_rows
from benchmarks.detox_corpus import Judge, make_hate, verify
from models.metrics.bootstrap import mean_interval, paired_difference

RESULTS = Path(__file__).resolve().parent / "results" / "socd_evidence.json"
MODES = ("prompt_only", "vanilla_cd", "official", "logratio")
CORPORA = ("hate", "paradetox")


def held_out(data: Path) -> list[str]:
    """The ParaDetox texts that the adapter's training never saw, in a fixed order."""
    with (data / "detox/paradetox_dev.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    texts: dict[str, str] = {}
    for row in split_rows(rows)["held_out"]:
        texts.setdefault(normalise(row["toxic"]), row["toxic"])
    return list(texts.values())


def make_corpus(name: str, data: Path, work: Path, rows: int) -> Path:
    """Write a corpus once; returns its file."""
    path = work / f"{name}-{rows}.jsonl"
    if path.exists():
        return path
    if name == "hate":
        make_hate(data, path, rows)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for i, text in enumerate(held_out(data)[:rows]):
            out.write(json.dumps({"id": f"p{i}", "text": text}, ensure_ascii=False) + "\n")
    return path


def output_of(work: Path, corpus: str, rows: int, arm: str) -> Path:
    """Where an arm's output stands."""
    return work / f"{corpus}-{rows}-{arm}"


def run(args: argparse.Namespace) -> None:
    """Run the arms that are not done yet, one after the other."""
    for corpus in args.corpora.split(","):
        source = make_corpus(corpus, args.data, args.work, args.rows)
        for mode in args.arms.split(","):
            arm = mode + ("-bare" if args.bare else "") + (f"-{args.variant}" if args.variant else "")
            output = output_of(args.work, corpus, args.rows, arm)
            if (output / "_SUCCESS").exists():
                continue
            command = [sys.executable, "-m", "pipelines.detox", str(source), "--output", str(output)]
            command += [
                "--id-column",
                "id",
                "--gate",
                "none",
                "--workers",
                str(args.workers),
                "--decoding",
                mode,
            ]
            command += ["--toxic-adapter", str(args.toxic_adapter)] if mode != "prompt_only" else []
            command += ["--adapter", "none"] if args.bare else []
            started = time.perf_counter()
            subprocess.run([*command, "--progress", "plain", *args.extra], check=True)
            print(f"{output.name}: {time.perf_counter() - started:.0f} s", flush=True)


def report(args: argparse.Namespace) -> None:
    """Judge what there is, and write the figures."""
    from models import registry

    if args.judge:
        scorer = registry.load("scorer", args.judge, threads=1)
        judged: Callable[[list[str]], np.ndarray] = lambda texts: scorer.score(texts)[:, 0]  # noqa: E731
    else:
        seen = {normalise(t) for t in held_out(args.data)}
        ngrams = Judge(args.data, leave_out=lambda text: normalise(text) in seen)
        judged = ngrams.score
    encoder = registry.load("encoder", "minilm", threads=1)
    base = registry.load("lm", "smollm2", threads=1)
    figures: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.judge:
        figures["judge_auc_held_out"] = ngrams.auc
    for corpus in args.corpora.split(","):
        source = args.work / f"{corpus}-{args.rows}.jsonl"
        if not source.exists():
            continue
        rows = {row["id"]: row["text"] for row in map(json.loads, source.open())}
        place = {name: i for i, name in enumerate(rows)}
        raw = list(rows.values())
        before, vectors = judged(raw), encoder.encode(raw)
        facts: dict[str, Any] = {"rows": len(raw), "judge_before": _interval(before)}
        facts["perplexity_before"] = _perplexity(base, raw)
        per_row: dict[str, dict[str, tuple[float, float]]] = {}  # of the rows kept: judge, similarity
        prefix = f"{corpus}-{args.rows}-"
        for output in sorted(p for p in args.work.glob(prefix + "*") if (p / "_SUCCESS").exists()):
            arm = output.name.removeprefix(prefix)
            # A variant without plain sampling of its own is compared with that of the plain arms.
            stands_in = (
                arm == "prompt_only" and not (output.parent / f"{output.name}-{args.variant}").exists()
            )
            if args.variant and not (arm.endswith(f"-{args.variant}") or stands_in):
                continue
            arm = arm.removesuffix(f"-{args.variant}") if args.variant else arm
            if arm.removesuffix("-bare") not in args.arms.split(","):
                continue
            kept = [json.loads(line) for line in (output / "data" / source.name).open()]
            texts = [row["text"] for row in kept]
            after = judged(texts)
            own = vectors[[place[row["id"]] for row in kept]]
            similar = np.clip((encoder.encode(texts) * own).sum(axis=1), -1, 1)
            ids = [row["id"] for row in kept]
            per_row[arm] = dict(zip(ids, zip(after.tolist(), similar.tolist(), strict=True), strict=True))
            facts[arm] = {
                "kept": len(kept),
                **_counts(output),
                "judge": _interval(after),
                "similarity": _interval(similar),
            }
            facts[arm]["perplexity"] = _perplexity(base, [t for t in texts if t.strip()])
            facts[arm]["verify_problems"] = len(verify(output)["problems"])
        for arm, values in per_row.items():
            plain = "prompt_only-bare" if arm.split("-")[1:2] == ["bare"] else "prompt_only"
            if plain in per_row and arm != plain:
                common = [name for name in values if name in per_row[plain]]
                own, other = (np.array([side[name] for name in common]) for side in (values, per_row[plain]))
                facts[arm]["against"] = plain
                facts[arm]["judge_difference"] = _difference(own[:, 0], other[:, 0])
                facts[arm]["similarity_difference"] = _difference(own[:, 1], other[:, 1])
        facts |= {"judge_name": args.judge} if args.judge else {}
        figures[f"{corpus}-{args.rows}" + (f"-{args.variant}" if args.variant else "")] = facts
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def _counts(output: Path) -> dict[str, Any]:
    manifest = json.loads((output / "manifest.json").read_text())
    files = sorted((output / "edits").rglob("*.parquet"))
    edits = pl.concat([pl.read_parquet(f, columns=["action"]) for f in files])
    rungs = dict(edits["action"].value_counts().iter_rows())
    counters = manifest["counters"]
    segments = sum(v for k, v in counters.items() if k.endswith("rewrite.requests"))
    return {
        "sentences": segments,
        "rungs": rungs,
        "accepted_share": rungs.get("rewrite", rungs.get("candidate", 0)) / segments if segments else 0.0,
        "counters": {k: v for k, v in sorted(counters.items()) if "rewrite." in k or "reject" in k},
    }


def _perplexity(model: Any, texts: list[str]) -> dict[str, float]:
    """Exp of the mean negative log-likelihood a token, pooled; the interval comes from resampling texts."""
    sums, counts = [], []
    for _, logprobs in model.score_tokens(texts):
        values = np.asarray(logprobs, dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            sums.append(-values.sum())
            counts.append(len(values))
    total, number = np.array(sums), np.array(counts)
    draws = np.random.default_rng(0).integers(0, len(total), (2000, len(total)))
    logs = total[draws].sum(axis=1) / number[draws].sum(axis=1)
    low, high = np.quantile(logs, [0.025, 0.975])
    return {
        "mean": math.exp(total.sum() / number.sum()),
        "low": math.exp(low),
        "high": math.exp(high),
        "n": len(total),
    }


def _interval(values: np.ndarray) -> dict[str, float]:
    found = mean_interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}


def _difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    found = paired_difference(a, b)
    d = found.difference
    return {"mean": d.mean, "low": d.low, "high": d.high, "n": d.n, "p": found.p_value}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/socd"))
    parser.add_argument("--toxic-adapter", type=Path)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--arms", default=",".join(MODES))
    parser.add_argument("--bare", action="store_true", help="without the embedded adapter")
    parser.add_argument(
        "--variant", default="", help="name of arms with other options, kept beside the plain ones"
    )
    parser.add_argument("--judge", default="", help="report: a scorer by name, in place of the n-gram model")
    # Split here: argparse gives a second positional nothing where options stand between the two.
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.extra = words[end + 1 :]
    {"run": run, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
