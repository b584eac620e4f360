"""What the embed job's report says: what was embedded and how, the vectors' lengths, the index and its recall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipelines.report import charts
from pipelines.report.formatting import count, percent
from pipelines.report.output import Output
from pipelines.report.stats import Floats, Histogram, Smallest, field_of, numbers, row_hashes

INFO_SUFFIX, SCALE_SUFFIX = "_info", "_scale"
_SAMPLE = 20_000
_STATUS = {
    "ok": "whole",
    "mean": "over the limit: mean of windows",
    "truncated": "over the limit: cut",
    "empty": "empty: no vector",
    "null": "null vector: left out",
}


@dataclass
class EmbeddingStats:
    """What `<attribute>_info` and the manifest say of an embedding.

    Attributes:
        attribute: Its name.
        status: Rows by what was done to their text.
        norms: A sample of the lengths the model gave its vectors, in hash order.
        tokens: A sample of the tokens of whole texts, in hash order.
        longest: Tokens of the longest text.
        windows: Windows that were embedded.
    """

    attribute: str
    status: Counter[str] = field(default_factory=Counter)
    norms: Floats = field(default_factory=lambda: np.zeros(0))
    tokens: Floats = field(default_factory=lambda: np.zeros(0))
    longest: int = 0
    windows: int = 0

    @classmethod
    def of(cls, output: Output) -> EmbeddingStats | None:
        """Read the folder's info sidecar once; None where the job is another."""
        manifest = output.manifest
        if manifest.get("job") != "embed":
            return None
        stats = cls(str(manifest["config"]["attribute"]))
        norms, tokens = Smallest(_SAMPLE), Smallest(_SAMPLE)
        for file, batch in output.batches(f"attributes/{stats.attribute}{INFO_SUFFIX}"):
            value = batch.column("value")
            hashes = row_hashes(file, numbers(batch.column("row")))
            lengths, sizes = numbers(field_of(value, "norm")), numbers(field_of(value, "tokens"))
            for kept, values in ((norms, lengths), (tokens, np.where(sizes > 0, sizes, np.nan))):
                kept.offer(np.where(np.isnan(values), np.nan, hashes), values.tolist())
            for item in pc.value_counts(field_of(value, "status")).to_pylist():
                stats.status[str(item["values"])] += int(item["counts"])
            stats.longest = max(stats.longest, int(np.nan_to_num(sizes).max(initial=0)))
            stats.windows += int(np.nan_to_num(numbers(field_of(value, "windows"))).sum())
        stats.norms, stats.tokens = np.array(norms.items), np.array(tokens.items)
        return stats

    @property
    def attributes(self) -> frozenset[str]:
        """Attributes that are shown here and nowhere else."""
        return frozenset(self.attribute + suffix for suffix in ("", INFO_SUFFIX, SCALE_SUFFIX))

    @property
    def vectors(self) -> int:
        """Rows with a vector."""
        return sum(n for name, n in self.status.items() if name not in ("empty", "null"))


def headline(stats: EmbeddingStats, manifest: Mapping[str, Any]) -> str:
    """One sentence on what came of it."""
    rows = sum(stats.status.values())
    encoder = str((manifest.get("config") or {}).get("encoder", "an encoder"))
    without = rows - stats.vectors
    tail = f"; {count(without)} have none" if without else ""
    noun = "document" if rows == 1 else "documents"
    return f"{count(stats.vectors)} of {count(rows)} {noun} embedded with {encoder}{tail}"


def tiles(stats: EmbeddingStats, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers at the top."""
    totals, config = manifest.get("totals", {}), manifest.get("config") or {}
    rows = sum(stats.status.values())
    long = stats.status["truncated"] + stats.status["mean"]
    done = "averaged over windows" if config.get("long") == "mean" else "cut there"
    shown = [
        {
            "value": count(stats.vectors),
            "label": "vectors",
            "note": f"of {_dimension(manifest)} numbers, stored as {config.get('store', 'float32')}",
        },
        {
            "value": count(rows - stats.vectors),
            "label": "rows without a vector",
            "note": "empty text, mostly",
        },
        {
            "value": count(long),
            "label": "over the model's limit",
            "note": f"{percent(long / rows if rows else None)} of all, {done}",
        },
    ]
    index = manifest.get("index")
    if index and index.get("recall"):
        recall = index["recall"]
        shown.append(
            {
                "value": f"{recall['value']:.3f}",
                "label": f"recall@{recall['at']} of the index",
                "note": index["factory"] + (f", probe {index['probe']}" if index.get("probe") else ""),
            }
        )
    shown.append({"value": count(totals.get("rows_dead", 0)), "label": "dead rows", "note": "in dead/"})
    return shown


def context(stats: EmbeddingStats | None, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the template is filled with; None where nothing was embedded."""
    if stats is None:
        return None
    config = manifest.get("config") or {}
    rows = sum(stats.status.values())
    order = [s for s in _STATUS if stats.status[s]] + sorted(s for s in stats.status if s not in _STATUS)
    model: Mapping[str, Any] = next((m for m in manifest.get("models", []) if m.get("kind") == "encoder"), {})
    extra = model.get("extra", {})
    made = [
        ("encoder", f"{model.get('name', '')}@{model.get('revision', '')}"),
        ("text", config.get("text")),
        ("prompt", config.get("prompt") or "none"),
        ("pooling", extra.get("pooling")),
        (
            "unit length",
            _yes(extra.get("normalizes") if config.get("normalize") is None else config["normalize"]),
        ),
        ("compared by", extra.get("similarity")),
        ("numbers a vector", _dimension(manifest)),
        ("stored as", config.get("store")),
        ("computed in", config.get("dtype")),
        ("longest text", f"{stats.longest:,} tokens" if stats.longest else None),
        ("windows embedded", count(stats.windows)),
    ]
    return {
        "facts": [(name, value) for name, value in made if value not in (None, "")],
        "status": [(_STATUS.get(s, s), stats.status[s], stats.status[s] / rows) for s in order],
        "norms": _chart(stats.norms, "length of the vector as the model gave it"),
        "tokens": _chart(stats.tokens, "tokens of the whole text"),
        "index": _index(manifest.get("index")),
    }


def _index(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not entry:
        return None
    recall = entry.get("recall")
    facts = [
        ("FAISS", entry["factory"]),
        ("vectors", count(entry["vectors"])),
        ("compared by", entry["metric"]),
        (
            "trained on",
            f"{entry['trained_on']:,} vectors drawn by the hash of their ids" if entry["trained_on"] else "",
        ),
        ("parts", f"{len(entry['parts'])}, {sum(p['bytes'] for p in entry['parts']) / 1e6:,.1f} MB"),
        ("probe", entry.get("probe")),
    ]
    rows = []
    if recall:
        rows = [(step["probe"] or "all", step["recall"]) for step in recall["tried"]]
    return {"facts": [(n, v) for n, v in facts if v not in (None, "")], "recall": recall, "rows": rows}


def _dimension(manifest: Mapping[str, Any]) -> int:
    config = manifest.get("config") or {}
    for model in manifest.get("models", []):
        if model.get("kind") == "encoder":
            return int(config.get("dimensions") or model.get("extra", {}).get("dimension") or 0)
    return 0


def _chart(values: Floats, title: str) -> str | None:
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-4 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    histogram = Histogram(24, low, high)
    histogram.add(values)
    return charts.one_histogram(histogram, title)


def _yes(value: Any) -> str:
    return "yes" if value else "no"
