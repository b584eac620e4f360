"""Classifier throughput on mixed-length text: tamis's batches against `Detoxify.predict` in file order.

    python benchmarks/scoring.py                                        # a 6 x 384 BERT, random weights
    python benchmarks/scoring.py --layers 12 --hidden 768 --texts 128   # the size of Detoxify's `original`

Both read the same checkpoint, in Detoxify's own layout, and the same generated texts, whose lengths have the
long tail of web comments (log-normal: median 25 words, one in a hundred over 300). Detoxify gets them in file
order, 32 at a time, as its users write it; it pads each batch to its longest text and cuts texts at the
model's limit. tamis packs batches by token budget, and scores over-long texts whole, in windows, so it does
more work on those. One torch thread each, one process, interleaved repeats, processor time; ratios are within
one round. Scores of texts under the limit are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RESULTS = Path(__file__).resolve().parent / "results" / "scoring.json"
LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
USER_BATCH = 32


def make_texts(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Generated texts and the vocabulary they are made of."""
    draw = random.Random(seed)
    words = sorted(
        {"".join(draw.choices("abcdefghijklmnoprstuvwy", k=draw.randint(2, 8))) for _ in range(20_000)}
    )
    weights = [1 / (i + 10) for i in range(len(words))]
    texts = []
    for _ in range(count):
        length = min(1200, max(1, round(draw.lognormvariate(3.2, 1.1))))
        texts.append(" ".join(draw.choices(words, weights, k=length)))
    return texts, words


def make_checkpoint(folder: Path, words: list[str], layers: int, hidden: int) -> tuple[Path, Path]:
    """A random BERT in Detoxify's layout: checkpoint, and folder of its configuration and tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    # Half of the words are known whole; the rest fall into pieces, as rare words do.
    vocabulary = list(dict.fromkeys([*vocabulary, *words[::2]]))
    settings = folder / "config"
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=512)
    tokenizer.save_pretrained(settings)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        id2label=dict(enumerate(LABELS)),
        architectures=["BertForSequenceClassification"],
    )
    config.save_pretrained(settings)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # so that scores differ from text to text
    arguments = {
        "model_type": str(settings),
        "model_name": "BertForSequenceClassification",
        "tokenizer_name": "BertTokenizer",
        "num_classes": len(LABELS),
    }
    record = {
        "config": {"arch": {"args": arguments}, "dataset": {"args": {"classes": list(LABELS)}}},
        "state_dict": model.state_dict(),
    }
    plain = folder / "plain.ckpt"
    torch.save(record, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    return plain.rename(folder / f"random-{digest[:8]}.ckpt"), settings


def timed(score: Any) -> tuple[float, Any]:
    """Processor seconds and result of a call: with one thread, what a clock shows on an idle machine."""
    started = time.process_time()
    result = score()
    return time.process_time() - started, result


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The contest."""
    import numpy as np
    import torch
    import transformers
    from detoxify import Detoxify

    from models import registry
    from models.lm.packed import has_fast_bfloat16

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    texts, words = make_texts(args.texts, args.seed)
    checkpoint, settings = make_checkpoint(folder, words, args.layers, args.hidden)
    peer = Detoxify(checkpoint=str(checkpoint), huggingface_config_path=str(settings))
    where = {"checkpoint": str(checkpoint), "config": str(settings), "device": "cpu", "threads": 1}
    ours = registry.load("scorer", "detoxify:original", **where)
    contestants = {"ours": ours}
    if has_fast_bfloat16():
        contestants["ours, bfloat16"] = registry.load(
            "scorer", "detoxify:original", dtype="bfloat16", **where
        )

    def in_file_order() -> Any:
        parts = [peer.predict(texts[i : i + USER_BATCH]) for i in range(0, len(texts), USER_BATCH)]
        return np.concatenate([np.array([np.atleast_1d(p[label]) for label in ours.labels]).T for p in parts])

    tokens = np.array([len(ids) for ids in peer.tokenizer(texts)["input_ids"]])
    rounds: list[dict[str, float]] = []
    scores: dict[str, Any] = {}
    peer.predict(texts[:8])
    for part in contestants.values():
        part.score(texts[:8])
    for number in range(args.rounds):
        seconds = {}
        seconds["detoxify"], scores["detoxify"] = timed(in_file_order)
        for name, part in contestants.items():
            seconds[name], scores[name] = timed(lambda part=part: part.score(texts))
        rounds.append(seconds)
        print(number, {k: round(v, 2) for k, v in seconds.items()}, file=sys.stderr)
    short = tokens <= ours.limit
    ordered = [
        max(tokens[i : i + USER_BATCH].clip(max=512)) * len(tokens[i : i + USER_BATCH])
        for i in range(0, len(texts), USER_BATCH)
    ]
    return {
        "model": {"layers": args.layers, "hidden": args.hidden, "weights": "random, float32"},
        "texts": len(texts),
        "tokens": {
            "median": float(np.median(tokens)),
            "mean": float(tokens.mean()),
            "max": int(tokens.max()),
            "over_limit": int((~short).sum()),
        },
        "padded_tokens_in_file_order": int(sum(ordered)),
        "processor_seconds": rounds,
        "texts_per_second": {
            name: len(texts) / statistics.median(r[name] for r in rounds) for name in rounds[0]
        },
        "speed_over_detoxify": {
            name: statistics.median(r["detoxify"] / r[name] for r in rounds) for name in contestants
        },
        "largest_score_difference_under_the_limit": {
            name: float(np.abs(scores[name] - scores["detoxify"])[short].max()) for name in contestants
        },
        "score_spread": float(np.ptp(scores["detoxify"][:, 0])),
        "threads": 1,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> None:
    """Run the contest and write `benchmarks/results/scoring.json`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TAMIS_HOME"] = folder  # the random model is nobody's cache entry
        result = run(args, Path(folder))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
