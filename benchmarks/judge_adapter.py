"""The embedded judge's adapter: a small model that knows which query a passage answers. Make pairs, train, ship.

    python -m benchmarks.judge_adapter prepare --data DATA --work runs/judge
    python -m benchmarks.judge_adapter train --work runs/judge [any option of `tamis train lm`]
    python -m benchmarks.judge_adapter ship --work runs/judge

It learns to write the query after the passage (the shipped prompt `likelihood-query-v1`), from relevant pairs of NFCorpus
(human side) and NQ-open: every token of a query teaches something, while a yes or no for each pair teaches a model of
this size nothing in a thousand pairs (`--kind yes-no`: the loss stayed at chance, ln 2, for 80 steps of eight pairs, with a third
and with half of the negatives hard ones). Of NFCorpus the train qrels' queries only: no query of the dev or test split is touched, nor one that says the same.
No text of either set stands in the repository: `ship` copies weights and settings only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.fingerprint import derive_seed

PROMPTS = {"query": "likelihood-query-v1", "yes-no": "relevance-yes-no-v1"}
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "models" / "adapters" / "judge"
WORDS = 60  # of a passage
HARD = 1 / 3  # of the passages that are not relevant
RECIPE = (
    "--model", "smollm2", "--lora", "--lora-r", "16", "--lora-alpha", "32", "--messages-column", "messages",
    "--max-length", "1024", "--batch-size", "1", "--accumulate", "1", "--packing", "isolated", "--epochs", "1",
    "--learning-rate", "5e-4", "--precision", "bfloat16", "--save-dtype", "bfloat16", "--threads", "1",
    "--eval-fraction", "0.03", "--log-steps", "10", "--save-steps", "25",
)  # fmt: skip


def cut(text: str, words: int = WORDS) -> str:
    """The first words of a text."""
    return " ".join(text.split()[:words])


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


class _Searcher:
    """BM25 over passages, the way the pools do it (bm25s)."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self._tokens = lambda texts: bm25s.tokenize(texts, stopwords="en", show_progress=False)
        self._index = bm25s.BM25(k1=0.82, b=0.68)
        self._index.index(self._tokens(list(texts)), show_progress=False)
        self._size = len(texts)

    def top(self, queries: Sequence[str], depth: int) -> list[list[int]]:
        found, _ = self._index.retrieve(
            self._tokens(list(queries)), k=min(depth, self._size), show_progress=False
        )
        return [[int(i) for i in row] for row in found]


def nfcorpus_pairs(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """About `count` pairs of the train split: query, title, text, relevant or not."""
    with zipfile.ZipFile(data / "retrieval/cocktail_nfcorpus.zip") as archive:
        documents = [json.loads(line) for line in archive.open("corpus/human.jsonl")]
        queries = {q["_id"]: q["text"] for q in map(json.loads, archive.open("queries.jsonl"))}
        judged = {name: _qrels(archive, name) for name in ("train", "dev", "test")}
    barred = {_plain(queries[q]) for name in ("dev", "test") for q in judged[name] if q in queries}
    ids = [d["_id"] for d in documents]
    number = {name: i for i, name in enumerate(ids)}
    texts = [f"{d['title']} {d['text']}" for d in documents]
    usable = [q for q in sorted(judged["train"]) if q in queries and _plain(queries[q]) not in barred]
    random.Random(derive_seed(seed, "judge-queries")).shuffle(usable)
    searcher = _Searcher(texts)
    pairs: list[dict[str, Any]] = []
    for query, hits in zip(usable, searcher.top([queries[q] for q in usable], 100), strict=True):
        if len(pairs) >= count:
            break
        dice = random.Random(derive_seed(seed, "judge-pairs", query))
        graded = {number[d]: g for d, g in judged["train"][query].items() if d in number}
        best = [d for d, g in graded.items() if g == max(graded.values())]
        near = [i for i in hits if i in graded]
        unjudged = [i for i in hits[10:] if i not in graded]
        if not best:
            continue
        relevant = {dice.choice(near or best), dice.choice(best)}
        others = {dice.choice(unjudged)} if unjudged and dice.random() < HARD * len(relevant) else set()
        while len(others) < len(relevant):
            draw = dice.randrange(len(ids))
            if draw not in graded:
                others.add(draw)
        pairs += [_pair(queries[query], documents[i], i in relevant) for i in sorted(relevant | others)]
    return pairs


def nq_pairs(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """About `count` pairs of NQ-open: the gold passage, and another one BM25 ranks high or a random one."""
    with gzip.open(data / "retrieval/nq_open_oracle.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    passages = [r["ctxs"][0] for r in rows]
    order = list(range(len(rows)))
    random.Random(derive_seed(seed, "judge-nq")).shuffle(order)
    order = order[: count // 2]
    searcher = _Searcher([f"{p['title']} {p['text']}" for p in passages])
    pairs: list[dict[str, Any]] = []
    for i, hits in zip(order, searcher.top([rows[i]["question"] for i in order], 20), strict=True):
        dice = random.Random(derive_seed(seed, "judge-nq", rows[i]["question"]))
        wrong = [j for j in hits if not _answers(passages[j]["text"], rows[i]["answers"])]
        other = dice.choice(wrong) if wrong and dice.random() < 0.6 else dice.randrange(len(rows))
        if other == i or _answers(passages[other]["text"], rows[i]["answers"]):
            continue
        pairs += [_pair(rows[i]["question"], passages[j], j == i) for j in (i, other)]
    return pairs


def _answers(text: str, answers: Sequence[str]) -> bool:
    return any(_plain(a) in _plain(text) for a in answers)


def _qrels(archive: zipfile.ZipFile, name: str) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = defaultdict(dict)
    for line in archive.read(f"qrels/{name}.tsv").decode().splitlines()[1:]:
        query, document, grade = line.split("\t")
        if int(grade) > 0:
            out[query][document] = int(grade)
    return dict(out)


def _pair(query: str, document: dict[str, Any], relevant: bool) -> dict[str, Any]:
    """A pair as it is made, before it is known what is asked of it."""
    title, text = document["title"], document["text"]
    return {"query": query, "passage": cut(f"{title}. {text}" if title else text), "relevant": relevant}


def chat(pair: dict[str, Any], kind: str) -> dict[str, Any]:
    """A pair as a chat to learn from."""
    from models.prompts import load_prompt

    asked = {"passage": pair["passage"]} | ({"query": pair["query"]} if kind == "yes-no" else {})
    turns, _, _ = load_prompt(PROMPTS[kind], variables=tuple(asked)).render(**asked)
    answer = pair["query"] if kind == "query" else "Yes" if pair["relevant"] else "No"
    messages = [{"role": m.role, "content": m.content} for m in turns]
    return {"messages": [*messages, {"role": "assistant", "content": answer}]}


def prepare(args: argparse.Namespace) -> None:
    """Write WORK/pairs.jsonl, shuffled."""
    medical = nfcorpus_pairs(args.data, args.pairs, args.seed)
    general = nq_pairs(args.data, args.nq_pairs, args.seed)
    pairs = [p for p in medical + general if p["relevant"] or args.kind == "yes-no"]
    random.Random(derive_seed(args.seed, "judge-order")).shuffle(pairs)
    args.work.mkdir(parents=True, exist_ok=True)
    with (args.work / "pairs.jsonl").open("w") as out:
        for pair in pairs:
            out.write(json.dumps(chat(pair, args.kind), ensure_ascii=False) + "\n")
    print(f"of {len(medical):,} pairs of NFCorpus and {len(general):,} of NQ-open: {len(pairs):,} written")


def train(args: argparse.Namespace, options: Sequence[str]) -> None:
    """Run `tamis train lm`."""
    command = [sys.executable, "-m", "pipelines.cli", "train", "lm", str(args.work / "pairs.jsonl")]
    command += ["--output", str(args.work / "adapter"), *RECIPE, *options]
    print(shlex.join(["tamis", *command[3:]]), flush=True)
    subprocess.run(command, check=True)


def ship(args: argparse.Namespace) -> None:
    """Copy weights and settings into the package."""
    SHIPPED.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(args.work / "adapter" / name, SHIPPED / name)
    settings = json.loads((SHIPPED / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (SHIPPED / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("prepare", "train", "ship"))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("runs/judge"))
    parser.add_argument("--kind", choices=tuple(PROMPTS), default="query")
    parser.add_argument("--pairs", type=int, default=2000, help="of NFCorpus, half of them relevant")
    parser.add_argument("--nq-pairs", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args, options = parser.parse_known_args()
    if args.command == "train":
        train(args, options)
    elif options:
        parser.error(f"unknown: {' '.join(options)}")
    else:
        {"prepare": prepare, "ship": ship}[args.command](args)


if __name__ == "__main__":
    main()
