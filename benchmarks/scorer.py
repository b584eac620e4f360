"""A ranker and a tagger of one's own: the commands that train them, and how good they are.

    python -m benchmarks.scorer prepare   [--data ../shared/data] [--runs runs]
    python -m benchmarks.scorer train     the commands `prepare` prints
    python -m benchmarks.scorer measure

`measure` reads what training recorded, scores the same test texts with the embedded scorers, looks for false alarms among
sentences of medical abstracts, and marks the trial split of SemEval-2021 task 5 with the tagger, alone and united with
the lexicon and with occlusion.

`prepare` writes three labelled sets: the development split of DGHS (dynamically generated hate: adversarial, half of it
harmless, the hard part), Davidson's tweets (hate or offensive against neither; of the many offensive ones a quarter is
taken by a hash of the text, so that the classes balance), and sentences of tsd_train with and without a marked insult. All
training jobs hold their test texts out by themselves, by a hash of the text. Figures go to
`benchmarks/results/scorer.json`; texts are read only, and stay in `runs/`, which git ignores.
"""

from __future__ import annotations

import argparse
import csv
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detox_quality import medical_abstracts, toxic_spans
from models import registry
from models.metrics.bootstrap import paired_difference, share_interval
from models.metrics.spans import character_f1, offsets_of
from models.training.calibration import label_figures
from models.training.labelled import TEST, side_of, split_key
from models.training.tagger_session import span_figures
from schemas.fingerprint import digest
from transforms.detox.localize import LexiconLocalizer, OcclusionLocalizer, find_spans
from transforms.detox.segment import segment_spans
from transforms.detox.tagger_spans import TaggerLocalizer

RESULTS = Path(__file__).resolve().parent / "results" / "scorer.json"
ROOT = Path(__file__).resolve().parents[1]
OFFENSIVE_SHARE = 0.25
HARMLESS_SHARE = 0.5  # of the sentences without a span, which are many
FEWEST_WORDS = 3
EMBEDDED = ("jigsaw-bilstm", "linear", "lexicon")
CLEAN_DOCUMENTS = 100
_RETWEET = re.compile(r"^[!\s\"“]*(?:RT\s+)?(?:@\w+:?\s*)*", re.I)
_USER, _LINK = re.compile(r"@\w+"), re.compile(r"https?://\S+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("prepare", "train", "measure"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--which", nargs="+", choices=("ranker", "tagger"), default=["ranker", "tagger"])
    args = parser.parse_args()
    if not args.data.exists():
        sys.exit(f"{args.data}: the development data are not here; pass --data")
    if args.part == "prepare":
        for name, rows in (
            ("dghs", dghs(args.data)),
            ("davidson", davidson(args.data)),
            ("insults", insults(args.data)),
        ):
            path = args.runs / "scorer-data" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            print(f"{path}: {len(rows):,} texts, {sum(r['label'] == 'toxic' for r in rows):,} toxic")
    if args.part == "measure":
        results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
        if "ranker" in args.which:
            results["ranker"] = {**measure_ranker(args.runs), "clean": measure_clean(args.runs, args.data)}
            results["wide"] = training_figures(args.runs / "scorer-wide")
        if "tagger" in args.which:
            results["tagger"] = measure_tagger(args.runs, args.data)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results, indent=1))
    else:
        for command in commands(args.runs, args.data):
            print(" ".join(command))
            if args.part == "train":
                subprocess.run([sys.executable, "-m", "pipelines.cli", *command[1:]], check=True)


def commands(runs: Path, data: Path) -> list[list[str]]:
    """The three training commands: the ranker, the ranker trained on with everyday insults, the tagger."""
    sets = runs / "scorer-data"
    return [
        [
            "tamis", "train", "scorer", f"{sets}/dghs.jsonl,weight=4", f"{sets}/davidson.jsonl", "--label-column", "label",
            "--positive", "toxic", "--training-data", "dghs-dev+davidson", "--epochs", "2", "--max-length", "128",
            "--precision", "bfloat16", "--threads", "1", "--output", f"{runs}/scorer-dghs",
        ],
        [
            "tamis", "train", "scorer", f"{sets}/dghs.jsonl,weight=0.6", f"{sets}/davidson.jsonl,weight=0.2",
            f"{sets}/insults.jsonl,weight=0.4", "--model", f"{runs}/scorer-dghs", "--label-column", "label", "--positive",
            "toxic", "--training-data", "dghs-dev+davidson+semeval-2021-task5-train", "--epochs", "1", "--max-length", "128",
            "--precision", "bfloat16", "--threads", "1", "--output", f"{runs}/scorer-wide",
        ],
        [
            "tamis", "train", "spans", f"{data}/detox/tsd_train.csv", "--training-data", "semeval-2021-task5-train",
            "--epochs", "3", "--precision", "bfloat16", "--threads", "1", "--output", f"{runs}/tagger-tsd",
        ],
    ]  # fmt: skip


def dghs(data: Path) -> list[dict[str, Any]]:
    """DGHS development split: `hate` is toxic."""
    with (data / "detox/dghs_dev_both_labels.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{"text": r["text"], "label": "toxic" if r["label"] == "hate" else "harmless"} for r in rows]


def davidson(data: Path) -> list[dict[str, Any]]:
    """Davidson's tweets without what marks them as tweets; a quarter of the offensive ones."""
    with (data / "detox/davidson_labeled.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    out = []
    for row in rows:
        text = clean_tweet(row["tweet"])
        place = int.from_bytes(digest("offensive", text)[:8], "little") / 2**64
        if text and (row["class"] != "1" or place < OFFENSIVE_SHARE):
            out.append({"text": text, "label": "harmless" if row["class"] == "2" else "toxic"})
    return out


def training_figures(folder: Path) -> dict[str, Any]:
    """What training a scorer recorded."""
    record = json.loads((folder / "train.json").read_text("utf-8"))
    keys = ("train_loss", "tokens_seen", "tokens_per_second", "seconds", "calibration", "test")
    out = {key: record["results"][key] for key in keys}
    return {**out, "run": record["run"], "data": record["data"]["counts"]}


def measure_ranker(runs: Path) -> dict[str, Any]:
    """What training recorded, and the embedded scorers on the very same test texts."""
    out = {**training_figures(runs / "scorer-dghs"), "others": {}}
    fraction = out["run"]["settings"]["eval_fraction"]
    for name in ("dghs", "davidson", "insults"):
        lines = (runs / "scorer-data" / f"{name}.jsonl").read_text("utf-8").splitlines()
        rows = [r for r in map(json.loads, lines) if side_of(split_key(r["text"]), fraction) == TEST]
        truth = np.array([r["label"] == "toxic" for r in rows], float)
        names = (f"hf:{runs}/scorer-dghs", f"hf:{runs}/scorer-wide", *EMBEDDED)
        for scorer in names if name == "insults" else EMBEDDED:
            score = registry.load("scorer", scorer).score([r["text"] for r in rows])[:, 0].astype(float)
            logits = np.log(np.clip(score, 1e-7, 1 - 1e-7) / np.clip(1 - score, 1e-7, 1))
            out["others"].setdefault(scorer.rpartition("/")[2], {})[name] = label_figures(
                logits, logits, truth
            )
    return out


def measure_clean(runs: Path, data: Path) -> dict[str, Any]:
    """False alarms on sentences of medical abstracts, in which nothing is toxic."""
    texts = medical_abstracts(data)[:CLEAN_DOCUMENTS]
    sentences = [text[a:b] for text in texts for a, b in segment_spans(text)]
    out: dict[str, Any] = {"documents": len(texts), "sentences": len(sentences)}
    for name in (f"hf:{runs}/scorer-dghs", f"hf:{runs}/scorer-wide", *EMBEDDED):
        score = registry.load("scorer", name).score(sentences)[:, 0]
        interval = share_interval((score >= 0.5).astype(float))
        out[name.rpartition("/")[2]] = interval.as_dict()
    return out


def measure_tagger(runs: Path, data: Path) -> dict[str, Any]:
    """Character F1 on tsd_trial, which no training saw: the tagger alone, and what uniting it with others changes."""
    record = json.loads((runs / "tagger-tsd" / "train.json").read_text("utf-8"))
    tagger = TaggerLocalizer(registry.load("tagger", f"hf:{runs}/tagger-tsd"))
    lexicon = LexiconLocalizer(registry.load("scorer", "lexicon"))
    occlusion = OcclusionLocalizer(registry.load("scorer", "jigsaw-bilstm"))
    posts, gold = toxic_spans(data / "detox/tsd_trial.csv")
    keys = ("train_loss", "tokens_seen", "tokens_per_second", "seconds", "decoding", "test")
    out: dict[str, Any] = {key: record["results"][key] for key in keys}
    out.update({"run": record["run"], "data": record["data"]["counts"], "trial": {}})
    systems: dict[str, list[Any]] = {
        "tagger": [tagger],
        "lexicon": [lexicon],
        "occlusion": [occlusion],
        "lexicon + occlusion": [lexicon, occlusion],
        "tagger + lexicon": [tagger, lexicon],
        "tagger + occlusion": [tagger, occlusion],
    }
    each: dict[str, list[float]] = {}
    for name, localizers in systems.items():
        found = [offsets_of(spans) for spans in find_spans(posts, localizers)]
        out["trial"][name] = span_figures(found, [frozenset(g) for g in gold])
        each[name] = [character_f1(p, g) for p, g in zip(found, gold, strict=True)]
    base = each["lexicon + occlusion"]
    out["against lexicon + occlusion"] = paired_difference(each["tagger"], base).as_dict()
    return out


def insults(data: Path) -> list[dict[str, Any]]:
    """Sentences of tsd_train: toxic where a marked span lies in them, harmless (half of these) where none does.

    Posts without any span are left out: they are toxic, but nobody could say where.
    """
    out = []
    for post, gold in zip(*toxic_spans(data / "detox/tsd_train.csv"), strict=True):
        for start, end in segment_spans(post) if gold else ():
            text = post[start:end].strip()
            toxic = not gold.isdisjoint(range(start, end))
            place = int.from_bytes(digest("harmless", text)[:8], "little") / 2**64
            if len(text.split()) >= FEWEST_WORDS and (toxic or place < HARMLESS_SHARE):
                out.append({"text": text, "label": "toxic" if toxic else "harmless"})
    return out


def clean_tweet(text: str) -> str:
    """A tweet's own words: entities resolved, retweet marks, names and links taken out."""
    text = _RETWEET.sub("", html.unescape(html.unescape(text)))
    return re.sub(r"\s+", " ", _LINK.sub("", _USER.sub("", text))).strip()


if __name__ == "__main__":
    main()
