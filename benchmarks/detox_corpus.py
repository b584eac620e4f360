"""The detox job on real text: what is found, what is rewritten, what it costs, and what an independent judge says.

    python benchmarks/detox_corpus.py --data ../shared/data --rows 300 --work runs/detox

Two corpora are made from the development data (their text never enters the repository):

- `hate`: rows of the HSPD input, JSONL, every one of them hateful; run with `--gate none` as the paper assumes.
- `mixed`: Parquet with nested and dictionary columns; neutral documents, half of them with toxic sentences put in at
  known offsets.

The judge shares neither data nor features with the ranker: a logistic regression on character n-grams, fitted on the
DGHS development split, the Davidson tweets and both sides of ParaDetox (the ranker is a BiLSTM over words trained on
Jigsaw's comments; similarity comes from sentence embeddings). It ranks nothing. The rewriter's adapter has seen ParaDetox
too, as pairs. Runs are resumed when started again; figures go to `benchmarks/results/detox_corpus.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

RESULTS = Path(__file__).resolve().parent / "results"


class Judge:
    """P(toxic) by logistic regression over character n-grams."""

    def __init__(self, data: Path, leave_out: Callable[[str], bool] = lambda text: False) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.pipeline import make_pipeline

        found = zip(*_labelled(data), strict=True)
        texts, labels = zip(*((t, y) for t, y in found if not leave_out(t)), strict=True)
        held = [i % 5 == 0 for i in range(len(texts))]
        train = [i for i, h in enumerate(held) if not h]
        test = [i for i, h in enumerate(held) if h]
        self._model = make_pipeline(
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=3, sublinear_tf=True),
            LogisticRegression(C=8.0, max_iter=1000, class_weight="balanced"),
        )
        self._model.fit([texts[i] for i in train], [labels[i] for i in train])
        self.auc = float(roc_auc_score([labels[i] for i in test], self.score([texts[i] for i in test])))

    def score(self, texts: list[str]) -> np.ndarray:
        """P(toxic) of each text; of an empty one 0."""
        scores = self._model.predict_proba(texts)[:, 1]
        return np.where([bool(t.strip()) for t in texts], scores, 0.0)


def _labelled(data: Path) -> tuple[list[str], list[int]]:
    texts, labels = [], []
    with (data / "detox/dghs_dev_both_labels.csv").open() as file:
        for row in csv.DictReader(file):
            texts.append(row["text"])
            labels.append(int(row["label"] == "hate"))
    with (data / "detox/davidson_labeled.csv").open() as file:
        for i, row in enumerate(csv.DictReader(file)):
            if (
                row["class"] == "2" or i % 4 == 0
            ):  # tweets are five sixths offensive: a quarter of those will do
                texts.append(row["tweet"])
                labels.append(int(row["class"] != "2"))
    with (data / "detox/paradetox_dev.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            texts += [row["toxic"], row["neutral1"]]
            labels += [1, 0]
    return texts, labels


def make_hate(data: Path, path: Path, rows: int) -> None:
    """A sample of the HSPD input, by content hash."""
    from schemas.fingerprint import fingerprint

    with (data / "detox/dghs_to_detox.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    chosen = sorted(texts, key=lambda t: fingerprint("sample", t))[:rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for i, text in enumerate(chosen):
            out.write(json.dumps({"id": f"h{i}", "text": text}, ensure_ascii=False) + "\n")


def make_mixed(data: Path, path: Path, documents: int, truth: Path) -> None:
    """Neutral documents of 3 to 8 sentences; every second one has one or two toxic sentences put in."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from models import registry

    rng = random.Random(11)
    with (data / "detox/paradetox_dev.tsv").open() as file:
        neutral = [
            r["neutral1"].strip() for r in csv.DictReader(file, delimiter="\t") if r["neutral1"].strip()
        ]
    rng.shuffle(neutral)
    neutral = [t for t in neutral[:6000] if 20 < len(t) < 160 and t[-1].isalnum()]
    scores = registry.load("scorer", "linear").score(neutral)[:, 0]
    words = registry.load("scorer", "lexicon").score(neutral)[:, 0]
    neutral = [t for t, s, w in zip(neutral, scores, words, strict=True) if s < 0.1 and w == 0]
    with (data / "detox/tsd_trial.csv").open() as file:
        toxic = [
            r["text"].strip()
            for r in csv.DictReader(file)
            if json.loads(r["spans"]) and 20 < len(r["text"]) < 200 and "\n" not in r["text"].strip()
        ]
    rng.shuffle(toxic)
    texts, known, used = [], [], 0
    for number in range(documents):
        sentences = [s[0].upper() + s[1:] + "." for s in rng.sample(neutral, rng.randint(3, 8))]
        marks = [False] * len(sentences)
        if number % 2:
            for _ in range(rng.randint(1, 2)):
                at = rng.randint(0, len(sentences))
                sentences.insert(at, toxic[used % len(toxic)])
                marks.insert(at, True)
                used += 1
        text, spans = "", []
        for sentence, mark in zip(sentences, marks, strict=True):
            if text:
                text += " "
            if mark:
                spans.append((len(text), len(text) + len(sentence)))
            text += sentence
        texts.append(text)
        known.append(spans)
    table = pa.table(
        {
            "doc_id": [f"m{i}" for i in range(documents)],
            "body": pa.array(texts, pa.large_string()),
            "source": pa.array([f"site{i % 3}" for i in range(documents)]).dictionary_encode(),
            "meta": [{"n": i, "tags": ["a", "b"][: i % 3]} for i in range(documents)],
            "seen": pa.array([1_700_000_000_000 + i for i in range(documents)], pa.timestamp("ms", "UTC")),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", row_group_size=64)
    truth.write_text(json.dumps(known))


def run_job(source: Path, output: Path, workers: int, extra: list[str]) -> float:
    """`tamis detox` as a user runs it; seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pipelines.detox", str(source), "--output", str(output)]
    command += ["--workers", str(workers), "--progress", "plain", *extra]
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def load(output: Path) -> tuple[dict[str, Any], pl.DataFrame]:
    """Manifest and edits of an output."""
    manifest = json.loads((output / "manifest.json").read_text())
    files = sorted((output / "edits").rglob("*.parquet"))
    return manifest, pl.concat([pl.read_parquet(f) for f in files]) if files else pl.DataFrame()


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean with a 95 % bootstrap interval over rows."""
    if len(values) == 0:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    rng = np.random.default_rng(seed)
    means = rng.choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def summarise(output: Path, seconds: float, judge: Judge) -> dict[str, Any]:
    """Rungs, similarity, ranker and judge before and after, cost."""
    manifest, edits = load(output)
    counters = manifest["counters"]
    facts: dict[str, Any] = {"totals": manifest["totals"], "seconds_this_run": seconds}
    facts["rungs"] = dict(Counter(edits["action"].to_list())) if len(edits) else {}
    facts["counters"] = {k: v for k, v in sorted(counters.items()) if not k.endswith(("rows_in", "rows_out"))}
    if len(edits):
        for action, part in [
            ("all", edits),
            *((a, edits.filter(pl.col("action") == a)) for a in facts["rungs"]),
        ]:
            before = judge.score(part["before"].to_list())
            after = judge.score(part["after"].to_list())
            facts[f"edits_{action}"] = {
                "judge_before": interval(before),
                "judge_after": interval(after),
                "judge_toxic_share_before": float((before >= 0.5).mean()),
                "judge_toxic_share_after": float((after >= 0.5).mean()),
                "ranker_before": interval(part["toxicity_before"].drop_nulls().to_numpy()),
                "ranker_after": interval(part["toxicity_after"].drop_nulls().to_numpy()),
                "similarity": interval(part["similarity"].drop_nulls().to_numpy()),
            }
        reasons = Counter(
            reason
            for candidates in edits["candidates"].drop_nulls().to_list()
            for candidate in candidates
            for reason in candidate["reasons"] or []
        )
        facts["reject_reasons"] = dict(reasons.most_common())
    return facts


def main() -> None:
    """Make the corpora, run the jobs, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/detox"))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=["hate", "mixed"])
    parser.add_argument(
        "--variant", default="", help="name of a run with other options, kept beside the plain one"
    )
    parser.add_argument("extra", nargs="*", help="more options of `tamis detox`, after --")
    args = parser.parse_args()
    judge = Judge(args.data)
    mark = f"-{args.variant}" if args.variant else ""
    path = RESULTS / "detox_corpus.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures["judge_auc_held_out"] = judge.auc
    if args.only != "mixed":
        source, output = args.work / f"hate-{args.rows}.jsonl", args.work / f"hate-{args.rows}{mark}"
        if not source.exists():
            make_hate(args.data, source, args.rows)
        seconds = run_job(source, output, args.workers, ["--id-column", "id", "--gate", "none", *args.extra])
        figures["hate" + mark] = summarise(output, seconds, judge)
        texts = [json.loads(line)["text"] for line in source.open()]
        after = [json.loads(line)["text"] for line in (output / "data" / source.name).open()]
        figures["hate" + mark]["corpus_judge_before"] = interval(judge.score(texts))
        figures["hate" + mark]["corpus_judge_after"] = interval(judge.score(after))
        figures["hate" + mark]["verify"] = verify(output)
    if args.only != "hate":
        source = args.work / f"mixed-{args.documents}.parquet"
        output = args.work / f"mixed-{args.documents}{mark}"
        truth = args.work / f"mixed-{args.documents}.json"
        if not source.exists():
            make_mixed(args.data, source, args.documents, truth)
        columns = ["--text-column", "body", "--id-column", "doc_id"]
        seconds = run_job(source, output, args.workers, [*columns, *args.extra])
        figures["mixed" + mark] = summarise(output, seconds, judge)
        figures["mixed" + mark]["located"] = located(output, json.loads(truth.read_text()))
        figures["mixed" + mark]["verify"] = verify(output)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def located(output: Path, truth: list[list[tuple[int, int]]]) -> dict[str, Any]:
    """Of the toxic sentences put in, how many were changed; of the changes, how many lie in one."""
    _, edits = load(output)
    by_row: dict[int, list[tuple[int, int]]] = {}
    for row, start, end in edits.select("row", "start", "end").iter_rows():
        by_row.setdefault(row, []).append((start, end))
    hit = total = inside = 0
    for row, spans in enumerate(truth):
        found = by_row.get(row, [])
        for start, end in spans:
            total += 1
            hit += any(a < end and start < b for a, b in found)
        inside += sum(any(a < end and start < b for start, end in spans) for a, b in found)
    count = sum(map(len, by_row.values()))
    return {"toxic_sentences": total, "changed": hit, "edits": count, "edits_on_toxic": inside}


def verify(output: Path) -> dict[str, Any]:
    """`tamis verify` as figures."""
    from pipelines.verify import verify_output

    verdict = verify_output(str(output))
    return {
        "rows": verdict.rows,
        "edited_rows": verdict.edited_rows,
        "bytes_outside_edits": verdict.bytes_outside_edits,
        "problems": verdict.problems,
    }


if __name__ == "__main__":
    main()
