"""Builds an output folder as a detox job leaves it, from mild made-up text, without running a job.

Everything is drawn from one seed. What was put in is returned, so that tests can count for themselves.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.edits import EDIT_SCHEMA, SPAN_TYPE
from transforms.detox.gate import TOXICITY_TYPE
from transforms.shards.files import Folder, sidecar_name
from transforms.shards.plan import load_plan, plan_key
from transforms.shards.receipts import Receipt, receipt_name, unit_name

CONFIG_HASH = "ef" * 16
AFTER_TYPE = pa.struct([pa.field("score", pa.float32()), pa.field("labels", pa.list_(pa.float32()))])
LABELS = ["toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack"]
NEUTRAL = [
    "The bus leaves at 7:45 and never waits. ",
    "I paid €39.90 for it in March. ",
    "It did not rain until Sunday. ",
    "Turn the screw until it stops, then half a turn more. ",
    "My sister has read the book twice. ",
    "We counted 62 meteors before two o'clock. ",
    "Die Karte reißt nicht & ist <b>wasserfest</b>. ",
    "Nobody at the desk knew the answer. ",
]
RUDE = [
    ("Only an idiot would sit in row 9. ", "idiot", "I would not sit in row 9. "),
    ("The people at the shop are morons. ", "morons", "The people at the shop did not know. "),
    ("What a stupid, stupid idea. ", "stupid", "I do not like the idea. "),
    ("Shut up about the 1998 model. ", "Shut up", "Please stop talking about the 1998 model. "),
    ("This damn thing broke after 8 days. ", "damn", "This thing broke after 8 days. "),
    ("They are <i>garbage people</i>, all 12 of them. ", "garbage people", "I dislike all 12 of them. "),
]
REASONS = ["toxicity", "similarity", "numbers", "negation", "length", "copy"]
TEMPERATURES = [0.6, 0.8, 1.0, 1.2, 1.5]
ACTIONS = ["rewrite"] * 12 + ["span_edit"] * 3 + ["redact"] * 2 + ["drop_segment", "flag", "drop_document"]


@dataclass
class Sample:
    """What was built."""

    path: Path
    edits: list[dict] = field(default_factory=list)
    before: list[str] = field(default_factory=list)  # texts of all rows, shard after shard
    kept: int = 0
    dropped: int = 0
    dead: int = 0
    flagged: int = 0
    segments: int = 0


def build_output(
    path: Path,
    *,
    rows: int = 60,
    shards: tuple[str, ...] = ("en/part-0.parquet", "en/part-1.parquet"),
    edits: bool = True,
    measured: bool = True,
    rude_share: float = 0.4,
    success: bool = True,
    seed: int = 7,
) -> Sample:
    """Write an output folder.

    Args:
        path: Where; made if need be.
        rows: Rows a shard.
        shards: Names of the shards; `.parquet` or `.jsonl`.
        edits: Whether the job rewrote (a detox job) or only scored.
        measured: Whether the job measured documents again (attribute `toxicity_after`).
        rude_share: Share of documents with a rude sentence.
        success: Whether `_SUCCESS` is there.
        seed: Of all draws.
    """
    draw = random.Random(seed)
    sample = Sample(path)
    measured = measured and edits
    entries = []
    for shard in shards:
        built = [_document(draw, f"{shard}#{i}", i, shard, edits, rude_share) for i in range(rows)]
        entries.append(_write_shard(path, shard, built, edits, measured))
        for d in built:
            sample.before.append(d["before"])
            sample.edits += d["edits"]
            sample.kept += d["fate"] == "kept"
            sample.dropped += d["fate"] == "dropped"
            sample.dead += d["fate"] == "dead"
            sample.segments += len(d["toxicity"]["segments"])
            sample.flagged += d["toxicity"]["flagged"]
    _write_manifest(path, entries, edits)
    write_run(path, shards, rows, done=shards)
    write_event(path, kind="run", state="started", run_id="run-1", t=1_738_400_000.0)
    write_event(path, kind="run", state="finished", t=1_738_400_090.0)
    if success:
        (path / "_SUCCESS").write_text("run-1\n")
    return sample


def _document(draw: random.Random, id_: str, row: int, shard: str, edits: bool, rude_share: float) -> dict:
    parts = [draw.choice(NEUTRAL) for _ in range(draw.randint(1, 6))]
    rude = draw.choice(RUDE) if draw.random() < rude_share else None
    where = draw.randint(0, len(parts))
    if rude:
        parts.insert(where, rude[0])
    segments, start = [], 0
    for i, part in enumerate(parts):
        toxic = rude is not None and i == where
        reached = toxic or draw.random() < 0.15
        score = draw.betavariate(9, 2) if toxic else draw.betavariate(1, 9)
        score = max(score, 0.5) if toxic else min(score, 0.49)
        labels = [score, score / 4, score / 2, score / 9, score * 0.8, score / 7]
        segments.append(
            {
                "start": start,
                "end": start + len(part),
                "lexicon": 1.0 if toxic and draw.random() < 0.8 else 0.0,
                "linear": min(1.0, max(0.0, score + draw.gauss(0, 0.15))),
                "labels": labels if reached else None,
                "score": score if reached else None,
                "flagged": toxic,
            }
        )
        start += len(part)
    text = "".join(parts)
    fate, after, made = "kept", text, []
    if draw.random() < 0.02:
        fate = "dead"
    elif rude and edits:
        made, after, fate = _edit(draw, id_, row, shard, rude, segments[where], where, text)
    return {
        "id": id_,
        "row": row,
        "before": text,
        "after": after,
        "fate": fate,
        "edits": made,
        "toxicity": {
            "score": max((s["score"] or 0.0) for s in segments),
            "flagged": rude is not None,
            "segments": segments,
        },
        "toxicity_after": _after(segments, made) if fate == "kept" else None,
        "spans": [s for e in made for s in e["spans"]],
    }


def _after(segments: list[dict], made: list[dict]) -> dict:
    scores = {i: s["score"] or 0.0 for i, s in enumerate(segments)}
    scores |= {e["segment"]: e["toxicity_after"] or 0.0 for e in made}
    return {"score": max(scores.values()), "labels": None}


def _edit(draw, id_, row, shard, rude, segment, where, text):
    action = draw.choice(ACTIONS)
    source, word, rewritten = rude
    start = segment["start"]
    found = start + source.index(word)
    span = {"start": found, "end": found + len(word), "score": draw.uniform(0.5, 1), "source": "lexicon"}
    candidates = [
        {
            "text": rewritten if k == 0 else source.replace(word, "person"),
            "toxicity": draw.uniform(0.0, 0.2 if k == 0 else 0.9),
            "similarity": draw.uniform(0.75 if k == 0 else 0.3, 0.98),
            "fluency": 0.6,
            "fusion": 0.5 - k / 10,
            "temperature": draw.choice(TEMPERATURES),
            "reasons": [] if k == 0 and action == "rewrite" else [draw.choice(REASONS)],
        }
        for k in range(draw.randint(2, 6))
    ]
    best = candidates[0]
    after = {
        "rewrite": rewritten,
        "span_edit": source.replace(word, "person"),
        "redact": source.replace(word, "[redacted]"),
        "drop_segment": "",
        "flag": source,
        "drop_document": source,
    }[action]
    low = None if action == "drop_segment" else best["toxicity"] if after != source else segment["score"]
    same = after == source
    edit = {
        "shard": shard,
        "row": row,
        "id": id_,
        "segment": where,
        "start": start,
        "end": segment["end"],
        "before": source,
        "after": after,
        "action": action,
        "toxicity_before": segment["score"],
        "toxicity_after": low,
        "similarity": None if action == "drop_segment" else 1.0 if same else best["similarity"],
        "labels": LABELS,
        "scores_before": segment["labels"],
        "scores_after": None if low is None else [low, low / 4, low / 2, low / 9, low * 0.8, low / 7],
        "spans": [span],
        "candidates": candidates,
        "temperature": best["temperature"] if action == "rewrite" else None,
        "seed": draw.getrandbits(63) if action == "rewrite" else None,
        "scorer": "jigsaw-bilstm@0123456789abcdef",
        "model": "smollm2+detox@fedcba9876543210",
        "prompt": "detox-v1@00aa11bb",
    }
    if action == "drop_document":
        return [edit], text, "dropped"
    return [edit], text[:start] + after + text[segment["end"] :], "kept"


def _write_shard(path: Path, shard: str, built: list[dict], edits: bool, measured: bool) -> dict:
    kept = [d for d in built if d["fate"] == "kept"]
    target = path / "data" / shard
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": d["id"], "text": d["after"], "meta": {"n": d["row"], "tags": ["a", "b"]}} for d in kept]
    if shard.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), target)
    else:
        target.write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))
    side = sidecar_name(shard)
    attributes = {"toxicity": TOXICITY_TYPE}
    if edits:
        attributes["spans"] = pa.list_(SPAN_TYPE)
    if measured:
        attributes["toxicity_after"] = AFTER_TYPE
    for name, type_ in attributes.items():
        columns = {
            "id": pa.array([d["id"] for d in kept]),
            "row": pa.array([d["row"] for d in kept], pa.int64()),
            "value": pa.array([d[name] for d in kept], type_),
        }
        _write(path / "attributes" / name / side, pa.table(columns))
    made = [e for d in built for e in d["edits"]]
    if made:
        _write(path / "edits" / side, pa.Table.from_pylist(made, schema=EDIT_SCHEMA))
    for fate in ("dropped", "dead"):
        gone = [d for d in built if d["fate"] == fate]
        if gone:
            _write(path / fate / side, _removed(gone, shard, fate))
    counts = {f: sum(d["fate"] == f for d in built) for f in ("kept", "dropped", "dead")}
    content = target.read_bytes()
    return {
        "path": shard,
        "rows_in": len(built),
        "rows_kept": counts["kept"],
        "rows_dropped": counts["dropped"],
        "rows_dead": counts["dead"],
        "rows_changed": sum(d["after"] != d["before"] for d in kept),
        "edits": len(made),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "schema_fingerprint": "ab" * 16,
        "source_fingerprint": "xxh3:" + "cd" * 16,
        "attributes": sorted(attributes),
    }


def _removed(gone: list[dict], shard: str, fate: str) -> pa.Table:
    n = len(gone)
    dropped = fate == "dropped"
    return pa.table(
        {
            "shard": [shard] * n,
            "row": pa.array([d["row"] for d in gone], pa.int64()),
            "id": [d["id"] for d in gone],
            "stage": ["RewriteToxicSegments"] * n,
            "reason": pa.array(["no_acceptable_rewrite"] * n if dropped else [None] * n, pa.string()),
            "error": pa.array(
                [None] * n if dropped else [f"ValueError: row {d['row']} is bad" for d in gone]
            ),
            "source.id": [d["id"] for d in gone],
            "text": [d["before"] for d in gone],
            "attribute.toxicity": pa.array([d["toxicity"] for d in gone], TOXICITY_TYPE),
        }
    )


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def _write_manifest(path: Path, entries: list[dict], edits: bool) -> None:
    names = ("rows_in", "rows_kept", "rows_dropped", "rows_dead", "rows_changed", "edits", "bytes")
    totals = {n: sum(e[n] for e in entries) for n in names}
    n = totals["rows_in"]
    counters = {
        "SegmentText.rows_in": n,
        "SegmentText.rows_out": n,
        "SegmentText.ms": 41,
        "GateToxicity.rows_in": n,
        "GateToxicity.rows_out": n,
        "GateToxicity.ms": 900,
        "gate.segments": n * 4,
    }
    if edits:
        counters |= {
            "RewriteToxicSegments.rows_in": n,
            "RewriteToxicSegments.rows_out": totals["rows_kept"],
            "RewriteToxicSegments.ms": 84_000,
            "rewrite.requests": totals["edits"],
            "rewrite.tokens_in": totals["edits"] * 60,
            "rewrite.tokens_out": totals["edits"] * 240,
            "rewrite.cache_hits": 3,
        }
    manifest = {
        "tamis_version": "0.1.0",
        "run_id": "run-1",
        "created": "2025-02-01T10:00:00Z",
        "finished": "2025-02-01T10:01:30Z",
        "seconds": 90.0,
        "job": "detox" if edits else "score",
        "config": {"gate": {"tau": 0.5}, "accept": {"max_toxicity": 0.5, "min_similarity": 0.5}},
        "config_hash": CONFIG_HASH,
        "models": [
            {
                "name": "smollm2+detox",
                "kind": "lm",
                "revision": "fedcba9876543210",
                "source": "embedded",
                "licence": "Apache-2.0",
                "training_data": "",
                "extra": {"dtype": "float32", "threads": 1},
            },
            {
                "name": "jigsaw-bilstm",
                "kind": "scorer",
                "revision": "0123456789abcdef",
                "source": "embedded",
                "licence": "MIT",
                "training_data": "jigsaw-2018",
                "extra": {"labels": LABELS},
            },
        ],
        "seed": 0,
        "lineage": None,
        "input": {
            "root": "corpus",
            "text_column": "text",
            "id_column": "id",
            "shards": len(entries),
            "bytes": 9000,
        },
        "totals": totals,
        "counters": counters,
        "outputs": {"data": "data", "edits": edits, "attributes": entries[0]["attributes"]},
        "companions": [],
        "shards": entries,
        "environment": {
            "python": "3.11.9",
            "platform": "Linux",
            "packages": {"tamis": "0.1.0", "pyarrow": "25.0.1"},
        },
    }
    (path / "manifest.json").write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))


def write_run(path: Path, shards: tuple[str, ...], rows: int, *, done: tuple[str, ...]) -> None:
    """The plan of a run, two units a shard; those of the shards `done` are committed and assembled."""
    half = rows // 2
    bounds = [(0, 0, half), (1, half, rows - half)]
    tamis = path / "_tamis"
    plan = {
        "version": 1,
        "input": "corpus",
        "text_column": "text",
        "id_column": "id",
        "unit_rows": 1000,
        "unit_bytes": 1000,
        "companions": [],
        "shards": [
            {
                "path": s,
                "format": "parquet",
                "rows": rows,
                "bytes": 4000,
                "stamp": "1",
                "fingerprint": "xxh3:cd",
                "schema": "ab",
                "error": None,
                "units": [{"unit": u, "first_row": f, "rows": n, "bytes": 2000} for u, f, n in bounds],
            }
            for s in shards
        ],
    }
    tamis.mkdir(parents=True, exist_ok=True)
    (tamis / "plan.json").write_bytes(orjson.dumps(plan))
    job = {"name": "detox", "source": "corpus", "config_hash": CONFIG_HASH}
    (tamis / "job.json").write_bytes(orjson.dumps(job))
    for s in done:
        for u, _, _ in bounds:
            write_receipt(path, s, u)
        (tamis / "shards" / s).parent.mkdir(parents=True, exist_ok=True)
        (tamis / "shards" / f"{s}.json").write_bytes(orjson.dumps({"mark": "m", "entry": {}}))


def write_receipt(path: Path, shard: str, unit: int, *, dead: int = 0) -> Receipt:
    """Commit a unit of the plan, as a worker does."""
    folder = Folder(str(path))
    plan = next(s for s in load_plan(folder).shards if s.name == shard)
    cut = plan.units[unit]
    receipt = Receipt(
        shard=shard,
        unit=unit,
        first_row=cut.first_row,
        rows=cut.rows,
        kept=cut.rows - dead,
        dropped=0,
        dead=dead,
        changed=1,
        edits=1,
        key=plan_key(plan, CONFIG_HASH),
        digest="d",
        text_bytes=2000,
        counters={"rewrite.tokens_in": 100, "rewrite.tokens_out": 400},
    )
    folder.write(unit_name(shard, unit), b"")
    folder.write(receipt_name(shard, unit), receipt.dumps())
    return receipt


def write_event(path: Path, *, worker: str = "host-1-abc", **fields) -> None:
    """Append one event of a worker."""
    target = path / "_tamis" / "events" / f"{worker}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as file:
        file.write(orjson.dumps({"worker": worker, **fields}) + b"\n")
