"""How good the parts of the detox job are, each on real labelled text: gate, spans, acceptance conditions.

    python benchmarks/detox_quality.py [--data ../shared/data] [--part gate spans conditions]

- `gate`: precision, recall and F1 of each stage and of the cascade, by text (a text is flagged if a segment is), on
  the DGHS development split, the Davidson tweets and ParaDetox (toxic sides against neutral sides); the share of
  segments that reach the classifier; what a cheap stage hides from it; and false alarms on medical abstracts.
- `spans`: SemEval-2021 task 5 character F1 on tsd_trial, for lexicon, occlusion and their union: with the gate at its
  default, as the job finds them, and with it almost open, as fits posts that are known to be toxic. Settings were
  chosen on tsd_train.
- `conditions`: how often each hard condition refuses a human rewrite (ParaDetox), and lets a mismatched one pass.

Intervals are 95 % bootstrap intervals over texts (1,000 resamples, fixed seed). Figures go to
`benchmarks/results/detox_quality.json`; texts are read only, and none is written.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import random
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models import registry
from transforms.detox.checks import CHECKS, Source, Trial, failed_conditions
from transforms.detox.gate import judge
from transforms.detox.localize import LexiconLocalizer, OcclusionLocalizer, find_spans
from transforms.detox.options import ACCEPT_DEFAULTS, GATE_DEFAULTS, LOCALIZE_DEFAULTS, GateOptions
from transforms.detox.segment import segment_spans
from transforms.detox.span_f1 import character_f1, offsets_of
from transforms.requests import similarity_cached

RESULTS = Path(__file__).resolve().parent / "results"
SCORERS = ("lexicon", "linear", "jigsaw-bilstm")
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
OPEN_TAU = 0.05  # the gate for posts known to be toxic
REWRITES = 1500
CLEAN_DOCUMENTS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS / "detox_quality.json")
    args = parser.parse_args()
    if not args.data.exists():
        sys.exit(f"{args.data}: the development data are not here; pass --data")
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    results["models"] = {name: registry.describe("scorer", name).tag for name in SCORERS}
    results["models"]["minilm"] = registry.describe("encoder", "minilm").tag
    for part in args.part:
        started = time.perf_counter()
        results[part] = PARTS[part](args.data)
        results[part]["seconds"] = round(time.perf_counter() - started, 1)
        print(f"\n== {part}\n{json.dumps(results[part], indent=1)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


def measure_gate(data: Path) -> dict[str, Any]:
    out: dict[str, Any] = {"tau": GATE_DEFAULTS.tau, "linear_pass": GATE_DEFAULTS.linear_pass}
    for name, (texts, labels) in gate_sets(data).items():
        cut = Segmented(texts)
        lexicon, linear, classifier = (registry.load("scorer", s) for s in SCORERS)
        everything = judge(
            cut.segments,
            classifier=classifier,
            lexicon=lexicon,
            linear=linear,
            options=GateOptions(gate="all"),
        )
        cascade = judge(cut.segments, classifier=classifier, lexicon=lexicon, linear=linear)
        assert everything.lexicon is not None and everything.linear is not None
        scores = {
            "lexicon": cut.maximum(everything.lexicon),
            "linear": cut.maximum(everything.linear),
            "jigsaw-bilstm": cut.maximum(everything.score),
            "cascade": cut.maximum(np.where(cascade.reached, cascade.score, 0)),
        }
        found = everything.flagged
        out[name] = {
            "texts": len(texts),
            "toxic": int(labels.sum()),
            "segments": len(cut.segments),
            "reached": round(float(cascade.reached.mean()), 4),
            "flagged_segments_the_cascade_keeps": round(float(cascade.flagged[found].mean()), 4),
        }
        out[name].update({stage: stage_row(score, labels) for stage, score in scores.items()})
        out[name]["cascade"]["by_tau"] = {
            str(tau): {
                "precision": round(ratio(labels & (scores["cascade"] >= tau), scores["cascade"] >= tau), 4),
                "recall": round(ratio(labels & (scores["cascade"] >= tau), labels), 4),
            }
            for tau in TAUS
        }
    out["clean"] = measure_clean(data)
    return out


def stage_row(score: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What one stage alone finds at the gate's threshold."""
    flagged, n = score >= GATE_DEFAULTS.tau, len(labels)
    return {
        **confusion(flagged, labels),
        "precision": interval(lambda i: ratio(labels[i] & flagged[i], flagged[i]), n),
        "recall": interval(lambda i: ratio(labels[i] & flagged[i], labels[i]), n),
        "f1": interval(lambda i: f1(flagged[i], labels[i]), n),
        "auc": interval(lambda i: auc(score[i], labels[i]), n, resamples=200),
    }


def measure_clean(data: Path) -> dict[str, Any]:
    """False alarms on abstracts of medical papers, in which nothing is toxic."""
    cut = Segmented(medical_abstracts(data)[:CLEAN_DOCUMENTS])
    lexicon, linear, classifier = (registry.load("scorer", s) for s in SCORERS)
    verdicts = judge(cut.segments, classifier=classifier, lexicon=lexicon, linear=linear)
    return {
        "documents": len(cut.owner_count),
        "segments": len(cut.segments),
        "reached": round(float(verdicts.reached.mean()), 4),
        "flagged": int(verdicts.flagged.sum()),
        "share_flagged": interval(lambda i: float(verdicts.flagged[i].mean()), len(cut.segments)),
    }


def measure_spans(data: Path) -> dict[str, Any]:
    posts, gold = toxic_spans(data / "detox/tsd_trial.csv")
    lexicon, classifier = registry.load("scorer", "lexicon"), registry.load("scorer", "jigsaw-bilstm")
    cut = Segmented(posts)
    scores = classifier.score(cut.segments)[:, 0]
    words = LexiconLocalizer(lexicon)
    occlusion = OcclusionLocalizer(
        classifier,
        min_drop=LOCALIZE_DEFAULTS.min_drop,
        residual=GATE_DEFAULTS.tau,
        window_words=LOCALIZE_DEFAULTS.window_words,
        long_words=LOCALIZE_DEFAULTS.long_words,
    )
    out: dict[str, Any] = {"posts": len(posts), "without_gold_spans": sum(not g for g in gold)}
    for name, localizers in (("lexicon", [words]), ("occlusion", [occlusion]), ("union", [words, occlusion])):
        found = [offsets_of(spans) for spans in find_spans(cut.segments, localizers)]
        for tau in (GATE_DEFAULTS.tau, OPEN_TAU):
            predicted: list[set[int]] = [set() for _ in posts]
            for i in np.flatnonzero(scores >= tau):
                predicted[cut.owner[i]] |= {c + cut.start[i] for c in found[i]}
            each = np.array([character_f1(p, g) for p, g in zip(predicted, gold, strict=True)])
            shared = sum(len(p & g) for p, g in zip(predicted, gold, strict=True))
            out[f"{name}, gate at {tau}"] = {
                "f1": interval(lambda i, e=each: float(e[i].mean()), len(posts)),
                "character_precision": round(shared / max(1, sum(map(len, predicted))), 4),
                "character_recall": round(shared / sum(map(len, gold)), 4),
                "posts_without_a_span": sum(not p for p in predicted),
            }
    nothing = np.array([character_f1([], g) for g in gold])
    everything = np.array([character_f1(range(len(p)), g) for p, g in zip(posts, gold, strict=True)])
    out["baselines"] = {
        "nothing": round(float(nothing.mean()), 4),
        "everything": round(float(everything.mean()), 4),
    }
    return out


def measure_conditions(data: Path) -> dict[str, Any]:
    pairs = paradetox(data)
    random.Random(1).shuffle(pairs)
    pairs = pairs[:REWRITES]
    sources, rewrites = [a for a, _ in pairs], [b for _, b in pairs]
    mismatched = rewrites[1:] + rewrites[:1]
    lexicon, classifier = registry.load("scorer", "lexicon"), registry.load("scorer", "jigsaw-bilstm")
    encoder = registry.load("encoder", "minilm")
    spans = find_spans(sources, [LexiconLocalizer(lexicon), OcclusionLocalizer(classifier)])
    before = classifier.score(sources)[:, 0]
    out: dict[str, Any] = {"pairs": len(pairs), "min_similarity": ACCEPT_DEFAULTS.min_similarity}
    for name, texts in (("human", rewrites), ("mismatched", mismatched)):
        after = classifier.score(texts)[:, 0]
        cosines = similarity_cached(encoder, list(zip(sources, texts, strict=True)), None)
        listed = lexicon.score(texts)[:, 0]
        failed = []
        for i, text in enumerate(texts):
            source = Source(sources[i], float(before[i]), tuple((s.start, s.end) for s in spans[i]))
            trial = Trial(text, float(after[i]), float(cosines[i]), listed=float(listed[i]))
            failed.append(failed_conditions(source, trial, ACCEPT_DEFAULTS))
        passed = np.array([not f for f in failed])
        kept = np.array([not set(f) - {"still_toxic", "not_less_toxic"} for f in failed])
        out[name] = {
            "passed": interval(lambda i, p=passed: float(p[i].mean()), len(texts)),
            "passed_all_but_toxicity": interval(lambda i, k=kept: float(k[i].mean()), len(texts)),
            "refused_for": {
                reason: round(n / len(texts), 4)
                for reason, n in Counter(r for f in failed for r in f).most_common()
            },
            "similarity_quantiles": {
                str(q): round(float(np.quantile(cosines, q)), 3)
                for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
            },
        }
    out["conditions"] = list(CHECKS)
    return out


class Segmented:
    """Texts cut into segments, flat, as the job cuts them."""

    def __init__(self, texts: Sequence[str]) -> None:
        places = [(row, a, b) for row, text in enumerate(texts) for a, b in segment_spans(text)]
        self.segments = [texts[row][a:b] for row, a, b in places]
        self.owner = np.array([row for row, _, _ in places])
        self.start = [a for _, a, _ in places]
        self.owner_count = range(len(texts))

    def maximum(self, values: np.ndarray) -> np.ndarray:
        """Maximum over the segments of each text."""
        out = np.zeros(len(self.owner_count), np.float32)
        np.maximum.at(out, self.owner, values)
        return out


def gate_sets(data: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    dghs = rows(data / "detox/dghs_dev_both_labels.csv")
    davidson = rows(data / "detox/davidson_labeled.csv")
    pairs = paradetox(data)
    return {
        "dghs_dev": ([r["text"] for r in dghs], np.array([r["label"] == "hate" for r in dghs])),
        "davidson": ([r["tweet"] for r in davidson], np.array([r["class"] != "2" for r in davidson])),
        "paradetox": (
            [a for a, _ in pairs] + [b for _, b in pairs],
            np.array([True] * len(pairs) + [False] * len(pairs)),
        ),
    }


def rows(path: Path, delimiter: str = ",") -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def paradetox(data: Path) -> list[tuple[str, str]]:
    return [
        (r["toxic"], r["neutral1"]) for r in rows(data / "detox/paradetox_dev.tsv", "\t") if r["neutral1"]
    ]


def toxic_spans(path: Path) -> tuple[list[str], list[set[int]]]:
    table = rows(path)
    return [r["text"] for r in table], [set(ast.literal_eval(r["spans"])) for r in table]


def medical_abstracts(data: Path) -> list[str]:
    with zipfile.ZipFile(data / "retrieval/cocktail_nfcorpus.zip") as archive:
        name = next(n for n in archive.namelist() if n.endswith("human.jsonl"))
        return [json.loads(line)["text"] for line in archive.read(name).decode().splitlines()]


def interval(
    statistic: Callable[[np.ndarray], float], n: int, *, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """A statistic of n texts (given by their indices) with its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {
        "value": round(statistic(np.arange(n)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }


def confusion(flagged: np.ndarray, labels: np.ndarray) -> dict[str, int]:
    return {
        "true_positives": int((flagged & labels).sum()),
        "false_positives": int((flagged & ~labels).sum()),
        "false_negatives": int((~flagged & labels).sum()),
    }


def ratio(part: np.ndarray, whole: np.ndarray) -> float:
    total = int(whole.sum())
    return int(part.sum()) / total if total else float("nan")


def f1(flagged: np.ndarray, labels: np.ndarray) -> float:
    total = int(flagged.sum()) + int(labels.sum())
    return 2 * int((flagged & labels).sum()) / total if total else float("nan")


def auc(score: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, by ranks with ties averaged."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse]
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "gate": measure_gate,
    "spans": measure_spans,
    "conditions": measure_conditions,
}

if __name__ == "__main__":
    main()
