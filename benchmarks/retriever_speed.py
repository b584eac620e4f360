"""Steps a second and peak memory of the loss path against sentence-transformers' MultipleNegativesRankingLoss.

    python benchmarks/retriever_speed.py [--queries 8] [--steps 6]

Same encoder, texts, lengths and batch, one thread, forward and backward passes only. Ours: b queries with 4 positives and 4
negatives each. Theirs has one positive a row, so a query with 4 positives is 4 rows with a negative each: the same 8 passages a query.
Steps are taken in turn, so that a busy machine slows both alike; the figure is the ratio of medians. Peak memory is that of a process
of its own. And the memory of the loss alone, as positives and negatives grow. Writes benchmarks/results/retriever_speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import retrieval_common as common

RESULTS = Path(__file__).parent / "results" / "retriever_speed.json"
POSITIVES, NEGATIVES, QUERY, PASSAGE = 4, 4, 16, 96


def texts(queries: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Made-up queries and passages of the lengths of abstracts: 20 to 140 words."""
    rng = np.random.default_rng(seed)
    words = np.array(
        [
            "the",
            "of",
            "and",
            "study",
            "effect",
            "diet",
            "risk",
            "cell",
            "blood",
            "acid",
            "trial",
            "group",
            "level",
            "intake",
            "cancer",
            "heart",
        ]
    )
    asked = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(queries)]
    passages = [
        " ".join(rng.choice(words, rng.integers(20, 140))) for _ in range(queries * (POSITIVES + NEGATIVES))
    ]
    return asked, passages


def our_step(queries: int) -> Callable[[], float]:
    """Collating, encoding, loss and gradients, as the trainer does them."""
    from models.losses.retrieval import batch_loss
    from models.losses.settings import LossSettings
    from models.losses.targets import GroupIds
    from models.training.groups import DrawPolicy
    from models.training.loading import BaseModel
    from models.training.retriever_batches import GroupCollator, GroupRow, TextFeatures
    from models.training.retriever_data import GroupData, Ragged
    from models.training.retriever_model import TextRetriever, load_sentence_encoder
    from models.training.retriever_settings import RetrieverSettings
    from models.training.retriever_texts import tokenize_groups

    asked, passages = texts(queries)
    size = POSITIVES + NEGATIVES
    numbers = np.arange(len(passages)).reshape(queries, size)
    groups = GroupData(
        query_ids=[str(i) for i in range(queries)], queries=list(asked), stages=["human"],
        stage=np.zeros(queries, np.int64), document_ids=[str(i) for i in range(len(passages))],
        documents=list(passages), positives=Ragged.of(numbers[:, :POSITIVES].tolist()),
        negatives=Ragged.of(numbers[:, POSITIVES:].tolist()),
        positive_grades=np.ones(queries * POSITIVES, np.float32),
        negative_grades=np.zeros(queries * NEGATIVES, np.float32),
        mask=Ragged.of(numbers[:, :POSITIVES].tolist()),
    )  # fmt: skip
    encoder = load_sentence_encoder(BaseModel("minilm", _minilm(), ""))
    settings = RetrieverSettings(query_length=QUERY, passage_length=PASSAGE)
    tokens = tokenize_groups(groups, encoder, settings, {"query": "", "document": ""})
    features = TextFeatures(tokens.queries, tokens.documents, encoder.tokenizer.pad_token_id, settings.chunk)
    collate = GroupCollator(groups, DrawPolicy("all", POSITIVES, size), 0, features)
    model, loss = TextRetriever(encoder).train(), LossSettings("lse_pair", 20.0)

    def step() -> float:
        made = collate([GroupRow(i, 0) for i in range(queries)])
        vectors = model(made["queries"], made["documents"])
        found = batch_loss(*vectors, GroupIds(**made["groups"]), loss, cosine=True)
        found.mean.backward()
        model.zero_grad(set_to_none=True)
        return found.mean.item()

    return step


def their_step(queries: int) -> Callable[[], float]:
    """The library's collator, loss and gradients on the exploded rows: anchor, positive, negative."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    asked, passages = texts(queries)
    size = POSITIVES + NEGATIVES
    anchors = [asked[i] for i in range(queries) for _ in range(POSITIVES)]
    positives = [passages[i * size + j] for i in range(queries) for j in range(POSITIVES)]
    negatives = [passages[i * size + POSITIVES + j] for i in range(queries) for j in range(NEGATIVES)]
    model = SentenceTransformer(_minilm(), device="cpu").train()
    loss = MultipleNegativesRankingLoss(model, scale=20.0)

    def tokenized(part: list[str], longest: int) -> dict[str, Any]:
        model.max_seq_length = longest
        return model.preprocess(part) if hasattr(model, "preprocess") else model.tokenize(part)

    def step() -> float:
        columns = [(anchors, QUERY), (positives, PASSAGE), (negatives, PASSAGE)]
        found = loss([tokenized(*c) for c in columns], None)
        found.backward()
        model.zero_grad(set_to_none=True)
        return found.item()

    return step


def _minilm() -> str:
    from models import store

    return str(store.path("minilm"))


def peak(side: str, queries: int) -> None:
    """Print the most memory this process holds in two steps of one side, and what it held before them, in MB."""
    import torch

    torch.set_num_threads(1)
    step = {"ours": our_step, "theirs": their_step}[side](queries)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: count the peak from here on
    for _ in range(2):
        step()
    after = _resident("VmHWM")
    print(json.dumps({"loaded_mb": round(before, 1), "steps_mb": round(after - before, 1)}))


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def loss_memory() -> list[dict[str, Any]]:
    """Bytes allocated by the loss alone (forward and backward), one query, p positives and p negatives."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from models.losses.objectives import GroupScores, query_losses
    from models.losses.settings import LossSettings

    rows = []
    for name in ("joint_lh", "sum_marg_lh", "lse_pair", "margin_mse"):
        for side in (250, 500, 1000, 2000, 4000):
            scores = torch.randn(1, 2 * side, requires_grad=True)
            positive = torch.arange(2 * side)[None] < side
            groups = GroupScores(
                scores, positive, ~positive, torch.zeros(1, dtype=torch.int64), torch.randn(1, 2 * side)
            )
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
                query_losses(groups, LossSettings(name)).sum().backward()
            total = sum(max(0, e.self_cpu_memory_usage) for e in watched.key_averages())
            rows.append(
                {
                    "loss": name,
                    "positives": side,
                    "negatives": side,
                    "bytes": total,
                    "bytes_a_document": total / (2 * side),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--peak", choices=["ours", "theirs"], default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak(arguments.peak, arguments.queries)
        return
    import torch

    torch.set_num_threads(1)
    memory = {}
    for name in ("ours", "theirs"):
        command = [sys.executable, __file__, "--peak", name, "--queries", str(arguments.queries)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[name] = json.loads(done.stdout.splitlines()[-1])
    sides = {"ours": our_step(arguments.queries), "theirs": their_step(arguments.queries)}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.steps + 1):
        for name, step in sides.items():
            began = time.process_time()
            step()
            if number:  # the first warms up
                spent[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    record = {
        "device": common.device(),
        "encoder": "minilm",
        "batch": {"queries": arguments.queries, "positives": POSITIVES, "negatives": NEGATIVES, "query_tokens": QUERY, "passage_tokens": PASSAGE},
        "steps": arguments.steps,
        "cpu_seconds_a_step": medians,
        "all": spent,
        "speed_against_theirs": medians["theirs"] / medians["ours"],
        "memory": memory,
        "loss_memory": loss_memory(),
    }  # fmt: skip
    common.write_json(RESULTS, record)
    print(
        json.dumps({k: record[k] for k in ("cpu_seconds_a_step", "speed_against_theirs", "memory")}, indent=1)
    )


if __name__ == "__main__":
    main()
