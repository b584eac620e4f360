"""Utility for one reader against relevance: how often what helps a model is what people marked, on NQ-open.

    python -m benchmarks.utility_labels --data ../shared/data/retrieval/nq_open_oracle.jsonl.gz --work runs/utility

Each question comes with the passage people marked as answering it, and the three other passages of the set that BM25 ranks
highest for it. `tamis label` labels the four by answer gain and by likelihood gain for the embedded model; nothing else is
judged. A run that was killed goes on where it stopped. Figures go to benchmarks/results/utility_labels.json; intervals draw
questions, not pairs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models.metrics.answers import has_answer
from models.metrics.bootstrap import clustered_interval, share_interval
from schemas.errors import TamisError
from schemas.fingerprint import fingerprint

RESULT = Path(__file__).parent / "results" / "utility_labels.json"
METHODS = {"answer_gain": ("--set", "answer_tokens=24"), "likelihood_gain": ("--set", "answer_tokens=24")}
# Which of four passages is on topic, by the same model: held to the form of a list, and free.
LISTS = {"held": ("--permutations", "4"), "free": ("--permutations", "4", "--set", "constrained=false")}
MANY = 6  # questions with more gold answers than this cost as many passes each


def prepare(source: Path, out: Path, questions: int, distractors: int) -> None:
    """Write the questions with their four passages as a reader's rows (DPR)."""
    import bm25s

    opener = gzip.open if source.suffix == ".gz" else open
    with opener(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [f"{r['ctxs'][0]['title']} {r['ctxs'][0]['text']}" for r in rows]
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    chosen = sorted(
        (i for i, r in enumerate(rows) if len(r["answers"]) <= MANY),
        key=lambda i: fingerprint("utility", rows[i]["question"]),
    )[:questions]
    asked = bm25s.tokenize([rows[i]["question"] for i in chosen], stopwords="en", show_progress=False)
    found, _ = index.retrieve(asked, k=distractors + 20, show_progress=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for i, ranked in zip(chosen, found, strict=True):
            gold = rows[i]["ctxs"][0]
            others = [int(j) for j in ranked if texts[int(j)] != texts[i]]
            # The same passage answers several questions of the set; shown twice it would be its own distractor.
            distinct = list({texts[j]: j for j in reversed(others)}.values())[::-1][:distractors]
            # In the order BM25 ranks all four, the gold passage among them.
            order = sorted(
                [i, *distinct], key=lambda j: list(map(int, ranked)).index(j) if j in ranked else len(ranked)
            )
            contexts = [
                {"id": f"p{j}", "title": rows[j]["ctxs"][0]["title"], "text": rows[j]["ctxs"][0]["text"], "isgold": j == i}
                for j in order
            ]  # fmt: skip
            assert sum(c["text"] == gold["text"] for c in contexts) == 1
            row = {"query_id": f"nq{i}", "question": rows[i]["question"], "answers": rows[i]["answers"]}
            file.write(json.dumps({**row, "ctxs": contexts}) + "\n")


def label(pool: Path, out: Path, method: str, *options: str) -> dict[str, Any]:
    """Run the job, as a user would; returns its manifest."""
    command = [
        sys.executable, "-m", "pipelines.cli", "label", str(pool), "-o", str(out), "--method", method, "--model", "smollm2",
        "--adapter", "none", *options, "--progress", "plain",
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise TamisError(f"tamis label failed ({done.returncode}); run the same command again to go on")
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest


def compare(pool: Path, work: Path) -> dict[str, Any]:
    """The figures."""
    rows = [json.loads(line) for line in pool.open(encoding="utf-8")]
    pairs = pl.DataFrame(
        [
            {
                "query_id": r["query_id"],
                "doc_id": c["id"],
                "gold": c["isgold"],
                "holds": has_answer(f"{c['title']} {c['text']}", r["answers"]) > 0,
            }
            for r in rows
            for c in r["ctxs"]
        ]
    )
    figures: dict[str, Any] = {"questions": len(rows), "pairs": pairs.height}
    labels = {m: pl.read_parquet(work / m / "data" / "*.parquet") for m in METHODS}
    for method, table in labels.items():
        joined = pairs.join(table, on=("query_id", "doc_id"), how="left")
        read = joined.filter(pl.col("value").is_not_null())
        own: dict[str, Any] = {
            "labelled": read.height,
            "unreadable": joined.height - read.height,
            "target_model": read["target_model"][0],
        }
        for name, part in (
            ("all", read),
            ("known", read.filter(pl.col("known_query"))),
            ("unknown", read.filter(~pl.col("known_query"))),
        ):
            own[name] = _figures(part)
        figures[method] = own
    answers = labels["answer_gain"].join(pairs, on=("query_id", "doc_id"))
    figures["harmful"] = {
        "known_gold": _share(answers.filter(pl.col("known_query") & pl.col("gold")), pl.col("value") < 0),
        "known_distractor": _share(
            answers.filter(pl.col("known_query") & ~pl.col("gold")), pl.col("value") < 0
        ),
    }
    both = labels["answer_gain"].join(
        labels["likelihood_gain"], on=("query_id", "doc_id"), suffix="_likelihood"
    )
    figures["gains_disagree"] = _share(both, pl.col("binary") != pl.col("binary_likelihood"))
    return figures


def lists(pool: Path, work: Path, queries: int) -> dict[str, Any]:
    """RelSel by the embedded model, held to the form of a list and free: what can be read, and whether it tells gold apart."""
    from transforms.retrieval.agreement import How, binary_figures, by_query, order_figures

    gold = pl.DataFrame(
        [
            {
                "query_id": r["query_id"],
                "doc_id": c["id"],
                "positive_b": c["isgold"],
                "grade_b": int(c["isgold"]),
            }
            for r in map(json.loads, pool.open(encoding="utf-8"))
            for c in r["ctxs"]
        ]
    )
    found: dict[str, Any] = {}
    for name, options in LISTS.items():
        out = work / f"relsel_{name}"
        manifest = label(pool, out, "relsel", *options, "--limit-queries", str(queries))
        table = pl.read_parquet(out / "data" / "*.parquet")
        read = table.filter(pl.col("binary").is_not_null()).join(gold, on=("query_id", "doc_id"))
        pairs = read.select(
            "query_id", "positive_b", "grade_b", pl.col("binary").alias("positive_a"), pl.col("value").alias("value_a"),
            pl.col("grade").alias("grade_a"), pl.col("rank").alias("rank_a"),
        )  # fmt: skip
        figures = (
            {**binary_figures(by_query(pairs), How()), **order_figures(pairs, How())} if read.height else {}
        )
        found[name] = {
            "queries": queries,
            "statuses": manifest["statuses"],
            "votes": float(table["votes"].fill_null(0).mean()),  # type: ignore[arg-type]
            "agreement": {k: None if x is None else x.as_dict() for k, x in figures.items()},
        }
    return found


def _figures(part: pl.DataFrame) -> dict[str, Any]:
    """Of some pairs: how often gain and relevance disagree, and in which way."""
    gold, others = part.filter(pl.col("gold")), part.filter(~pl.col("gold"))
    return {
        "queries": part["query_id"].n_unique(),
        "disagree": _share(part, pl.col("binary") != pl.col("gold")),
        "useful_of_gold": _share(gold, pl.col("binary")),
        "useful_of_distractors": _share(others, pl.col("binary")),
        "holding_of_useful_distractors": _share(others.filter(pl.col("binary")), pl.col("holds")),
        "raised_by_gold": _share(gold, pl.col("value") > 0),
        "raised_by_distractors": _share(others, pl.col("value") > 0),
        "lowered_by_gold": _share(gold, pl.col("value") < 0),
        "lowered_by_distractors": _share(others, pl.col("value") < 0),
        "gold_first": _first(part),
        "mean_gain_of_gold": _mean(gold),
        "mean_gain_of_distractors": _mean(others),
    }


def _share(part: pl.DataFrame, what: pl.Expr) -> dict[str, Any] | None:
    """Share of pairs, questions drawn with replacement."""
    if not part.height:
        return None
    hits = part.select(what.cast(pl.Float64)).to_series().to_numpy()
    if set(np.unique(hits)) <= {0.0} or set(np.unique(hits)) <= {1.0}:
        return share_interval(hits).as_dict()
    return clustered_interval(hits, part["query_id"].to_list()).as_dict()


def _mean(part: pl.DataFrame) -> dict[str, Any] | None:
    return (
        clustered_interval(part["value"].to_numpy(), part["query_id"].to_list()).as_dict()
        if part.height
        else None
    )


def _first(part: pl.DataFrame) -> dict[str, Any] | None:
    """Share of questions whose gold passage gains most; among k equals it counts 1/k."""
    if not part.height:
        return None
    best = part.with_columns((pl.col("value") == pl.col("value").max().over("query_id")).alias("best"))
    shares = best.group_by("query_id", maintain_order=True).agg(
        (pl.col("best") & pl.col("gold")).sum() / pl.col("best").sum()
    )
    return share_interval(shares.to_series(1).to_numpy()).as_dict()


def page(found: dict[str, Any]) -> str:
    """The figures as a section of docs/results/judgments.md."""

    def cell(x: dict[str, Any] | None, form: str = ".2f") -> str:
        return "–" if x is None else f"{x['mean']:{form}} [{x['low']:{form}}, {x['high']:{form}}]"

    def row(what: str, key: str, form: str = ".2f") -> str:
        cells = (cell(found[m][part][key], form) for m in METHODS for part in ("known", "unknown"))
        return f"| {what} | {' | '.join(cells)} |"

    answer = found["answer_gain"]
    lines = [
        "## Utility for one reader",
        "",
        "    python -m benchmarks.utility_labels --data nq_open_oracle.jsonl.gz",
        "",
        f"{found['questions']} questions of NQ-open, each with the passage people marked as answering it and the three other passages of the set that",
        f"BM25 ranks highest; the reader is {answer['target_model']} (135 M parameters). Shares of pairs or questions [95 %, questions drawn with",
        f"replacement]. The reader answers {answer['known']['queries']} of the questions with no passage: these are *known*.",
        "",
        "| | answer gain, known | answer gain, unknown | likelihood gain, known | likelihood gain, unknown |",
        "|---|---|---|---|---|",
        "| questions | "
        + " | ".join(str(found[m][p]["queries"]) for m in METHODS for p in ("known", "unknown"))
        + " |",
        row("gain and relevance disagree (pairs)", "disagree"),
        row("useful, of passages marked relevant", "useful_of_gold"),
        row("useful, of the other passages", "useful_of_distractors"),
        row("gain above 0, of passages marked relevant", "raised_by_gold"),
        row("gain above 0, of the others", "raised_by_distractors"),
        row("gain below 0, of passages marked relevant", "lowered_by_gold"),
        row("gain below 0, of the others", "lowered_by_distractors"),
        row("the relevant passage gains most (questions)", "gold_first"),
        row("mean gain of the relevant passage", "mean_gain_of_gold", "+.2f"),
        row("mean gain of the others", "mean_gain_of_distractors", "+.2f"),
        "",
        f"Over all questions gain and relevance disagree on {cell(answer['all']['disagree'])} of the pairs by answer gain and on "
        f"{cell(found['likelihood_gain']['all']['disagree'])} by likelihood gain; the two gains disagree with one another on {cell(found['gains_disagree'])}.",
        "",
    ]
    for name, own in found.get("lists", {}).items():
        agreed = own["agreement"]
        lines.append(
            f"- relsel, {name}, {own['queries']} questions in four orders: {own['statuses']}; readings merged {own['votes']:.1f}; kappa "
            f"{cell(agreed.get('kappa'))}, AUC {cell(agreed.get('auc'))}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prepare, label, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/retrieval/nq_open_oracle.jsonl.gz"))
    parser.add_argument("--work", type=Path, default=Path("runs/utility"))
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--distractors", type=int, default=3)
    parser.add_argument("--lists", type=int, default=12, help="Questions RelSel is tried on; 0 = none.")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    pool = options.work / "nq.jsonl"
    if not pool.exists():
        prepare(options.data, pool, options.questions, options.distractors)
    costs = {}
    for method in METHODS:
        manifest = label(pool, options.work / method, method, *METHODS[method])
        costs[method] = {k: manifest.get(k) for k in ("totals", "cost") if k in manifest}
    found = compare(pool, options.work) | {
        "source": "NQ-open with its oracle passages (one gold passage a question), questions by hash of their text",
        "distractors": f"{options.distractors} other passages of the same file, by BM25",
        "model": "smollm2 (135M)",
        "cost": costs,
        "machine": platform.processor() or platform.machine(),
    }
    write(found, options.result, options.work)
    if options.lists:
        found["lists"] = lists(pool, options.work, options.lists)
        write(found, options.result, options.work)
    print(json.dumps({k: v for k, v in found.items() if k != "cost"}, indent=1))


def write(found: dict[str, Any], result: Path, work: Path) -> None:
    """The figures, and beside the labels the section made of them."""
    result.write_text(json.dumps(found, indent=1) + "\n")
    (work / "section.md").write_text(page(found))


if __name__ == "__main__":
    main()
