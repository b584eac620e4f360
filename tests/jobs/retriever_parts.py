"""A tiny encoder's groups, settings and what to look at in a trained folder, for the tests of retriever training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.train_retriever import TrainRetrieverConfig
from schemas.groups import GROUP_SCHEMA, MASK_SCHEMA
from tests.models.tiny_classifier import WORDS

ROOT = Path(__file__).resolve().parents[2]
TOPICS = [w for w in WORDS if w.isalpha() and len(w) > 2][:12]
NOISE = [w for w in WORDS if w.isalpha() and w not in TOPICS]


def documents():
    """Six texts a topic: its word among others."""
    rng = np.random.default_rng(0)
    for t, topic in enumerate(TOPICS):
        for i in range(6):
            words = rng.choice(NOISE, rng.integers(2, 9)).tolist()
            words.insert(int(rng.integers(0, len(words))), topic)
            yield f"d{t}-{i}", " ".join(words)


def group(query, topic, texts, stage, number, rng, *, with_text=True, source="human"):
    mine = [d for d in texts if d.startswith(f"d{topic}-")]
    others = [d for d in texts if d not in mine]
    count = int(rng.integers(1, 5))
    positives = [
        {
            "doc_id": d, "quality_rank": i + 1, "grade": 2, "value": None, "label_source": source, "annotator": source,
            "title": None, "text": texts[d] if with_text else None,
        }
        for i, d in enumerate(mine[:count])
    ]  # fmt: skip
    negatives = [
        {
            "doc_id": d, "source": "random", "rank": i + 1, "score": None, "grade": None, "title": None,
            "text": texts[d] if with_text else None,
        }
        for i, d in enumerate(rng.choice(others, 12, replace=False).tolist())
    ]  # fmt: skip
    words = f"{TOPICS[topic]} {NOISE[int(rng.integers(0, len(NOISE)))]}"
    row = {
        "query_id": query, "query": words if with_text else None, "stage": stage, "stage_number": number,
        "positives": positives, "negatives": negatives,
    }  # fmt: skip
    return row, sorted(mine)


def write_groups(folder, *, stages=("human",), with_text=True, queries=40, **manifest):
    """A folder as `tamis groups` writes it."""
    texts, rng = dict(documents()), np.random.default_rng(1)
    shards, masks = [], {}
    for number, stage in enumerate(stages):
        rows = []
        for q in range(queries):
            row, mine = group(
                f"q{q}", q % len(TOPICS), texts, stage, number, rng, with_text=with_text, source=stage
            )
            rows.append(row)
            masks[f"q{q}"] = mine
        name = f"{number}-{stage}/part-00000.parquet"
        (folder / "data" / name).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=GROUP_SCHEMA), folder / "data" / name)
        shards.append({"path": name, "rows": len(rows)})
    (folder / "mask").mkdir()
    table = [{"query_id": q, "doc_ids": d} for q, d in masks.items()]
    pq.write_table(pa.Table.from_pylist(table, schema=MASK_SCHEMA), folder / "mask" / "part-00000.parquet")
    record = {
        "job": "groups", "run_id": "test-run", "shards": shards,
        "tables": [{"path": "mask/part-00000.parquet", "sha256": "abc"}],
        "draw": {"positives": "all", "max_positives": 3, "group_size": 6, "seed": 0}, **manifest,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(record))
    (folder / "_SUCCESS").write_text("test-run\n")
    return folder


def config(groups, tiny, output, **options):
    settings = {
        "data": groups, "model": tiny, "output": str(output), "query_length": 8, "passage_length": 16,
        "batch_size": 8, "epochs": 1, "learning_rate": 3e-3, "threads": 1, "device": "cpu", "quiet": True,
        "save_steps": 2, "log_steps": 1, "chunk": 16, **options,
    }  # fmt: skip
    return TrainRetrieverConfig(**settings)


def ranking_accuracy(folder):
    """How often a topic's word finds a text of that topic first."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    ids, texts = zip(*documents(), strict=True)
    scores = model.similarity(model.encode_query(TOPICS), model.encode_document(list(texts)))
    best = [ids[i] for i in scores.argmax(dim=1).tolist()]
    return np.mean([name.startswith(f"d{t}-") for t, name in enumerate(best)])


def step_events(folder):
    """The progress events of a run, in order."""
    lines = [x for p in (folder / "_tamis" / "events").iterdir() for x in p.read_text().splitlines()]
    return [e for e in map(json.loads, lines) if e.get("event") == "step"]


def weights(folder):
    from safetensors.torch import load_file

    found = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{k}": v for k, v in load_file(path).items()}
    return found


def assert_equal_weights(one, two):
    import torch

    a, b = weights(one), weights(two)
    assert a and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
