"""Judging off the next token with the shared beginning read once, against the same prompts sent one by one through `generate`.

    python -m benchmarks.judging --corpus NFCORPUS/corpus/human.jsonl [--setting short|graded|examples] [--candidates 30]

One query and its candidates, the passages cut to the mean length of an MS MARCO passage (56 words). The other side is what one
writes first with transformers: the embedded model as `from_pretrained` loads it, and for each prompt
`generate(max_new_tokens=1, output_scores=True)`. Both take their prompts as chat turns, both compute in the same dtype on one thread.
Seconds are CPU seconds of the process, so that neighbours on the machine do not enter. Each setting is added to
`benchmarks/results/judging.json`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from models import store
from models.lm.chat import encode_chat
from models.lm.local import LocalLanguageModel
from models.lm.next_token import answer_tokens
from models.prompts import load_prompt
from transforms.retrieval.labelling.judge import Judge
from transforms.retrieval.labelling.queries import PoolDocument
from transforms.retrieval.labelling.question import Asker

RESULTS = Path(__file__).parent / "results" / "judging.json"
QUERY = "do statins cause breast cancer?"
ANSWER = (
    "Statins have not been shown to cause breast cancer; most large studies find no link, and some find a slightly lower "
    "risk in women who take them for years, although other studies disagree."
)
# Name -> prompt, its variables, the answers.
SETTINGS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "short": ("relevance-yes-no-v1", {"query": QUERY}, ("Yes", "No")),
    "graded": (
        "graded-relevance-v1", {"query": QUERY, "answer": ANSWER, "json": False}, ("0", "1", "2", "3"),
    ),
    "examples": ("relevance-examples-v1", {"query": QUERY}, ("Yes", "No")),
}  # fmt: skip


def passages(corpus: Path, count: int, words: int) -> list[PoolDocument]:
    """The first documents of a corpus, cut."""
    found = []
    with corpus.open() as file:
        for line in file:
            row = json.loads(line)
            text = " ".join(f"{row.get('title', '')}. {row['text']}".split()[:words])
            found.append(PoolDocument(row["_id"], "", text))
            if len(found) == count:
                return found
    return found


def measure(name: str, documents: list[PoolDocument], repeats: int) -> dict[str, Any]:
    """Both sides of one setting."""
    from transformers import AutoModelForCausalLM

    prompt_name, variables, answers = SETTINGS[name]
    prompt = load_prompt(prompt_name, variables=(*variables, "passage"))
    folder = store.path("smollm2")
    ours = LocalLanguageModel(folder, name="smollm2", threads=1)
    judge = Judge(lambda: ours, ours.info)

    def ask() -> list[tuple[float, ...]]:
        asker = Asker(judge, prompt, **variables)
        questions = [asker.ask(d) for d in documents]
        return [s.values for s in judge.choose([q.request for q in questions if q.request], answers)]

    requests = [q.request for q in map(Asker(judge, prompt, **variables).ask, documents) if q.request]
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=ours.model.dtype).eval()
    groups = answer_tokens(ours.tokenizer, answers)

    def one_by_one() -> list[tuple[float, ...]]:
        values = []
        for request in requests:
            ids = torch.tensor([encode_chat(ours.tokenizer, request.messages, request.prefill)])
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, output_scores=True,
                return_dict_in_generate=True, pad_token_id=0,
            )  # fmt: skip
            logprobs = torch.log_softmax(out.scores[0][0].double(), -1)
            values.append(tuple(float(torch.logsumexp(logprobs[torch.tensor(g)], 0)) for g in groups))
        return values

    def seconds(run: Any) -> tuple[float, list[tuple[float, ...]]]:
        best, values = float("inf"), []
        for _ in range(repeats):
            started = time.process_time()
            values = run()
            best = min(best, time.process_time() - started)
        return best, values

    ours.answer_logprobs(requests[:1], answers)  # loading and first kernels are not the work
    ids = [ours.encode(r) for r in requests]
    torch.set_num_threads(1)
    mine, my_values = seconds(ask)
    theirs, their_values = seconds(one_by_one)
    first, second = np.asarray(my_values), np.asarray(their_values)
    odds = np.abs((first[:, 0] - first[:, 1]) - (second[:, 0] - second[:, 1]))
    return {
        "prompt": prompt.tag,
        "pairs": len(requests),
        "tokens_a_prompt": float(np.mean([len(i) for i in ids])),
        "shared_tokens": _beginning(ids),
        "dtype": str(ours.model.dtype).removeprefix("torch."),
        "seconds_a_pair": mine / len(requests),
        "generate_seconds_a_pair": theirs / len(requests),
        "times_faster": theirs / mine,
        "largest_difference_of_log_odds": float(odds.max()),
        "correlation_of_log_odds": float(
            np.corrcoef(first[:, 0] - first[:, 1], second[:, 0] - second[:, 1])[0, 1]
        ),
    }


def _beginning(prompts: list[list[int]]) -> int:
    count = 0
    for tokens in zip(*prompts, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--setting", choices=tuple(SETTINGS), action="append")
    parser.add_argument("--candidates", type=int, default=30)
    parser.add_argument("--words", type=int, default=56)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    documents = passages(args.corpus, args.candidates, args.words)
    results = orjson.loads(RESULTS.read_bytes()) if RESULTS.exists() else {"settings": {}}
    for name in args.setting or SETTINGS:
        results["settings"][name] = {**measure(name, documents, args.repeats), "words": args.words}
        print(name, results["settings"][name], flush=True)
    results["device"] = f"CPU ({platform.machine()}), {os.cpu_count()} cores, shared, one thread"
    results["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "transformers")}
    RESULTS.write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n")


if __name__ == "__main__":
    main()
