"""A ranker and a tagger of one's own: the commands that train them, and how good they are.

    python -m benchmarks.scorer prepare   [--data ../shared/data] [--runs runs]
    python -m benchmarks.scorer train     the commands `prepare` prints
    python -m benchmarks.scorer measure

`prepare` writes two labelled sets: the development split of DGHS (dynamically generated hate: adversarial, half of it
harmless, the hard part) and Davidson's tweets (hate or offensive against neither), of whose many offensive tweets a
quarter is taken by a hash of the text, so that the classes balance. DGHS counts four times in an epoch. Both training
jobs hold their test texts out by themselves, by a hash of the text. Figures go to `benchmarks/results/scorer.json`;
texts are read only, and stay in `runs/`, which git ignores.
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

from schemas.fingerprint import digest

RESULTS = Path(__file__).resolve().parent / "results" / "scorer.json"
ROOT = Path(__file__).resolve().parents[1]
OFFENSIVE_SHARE = 0.25
_RETWEET = re.compile(r"^[!\s\"“]*(?:RT\s+)?(?:@\w+:?\s*)*", re.I)
_USER, _LINK = re.compile(r"@\w+"), re.compile(r"https?://\S+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("prepare", "train", "measure"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    if args.part != "measure" and not args.data.exists():
        sys.exit(f"{args.data}: the development data are not here; pass --data")
    if args.part == "prepare":
        for name, rows in (("dghs", dghs(args.data)), ("davidson", davidson(args.data))):
            path = args.runs / "scorer-data" / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            print(f"{path}: {len(rows):,} texts, {sum(r['label'] == 'toxic' for r in rows):,} toxic")
    if args.part in ("prepare", "train"):
        for command in commands(args.runs, args.data):
            print(" ".join(command))
            if args.part == "train":
                subprocess.run([sys.executable, "-m", "pipelines.cli", *command[1:]], check=True)


def commands(runs: Path, data: Path) -> list[list[str]]:
    """The two training commands."""
    sets = runs / "scorer-data"
    return [
        [
            "tamis", "train", "scorer", f"{sets}/dghs.jsonl,weight=4", f"{sets}/davidson.jsonl", "--label-column", "label",
            "--positive", "toxic", "--training-data", "dghs-dev+davidson", "--epochs", "2", "--max-length", "128",
            "--precision", "bfloat16", "--threads", "1", "--output", f"{runs}/scorer-dghs",
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


def clean_tweet(text: str) -> str:
    """A tweet's own words: entities resolved, retweet marks, names and links taken out."""
    text = _RETWEET.sub("", html.unescape(html.unescape(text)))
    return re.sub(r"\s+", " ", _LINK.sub("", _USER.sub("", text))).strip()


if __name__ == "__main__":
    main()
