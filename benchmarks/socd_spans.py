"""Contrastive decoding as a localiser of toxic words: character F1 beside the word list, occlusion, and mixes of them.

    python -m benchmarks.socd_spans --data ../shared/data --toxic-adapter ADAPTER [--posts 600]

Thresholds and the best mix are chosen on a sample of SemEval-2021 task 5's training posts, then measured once on its
trial posts (690). Every post is known to be toxic here, so all of its sentences are searched (`gate at 0.05` drops those
that the six-label classifier finds spotless, as benchmarks/detox_quality.py does). Forces are kept in `--work`, so that
a second run reads no text again. Figures go to benchmarks/results/socd_spans.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detox_quality import OPEN_TAU, Segmented, toxic_spans
from models import registry
from models.metrics.bootstrap import mean_interval
from transforms.detox.localize import LexiconLocalizer, OcclusionLocalizer, find_spans
from transforms.detox.socd_spans import join_words, word_forces
from transforms.detox.span_f1 import character_f1, offsets_of
from transforms.shards.cache import RequestCache

RESULTS = Path(__file__).resolve().parent / "results" / "socd_spans.json"
THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FIXED = ("lexicon", "occlusion")


class Posts:
    """Posts with their gold characters, and what every source finds in them."""

    def __init__(
        self, texts: Sequence[str], gold: Sequence[set[int]], model: Any, cache: RequestCache
    ) -> None:
        self.texts, self.gold = texts, gold
        self.cut = Segmented(texts)
        classifier = registry.load("scorer", "jigsaw-bilstm")
        self.scores = classifier.score(self.cut.segments)[:, 0]
        sources = {
            "lexicon": LexiconLocalizer(registry.load("scorer", "lexicon")),
            "occlusion": OcclusionLocalizer(classifier),
        }
        self.found = {
            name: [offsets_of(s) for s in find_spans(self.cut.segments, [x])] for name, x in sources.items()
        }
        self.forces = word_forces(model, self.cut.segments, cache)

    def socd(self, threshold: float) -> list[Sequence[int]]:
        """Characters of the words steered away from, of each segment."""
        return [
            offsets_of(join_words(text, words, forces, threshold, "socd"))
            for text, (words, forces) in zip(self.cut.segments, self.forces, strict=True)
        ]

    def f1(self, parts: Sequence[Sequence[Sequence[int]]], gate: float) -> np.ndarray:
        """Each post's F1 with the union of several sources."""
        predicted: list[set[int]] = [set() for _ in self.texts]
        for i in np.flatnonzero(self.scores >= gate):
            for part in parts:
                predicted[self.cut.owner[i]] |= {c + self.cut.start[i] for c in part[i]}
        return np.array([character_f1(p, g) for p, g in zip(predicted, self.gold, strict=True)])


def main() -> None:
    """Choose on training posts, measure on trial posts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--toxic-adapter", type=Path, required=True)
    parser.add_argument("--adapter", default="detox", help="the base side's; `none` for the plain model")
    parser.add_argument("--posts", type=int, default=600, help="training posts to choose on")
    parser.add_argument("--work", type=Path, default=Path("runs/socd-spans"))
    parser.add_argument("--name", default="socd", help="what to call these figures")
    args = parser.parse_args()
    adapter = {} if args.adapter == "none" else {"adapter": args.adapter}
    model = registry.load(
        "lm",
        "smollm2",
        threads=1,
        socd=(("mode", "logratio"),),
        toxic_adapter=str(args.toxic_adapter),
        **adapter,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    cache = RequestCache(str(args.work / "cache"))
    texts, gold = toxic_spans(args.data / "detox/tsd_train.csv")
    step = max(1, len(texts) // args.posts)
    train = Posts(texts[::step][: args.posts], gold[::step][: args.posts], model, cache)
    trial = Posts(*toxic_spans(args.data / "detox/tsd_trial.csv"), model, cache)
    facts: dict[str, Any] = {"chosen_on": len(train.texts), "measured_on": len(trial.texts)}
    for gate in (0.0, OPEN_TAU, 0.5):
        rows: dict[str, Any] = {}
        for count in range(len(FIXED) + 1):
            for others in itertools.combinations(FIXED, count):
                if others:
                    rows[" + ".join(others)] = _row(train, trial, others, None, gate)
                best = max(THRESHOLDS, key=lambda t, o=others: _f1(train, o, t, gate).mean())
                rows[" + ".join((*others, "socd"))] = _row(train, trial, others, best, gate)
        rows["best mix, chosen on training posts"] = max(rows, key=lambda name: rows[name]["train_f1"])
        facts[f"gate at {gate}"] = rows
    figures = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    figures[args.name] = facts
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


def _f1(posts: Posts, others: Sequence[str], threshold: float | None, gate: float) -> np.ndarray:
    parts = [posts.found[name] for name in others]
    return posts.f1(parts if threshold is None else [*parts, posts.socd(threshold)], gate)


def _row(
    train: Posts, trial: Posts, others: Sequence[str], threshold: float | None, gate: float
) -> dict[str, Any]:
    found = mean_interval(_f1(trial, others, threshold, gate))
    return {
        "train_f1": float(_f1(train, others, threshold, gate).mean()),
        "trial_f1": {"mean": found.mean, "low": found.low, "high": found.high},
        "threshold": threshold,
    }


if __name__ == "__main__":
    main()
