"""What each part of the rewriter is worth: without SoCD, with a fixed k, classic, without ranking, without acceptance.

    python -m benchmarks.socd_ablation --data ../shared/data --work runs/socd

Reads the runs of `benchmarks.socd_evidence` (and, where it is there, one with `--set decoding.dynamic_k=false`, variant `fixedk`)
and makes the rest from the candidates they recorded: nothing is generated. Writes benchmarks/results/socd_ablation.json.

    logratio          as the job runs
    prompt_only       no SoCD
    vanilla_cd        classic contrastive decoding
    logratio-fixedk   the fewest tokens at every step
    one-temperature   the two candidates of temperature 1.0 alone
    no-ranking        of the accepted candidates one at random (mean over five draws)
    no-acceptance     the best candidate taken unchecked
    one-sample        the first candidate of temperature 1.0, unchecked: neither ranking nor acceptance
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.adapter import normalise
from benchmarks.detox_corpus import Judge
from benchmarks.socd_evidence import _difference, _interval, _perplexity, held_out
from schemas.fingerprint import derive_seed

RESULTS = Path(__file__).resolve().parent / "results" / "socd_ablation.json"
RUNS = ("prompt_only", "vanilla_cd", "logratio-fixedk")
DRAWS = 5
Pick = Callable[[dict[str, Any], str, str], str]


def run_texts(output: Path, source: Path, rows: dict[str, str]) -> dict[str, str]:
    """What a run made of each row; a row it dropped is empty."""
    kept = {r["id"]: r["text"] for r in map(json.loads, (output / "data" / source.name).open())}
    return {name: kept.get(name, "") for name in rows}


def remade(edits: list[dict[str, Any]], rows: dict[str, str], pick: Pick) -> dict[str, str]:
    """The rows with every edit chosen anew by `pick`."""
    out = dict(rows)
    for edit in sorted(edits, key=lambda e: (e["id"], -e["start"])):
        text = out[edit["id"]]
        new = pick(edit, edit["id"], f"{edit['segment']}")
        out[edit["id"]] = text[: edit["start"]] + new + text[edit["end"] :]
    return out


def _fusion(candidate: dict[str, Any]) -> float:
    """Its score; of one that was out before it was scored, the least."""
    found = candidate["fusion"]
    return float("-inf") if found is None else float(found)


def one_temperature(edit: dict[str, Any], row: str, segment: str) -> str:
    if edit["action"] != "rewrite":
        return str(edit["after"])
    fine = [c for c in edit["candidates"] if c["temperature"] == 1.0 and not c["reasons"]]
    return str(max(fine, key=_fusion)["text"] if fine else edit["before"])


def no_acceptance(edit: dict[str, Any], row: str, segment: str) -> str:
    found = edit["candidates"]
    return str(max(found, key=_fusion)["text"] if found else edit["before"])


def one_sample(edit: dict[str, Any], row: str, segment: str) -> str:
    """Candidates are kept best first: which of the two was drawn first is not known, so one at random."""
    found = [c for c in edit["candidates"] if c["temperature"] == 1.0]
    rng = np.random.default_rng(derive_seed(0, row, segment, "sample"))
    return str(found[int(rng.integers(len(found)))]["text"] if found else edit["before"])


def no_ranking(draw: int) -> Pick:
    def pick(edit: dict[str, Any], row: str, segment: str) -> str:
        fine = [c for c in edit["candidates"] if not c["reasons"]]
        if edit["action"] != "rewrite" or not fine:
            return str(edit["after"])
        rng = np.random.default_rng(derive_seed(draw, row, segment, "ranking"))
        return str(fine[int(rng.integers(len(fine)))]["text"])

    return pick


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/socd"))
    parser.add_argument("--corpora", default="hate,paradetox")
    parser.add_argument("--rows", type=int, default=300)
    args = parser.parse_args()
    from models import registry

    seen = {normalise(t) for t in held_out(args.data)}
    judge = Judge(args.data, leave_out=lambda text: normalise(text) in seen)
    encoder = registry.load("encoder", "minilm", threads=1)
    base = registry.load("lm", "smollm2", threads=1)
    figures: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for corpus in args.corpora.split(","):
        source = args.work / f"{corpus}-{args.rows}.jsonl"
        full = args.work / f"{corpus}-{args.rows}-logratio"
        rows = {row["id"]: row["text"] for row in map(json.loads, source.open())}
        found = pl.concat([pl.read_parquet(f) for f in sorted((full / "edits").rglob("*.parquet"))])
        edits = found.select(
            "id", "segment", "start", "end", "before", "after", "action", "candidates"
        ).to_dicts()
        made = {"logratio": run_texts(full, source, rows)}
        for name in RUNS:
            output = args.work / f"{corpus}-{args.rows}-{name}"
            if (output / "_SUCCESS").exists():
                made[name] = run_texts(output, source, rows)
        made["one-temperature"] = remade(edits, rows, one_temperature)
        made["no-acceptance"] = remade(edits, rows, no_acceptance)
        made["one-sample"] = remade(edits, rows, one_sample)
        made |= {f"no-ranking {d}": remade(edits, rows, no_ranking(d)) for d in range(DRAWS)}
        vectors = encoder.encode(list(rows.values()))
        values: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, texts in made.items():
            new = list(texts.values())
            similar = np.clip((encoder.encode([t or " " for t in new]) * vectors).sum(axis=1), -1, 1)
            values[name] = judge.score(new), np.where([bool(t.strip()) for t in new], similar, 0.0)
        draws = [values.pop(f"no-ranking {d}") for d in range(DRAWS)]
        values["no-ranking"] = tuple(np.mean([d[i] for d in draws], axis=0) for i in (0, 1))
        made["no-ranking"] = made["no-ranking 0"]
        facts: dict[str, Any] = {
            "rows": len(rows),
            "sentences": len(edits),
            "judge_before": _interval(judge.score(list(rows.values()))),
        }
        for name, (toxic, similar) in values.items():
            facts[name] = {
                "judge": _interval(toxic),
                "similarity": _interval(similar),
                "perplexity": _perplexity(base, [t for t in made[name].values() if t.strip()]),
                "changed_rows": sum(made[name][i] != rows[i] for i in rows),
            }
            if name != "logratio":
                facts[name]["judge_difference"] = _difference(toxic, values["logratio"][0])
                facts[name]["similarity_difference"] = _difference(similar, values["logratio"][1])
            print(
                corpus,
                name,
                {k: round(facts[name][k]["mean"], 3) for k in ("judge", "similarity", "perplexity")},
                flush=True,
            )
        figures[f"{corpus}-{args.rows}"] = facts
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
