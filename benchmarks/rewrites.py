"""Rewriting systems on 1,000 held-out rows of ParaDetox: STA, SIM, FL and J, with the commands that make them.

    python -m benchmarks.rewrites prepare [--data ../shared/data] [--work runs/rewrites]
    python -m benchmarks.rewrites fluency [--work runs/rewrites]
    python -m benchmarks.rewrites judge   [--work runs/rewrites]
    python -m benchmarks.rewrites measure [--work runs/rewrites] [--judge NAME] [--system NAME=OUT ...] [--common]
    python -m benchmarks.rewrites steps   --run OUT [--judge NAME]      what each step adds, from the candidates a run recorded
    python -m benchmarks.rewrites table

`prepare` writes the rows the rewriter's adapter never saw, neither in training nor when runs were chosen between (the
split of `benchmarks/adapter.py`, by a hash of the toxic text), and the other rows' sentences for the fluency model.
`fluency` fits that (written into the package), `judge` fits character n-gram judges on DGHS, Davidson's tweets and (one of
them) ParaDetox's training rows, which share neither data nor features with the job's ranker. A run to be measured is made from the prepared rows:

    tamis detox WORK/held_out.parquet --text-column toxic --output OUT [...]

`measure` is `tamis eval rewrites` over these rows; its figures go to `benchmarks/results/rewrites.json`, one entry a
judge. Texts stay in WORK, which is not part of the repository.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.adapter import split_rows
from benchmarks.socd_ablation import one_sample, remade

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rewrites.json"
NEUTRAL = ("neutral1", "neutral2", "neutral3")
JUDGES = {  # name -> with ParaDetox's training rows?
    "ngram-dghs-davidson-paradetox": True,
    "ngram-dghs-davidson": False,
}
MIXTURE = 2400  # sentences the mixture with surprisal is fitted on
PENALTY = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("prepare", "fluency", "judge", "measure", "steps", "table"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rewrites")
    parser.add_argument("--judge", default="")
    parser.add_argument(
        "--allow-shared-judge", action="store_true", help="`linear` learnt from what the ranker did"
    )
    parser.add_argument("--system", action="append", default=[], metavar="NAME=OUT")
    parser.add_argument("--run", type=Path, help="steps: a detox output over the prepared rows")
    parser.add_argument("--common", action="store_true", help="only rows every system was run on")
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--against", default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part == "prepare":
        prepare(args.data, args.work)
    elif args.part == "fluency":
        keep(args.results, "fluency", fit_fluency(args.work))
    elif args.part == "judge":
        fit_judges(args.data, args.work)
    elif args.part == "measure":
        measure(args)
    elif args.part == "steps":
        steps(args)
    else:
        print(tables(json.loads(args.results.read_text())))


def prepare(data: Path, work: Path) -> None:
    """Write `held_out.parquet` and `sentences.parquet`."""
    path = data / "detox" / "paradetox_dev.tsv"
    if not path.exists():
        sys.exit(f"{path}: the development data are not here; pass --data")
    with path.open(encoding="utf-8", newline="") as stream:
        dealt = split_rows(list(csv.DictReader(stream, delimiter="\t")))
    held = dealt["held_out"]
    columns = {"id": [f"p{i}" for i in range(len(held))], "toxic": [r["toxic"] for r in held]}
    columns |= {name: [r[name] or None for r in held] for name in NEUTRAL}
    pq.write_table(pa.table(columns), work / "held_out.parquet")
    others = {name: _sentences(dealt[name]) for name in ("train", "choose")}
    table = {
        "text": [t for texts in others.values() for t in texts],
        "split": [name for name, texts in others.items() for _ in texts],
    }
    pq.write_table(pa.table(table), work / "sentences.parquet")
    domain = {
        "text": [r["toxic"] for r in dealt["train"]] + others["train"],
        "class": ["toxic"] * len(dealt["train"]) + ["neutral"] * len(others["train"]),
    }
    pq.write_table(pa.table(domain), work / "domain.parquet")
    print(f"{len(held):,} held-out rows, {len(table['text']):,} sentences of other rows in {work}")


def _sentences(rows: list[dict[str, str]]) -> list[str]:
    return [r[name].strip() for r in rows for name in NEUTRAL if (r[name] or "").strip()]


def fit_fluency(work: Path) -> dict[str, Any]:
    """Fit what `--fluency lm:smollm2` and `--fluency ngram` use, and write both into the package.

    The word classes are fitted on most sentences of the training rows, the mixture with surprisal on 2,400 others;
    thresholds and quality come from the rows that chose between runs, none of which is among the held-out rows.
    """
    from models import registry
    from models.metrics.acceptability import fit_acceptability, surprisal_features
    from models.scorers import fluency
    from pipelines.evaluation.fluency import SHIPPED, fit_to
    from pipelines.evaluation.progress import counting
    from transforms.evaluation.corruptions import corrupt
    from transforms.evaluation.likelihood import surprisals_cached
    from transforms.shards.cache import RequestCache

    sentences = pq.read_table(work / "sentences.parquet")
    rows, split = sentences.column("text").to_pylist(), sentences.column("split").to_pylist()
    train = [t for t, s in zip(rows, split, strict=True) if s == "train"]
    choose = [t for t, s in zip(rows, split, strict=True) if s == "choose"]
    pool = sorted({w for t in train[:3000] for w in re.findall(r"[a-zA-Z']+", t)})
    random.Random(0).shuffle(train)
    mixture = train[:MIXTURE]
    seen = {*mixture, *choose}
    classes = [t for t in dict.fromkeys(train) if t not in seen]

    def break_all(texts: list[str], seeds: tuple[int, ...] = (0,)) -> list[str]:
        return [b[0] for t in texts for seed in seeds if (b := corrupt(t, seed, pool))]

    held = (choose, break_all(choose))
    scorer = fluency.fit_fluency(
        classes,
        break_all(classes, (1, 2)),
        held_whole=held[0],
        held_broken=held[1],
        inverse_penalty=PENALTY,
        training_data="paradetox-neutral",
    )
    scorer.save(fluency.SHIPPED)
    model = registry.load("lm", "smollm2", threads=1)
    cache, broken = RequestCache(str(work / "cache")), break_all(mixture)
    with counting("sentences scored", 2 * (len(mixture) + len(choose))) as tell:
        fitted = fit_to(
            model,
            mixture,
            broken,
            held=held,
            cache=cache,
            source="ParaDetox (CC0), neutral sides of training rows",
            tell=tell,
        )
    fitted.save(SHIPPED)

    def shapes(texts: list[str]) -> Any:
        return surprisal_features(
            surprisals_cached(model, [f"{' '.join(t.split())}\n" for t in texts], cache)
        )

    alone = fit_acceptability(
        shapes(mixture), shapes(broken), held_whole=shapes(held[0]), held_broken=shapes(held[1])
    )
    figures = {
        "ngram": scorer.weights.quality,
        "lm:smollm2": fitted.quality,
        "surprisal alone": alone.quality,
    }
    print(json.dumps(figures, indent=1))
    return figures


def fit_judges(data: Path, work: Path) -> None:
    """Fit the judges by the command a user would type.

    The second knows hate and tweets only, and does not know this domain (its STA of people's rewrites says how well);
    the first has also seen both sides of ParaDetox's training rows, none of them held out here.
    """
    from pipelines.cli import main as tamis

    detox = data / "detox"
    sets = [
        f"{detox / 'dghs_dev_both_labels.csv'},label=label,positive=hate",
        f"{detox / 'davidson_labeled.csv'},text=tweet,label=class,positive=0+1",
    ]
    for name, domain in JUDGES.items():
        more = [f"{work / 'domain.parquet'},label=class,positive=toxic"] if domain else []
        tag = "dghs+davidson+paradetox" if domain else "dghs+davidson"
        try:
            tamis(["train", "ngram", *sets, *more, "-o", str(work / name), "--training-data", tag])
        except SystemExit as stopped:
            if stopped.code:
                raise


def measure(args: argparse.Namespace, part: str = "") -> None:
    """Run the evaluation and keep its figures."""
    from pipelines.eval_rewrites import RewritesEvalConfig, print_result, run

    judge = args.judge or f"ngram:{args.work / next(iter(JUDGES))}"
    short = Path(judge.partition(":")[2]).name or judge
    config = RewritesEvalConfig(
        inputs=(str(args.work / "held_out.parquet"),),
        output=str(args.work / f"eval{part and '-' + part}-{short}"),
        source="toxic",
        id_column="id",
        systems=dict(item.split("=", 1) for item in args.system),
        references=NEUTRAL,
        judge=judge,
        allow_shared_judge=args.allow_shared_judge,
        against=args.against,
        common=args.common,
        limit=args.limit,
        cache=str(args.work / "cache"),
        progress="plain",
    )
    result = run(config)
    print_result(result)
    name = f"{part and part + ': '}{short}, {result.rows} rows"
    keep(args.results, name, _without_places(result.record, args.work))


def steps(args: argparse.Namespace) -> None:
    """What the candidates a run recorded give without the steps that choose among them, beside the run itself."""
    edits = pl.concat(
        [pl.read_parquet(f) for f in sorted((args.run / "edits").rglob("*.parquet"))]
    ).to_dicts()
    kept = pl.concat([pl.read_parquet(f) for f in sorted((args.run / "data").rglob("*.parquet"))])
    source = pl.read_parquet(json.loads((args.run / "_tamis" / "job.json").read_text())["source"])
    rows = dict(source.select("id", "toxic").iter_rows())
    rows = {name: text for name, text in rows.items() if text}
    after = dict(kept.select("id", "toxic").iter_rows())
    for name, pick in STEPS.items():
        texts = remade(edits, rows, pick)
        place = args.work / f"steps-{name}.parquet"
        pl.DataFrame({"id": list(texts), "text": list(texts.values())}).write_parquet(place)
        args.system.append(f"{name}={place}")
    place = args.work / "steps-as-run.parquet"
    pl.DataFrame({"id": list(rows), "text": [after.get(name, "") for name in rows]}).write_parquet(place)
    args.system.append(f"as-run={place}")
    args.against, args.common = "as-run", True
    measure(args, "steps")


def _papers_rank(candidate: dict[str, Any]) -> float:
    """The paper's fusion score of a candidate; of one that was not measured, the least."""
    if candidate["toxicity"] is None or candidate["similarity"] is None:
        return float("-inf")
    return 0.5 * float(candidate["similarity"]) - 0.5 * float(candidate["toxicity"])


def _best(edit: dict[str, Any], found: list[dict[str, Any]]) -> str:
    return str(max(found, key=_papers_rank)["text"] if found else edit["before"])


def _two(edit: dict[str, Any], row: str, segment: str) -> str:
    return _best(edit, [c for c in edit["candidates"] if c["temperature"] == 1.0])


def _ten(edit: dict[str, Any], row: str, segment: str) -> str:
    return _best(edit, edit["candidates"])


def _checked(edit: dict[str, Any], row: str, segment: str) -> str:
    fine = [c for c in edit["candidates"] if not c["reasons"]]
    return _best(edit, fine) if edit["action"] == "rewrite" and fine else str(edit["after"])


# Each takes the one before a step further; the run itself also ranks by fluency.
STEPS = {
    "one-sample": one_sample,
    "best-of-2": _two,
    "best-of-10": _ten,
    "conditions-and-ladder": _checked,
}


def keep(path: Path, name: str, figures: dict[str, Any]) -> None:
    """Put figures beside what is there."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found[name] = figures
    path.write_text(json.dumps(found, indent=1) + "\n")


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown, one table a judge and set of rows, best J first."""
    out = []
    for name, record in found.items():
        if "systems" not in record:
            continue
        against = record["against"]
        lines = [
            f"**Judge {name}**",
            "",
            f"| system | J | STA | SIM | FL | chrF | BLEU | facts | empty | J against {against} |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for system, x in sorted(record["systems"].items(), key=lambda item: -item[1]["J"]["mean"]):
            change = record["changes"].get(system)
            delta = "" if change is None else _signed(change["J"]) + f", p {change['J_p_value_holm']:.3f}"
            j = x["J"]
            cells = [
                system,
                f"**{j['mean']:.3f}** ({j['low']:.3f} to {j['high']:.3f})",
                *(f"{x[k]['mean']:.3f}" for k in ("STA", "SIM", "FL")),
                *("–" if x[k] is None else f"{x[k]['mean']:.1f}" for k in ("chrf", "bleu")),
                f"{x['facts_kept']['mean']:.3f}",
                f"{x['empty']:.3f}",
                delta,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        out.append("\n".join(lines))
    return "\n\n".join(out)


def _signed(change: dict[str, Any]) -> str:
    d = change["difference"]
    return f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"


def _without_places(record: dict[str, Any], work: Path) -> dict[str, Any]:
    """The figures without folders of the machine they were made on."""
    text = json.dumps(record)
    for place in (str(work.resolve()), str(work), str(ROOT)):
        text = text.replace(place, "WORK")
    return dict(json.loads(text))


if __name__ == "__main__":
    main()
