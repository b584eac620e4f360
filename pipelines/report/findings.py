"""Everything the report and the card say, gathered once from an output folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.report.costs import Losses, losses
from pipelines.report.documents import DocumentStats, document_stats, other_attributes
from pipelines.report.edits import EditStats, edit_stats
from pipelines.report.embedding import EmbeddingStats
from pipelines.report.output import Output
from pipelines.report.stats import Floats

# What a manifest may leave out; the templates take these for granted.
_OPTIONAL: dict[str, Any] = {
    "seconds": None,
    "seed": None,
    "lineage": None,
    "models": [],
    "shards": [],
    "counters": {},
    "config": {},
    "environment": {},
}


@dataclass(frozen=True)
class Findings:
    """What a job left behind, as numbers and a few samples; the parts a job has no data for are None or empty.

    Attributes:
        manifest: The manifest.
        documents: From the `toxicity` attributes.
        edits: From `edits/`.
        dropped: From `dropped/`.
        dead: From `dead/`.
        attributes: Samples of numeric attributes not covered by `documents`.
        tables: Tables of the folder besides `data`.
        embedding: From the info beside an embedding.
        views: Of contrastive decoding, where the run measured them afterwards.
    """

    manifest: Mapping[str, Any]
    documents: DocumentStats | None
    edits: EditStats | None
    dropped: Losses | None
    dead: Losses | None
    attributes: Mapping[str, Floats]
    tables: tuple[str, ...]
    embedding: EmbeddingStats | None = None
    views: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, output: Output) -> Findings:
        """Read the folder once, streaming.

        Raises:
            OutputError: It has no manifest.
        """
        manifest = {**_OPTIONAL, **output.require_manifest()}
        embedding = EmbeddingStats.of(output)
        return cls(
            manifest=manifest,
            documents=document_stats(output, _tau(manifest)),
            edits=edit_stats(output),
            dropped=losses(output, "dropped"),
            dead=losses(output, "dead"),
            attributes=other_attributes(output, embedding.attributes if embedding else frozenset()),
            tables=tuple(t for t in output.tables if t != "data"),
            embedding=embedding,
            views=_views(output, manifest),
        )

    @property
    def totals(self) -> Mapping[str, int]:
        """Sums over all shards."""
        totals: Mapping[str, int] = self.manifest.get("totals", {})
        return totals


def _views(output: Output, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was measured after this very run; None where that was another one's."""
    views = output.read_json("_tamis/views.json")
    return views if views and views.get("run") == manifest.get("run_id") else None


def _tau(manifest: Mapping[str, Any]) -> float | None:
    gate = (manifest.get("config") or {}).get("gate")
    tau = gate.get("tau") if isinstance(gate, Mapping) else None
    return float(tau) if isinstance(tau, int | float) else None
