"""The report page: gathers what the modules beside it measured and sets it in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.report import charts, embedding
from pipelines.report.costs import Losses, other_counters, step_costs, token_counts
from pipelines.report.documents import DocumentStats
from pipelines.report.edits import ACTIONS, REWRITTEN, EditStats
from pipelines.report.findings import Findings
from pipelines.report.formatting import (
    ACTION_NAMES,
    count,
    environment,
    flatten,
    heat_pieces,
    percent,
    seconds,
    temperature,
    two_places,
)
from pipelines.report.stats import THRESHOLDS, Histogram
from pipelines.report.steering import steering_context
from pipelines.report.words import word_diff

_COLOURS = {
    "rewrite": charts.AFTER,
    "span_edit": charts.AFTER,
    "drop_document": charts.BEFORE,
    "flag": charts.BEFORE,
}
_MAX_SHARDS = 50
_MAX_CANDIDATE = 1_000
_MAX_TEXT = 6_000  # characters of one text shown; a 50 MB text must not end in the page


@dataclass(frozen=True)
class JudgeScores:
    """Toxicity as an independent scorer sees it: one that had no part in choosing the rewrites.

    Attributes:
        name: `name@revision` of the scorer.
        before: Scores of n texts as they came.
        after: Scores of the same texts now.
        unit: What was scored.
    """

    name: str
    before: npt.ArrayLike
    after: npt.ArrayLike
    unit: str = "documents"


def render_report(found: Findings, judge: JudgeScores | None = None) -> str:
    """The report of a finished output as HTML.

    Args:
        found: What the folder holds.
        judge: Scores of an independent judge, if there are any.
    """
    with charts.unchecked():
        context = _context(found, judge)
    return str(environment().get_template("report.html.jinja").render(context))


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _context(found: Findings, judge: JudgeScores | None) -> dict[str, Any]:
    """What the template is filled with."""
    manifest, documents, edits = found.manifest, found.documents, found.edits
    shards = manifest.get("shards", [])
    return {
        "m": manifest,
        "css": (Path(__file__).parent / "report.css").read_text(encoding="utf-8"),
        "totals": found.totals,
        "headline": _headline(found),
        "tiles": _tiles(found, judge),
        "toxicity": _toxicity(documents, edits),
        "judge": _judge(judge),
        "flow": _flow(documents, edits),
        "samples": _samples(edits),
        "candidates": _candidates(manifest, edits),
        "steering": steering_context(found.views),
        "agreement": _agreement(documents),
        "embedding": embedding.context(found.embedding, manifest),
        "attributes": [charts.histogram(v, title=name) for name, v in list(found.attributes.items())[:24]],
        "cost": _cost(manifest),
        "dropped": _losses(found.dropped),
        "dead": _losses(found.dead),
        "models": manifest.get("models", []),
        "config": flatten(manifest.get("config") or {}),
        "lineage": flatten(manifest.get("lineage") or {}),
        "shards": shards[:_MAX_SHARDS],
        "more_shards": max(0, len(shards) - _MAX_SHARDS),
        "prompts": sorted(edits.prompts) if edits else [],
    }


def _headline(found: Findings) -> str:
    """One sentence that says what came of the job."""
    totals, documents, edits = found.totals, found.documents, found.edits
    rows, changed = totals.get("rows_in", 0), totals.get("rows_changed", 0)
    noun = "document" if rows == 1 else "documents"
    if found.embedding:
        return embedding.headline(found.embedding, found.manifest)
    if edits:
        flagged = (
            f"{count(documents.flagged_before)} held toxic passages; "
            if documents and documents.knows_flags
            else ""
        )
        kept = totals.get("rows_kept", rows) - changed
        return f"Of {count(rows)} {noun}, {flagged}{count(changed)} were rewritten in part and {count(kept)} came through untouched"
    if documents and documents.knows_flags:
        return f"{count(rows)} {noun} scored, {count(documents.flagged_before)} flagged, no text changed"
    return f"{count(rows)} {noun} went through, {count(changed) if changed else 'none'} changed"


def _tiles(found: Findings, judge: JudgeScores | None) -> list[dict[str, Any]]:
    """The numbers at the top: value, label, and a note in small print."""
    totals, documents, edits = found.totals, found.documents, found.edits
    rows = totals.get("rows_in", 0)
    if found.embedding:
        return embedding.tiles(found.embedding, found.manifest)
    tiles = [
        {"value": count(rows), "label": "documents in", "note": f"{count(totals.get('rows_kept'))} kept"},
        {
            "value": count(totals.get("rows_changed", 0)),
            "label": "changed",
            "note": f"{percent(_share(totals.get('rows_changed', 0), rows))} of all",
        },
    ]
    if documents and documents.knows_flags:
        after = documents.flagged_after if documents.has_after else None
        note = f"{percent(_share(documents.flagged_before, documents.before.n))} of all came flagged"
        tiles.append(
            {
                "before": count(documents.flagged_before),
                "value": count(after),
                "label": "flagged documents",
                "note": note,
            }
            if after is not None
            else {"value": count(documents.flagged_before), "label": "flagged documents", "note": note}
        )
    if edits and edits.toxicity_before.n:
        tiles.append(
            {
                "before": two_places(edits.toxicity_before.mean),
                "value": two_places(edits.toxicity_after.mean),
                "label": "toxicity of replaced passages",
                "note": f"mean of {count(edits.toxicity_before.n)}, by the ranking scorer",
            }
        )
    if judge is not None:
        tiles.append(
            {
                "before": two_places(float(np.mean(np.asarray(judge.before, np.float64)))),
                "value": two_places(float(np.mean(np.asarray(judge.after, np.float64)))),
                "label": "independent judge",
                "note": judge.name,
            }
        )
    if edits and documents and documents.characters:
        untouched = 1 - edits.characters / documents.characters
        tiles.append(
            {
                "value": percent(untouched),
                "label": "of the text untouched",
                "note": "all outside the recorded edits",
            }
        )
    lost = [(totals.get(k, 0), w) for k, w in (("rows_dropped", "dropped"), ("rows_dead", "dead"))]
    tiles.append(
        {
            "value": count(sum(n for n, _ in lost)),
            "label": "did not make it",
            "note": ", ".join(f"{count(n)} {w}" for n, w in lost),
        }
    )
    return tiles


def _toxicity(documents: DocumentStats | None, edits: EditStats | None) -> dict[str, Any] | None:
    if documents is None or not documents.before.n:
        return None
    after = documents.after if documents.has_after else None
    rows = [
        {
            "threshold": t,
            "before": _share(documents.before.above[t], documents.before.n),
            "after": _share(documents.after.above[t], documents.after.n) if after else None,
        }
        for t in THRESHOLDS
    ]
    panels: list[str] = []
    if edits and edits.labels and any(v.before.n for v in edits.labels.values()):
        panels = charts.label_panels({k: (v.before, v.after) for k, v in edits.labels.items()})
    return {
        "chart": charts.before_after(documents.before, after),
        "labels": panels,
        "mean_before": documents.before.mean,
        "mean_after": documents.after.mean if after else None,
        "n": documents.before.n,
        "rows": rows,
        "has_after": after is not None,
        "scorer": ", ".join(sorted(edits.scorers)) if edits else "",
    }


def _judge(judge: JudgeScores | None) -> dict[str, Any] | None:
    if judge is None:
        return None
    before, after = Histogram(), Histogram()
    before.add(np.asarray(judge.before))
    after.add(np.asarray(judge.after))
    return {
        "name": judge.name,
        "unit": judge.unit,
        "n": before.n,
        "mean_before": before.mean,
        "mean_after": after.mean,
        "over_before": _share(before.above[0.5], before.n),
        "over_after": _share(after.above[0.5], after.n),
        "chart": charts.before_after(before, after, unit=judge.unit),
    }


def _flow(documents: DocumentStats | None, edits: EditStats | None) -> dict[str, Any] | None:
    """Funnel, rungs, reasons and temperatures; None where nothing was gated nor edited."""
    segments = documents.segments if documents else {}
    if not segments and not edits:
        return None
    out: dict[str, Any] = {"funnel": None, "rungs": None, "reasons": None, "temperatures": None}
    if segments:
        replaced = sum(edits.actions[a] for a in REWRITTEN) if edits else 0
        stages: list[tuple[str, float]] = [("passages", segments["all"])]
        if 0 < segments["classifier"] < segments["all"]:
            stages.append(("passed to classifier", segments["classifier"]))
        stages.append(("flagged as toxic", segments["flagged"]))
        if edits:
            stages.append(("replaced in place", replaced))
        shares = [""] + [f" ({percent(_share(n, segments['all']))})" for _, n in stages[1:]]
        text = [f"{count(n)}{s}" for (_, n), s in zip(stages, shares, strict=True)]
        out["funnel"] = charts.bars(
            stages, colour=charts.BEFORE, suffixes=text, title="From passages to edits"
        )
    if edits:
        rungs = [(ACTION_NAMES.get(a, a), float(edits.actions[a])) for a in _known_first(edits.actions)]
        whole = sum(n for _, n in rungs)
        out["rungs"] = charts.bars(
            rungs,
            colour=[_COLOURS.get(a, charts.MUTED) for a in _known_first(edits.actions)],
            suffixes=[f"{count(n)} ({percent(_share(n, whole))})" for _, n in rungs],
            title="Edits by rung",
        )
        if edits.reasons:
            found = [(name.replace("_", " "), float(n)) for name, n in edits.reasons.most_common(14)]
            shares = [f"{count(n)} ({percent(_share(n, edits.candidates['all']))})" for _, n in found]
            out["reasons"] = charts.bars(
                found, colour=charts.MUTED, suffixes=shares, title="Candidates by failed condition"
            )
        if len(edits.all_temperatures) > 1:
            rows = [(temperature(t), float(edits.temperatures[t])) for t in sorted(edits.all_temperatures)]
            made = [edits.all_temperatures[float(t)] for t, _ in rows]
            text = [f"{count(n)} of {count(k)}" for (_, n), k in zip(rows, made, strict=True)]
            out["temperatures"] = charts.bars(rows, suffixes=text, title="Chosen candidates by temperature")
        out |= {"candidates": edits.candidates["all"], "passed": edits.candidates["passed"], "edits": edits.n}
    return out


def _known_first(actions: Mapping[str, int]) -> list[str]:
    return [a for a in ACTIONS if actions.get(a)] + sorted(a for a in actions if a not in ACTIONS)


def _candidates(manifest: Mapping[str, Any], edits: EditStats | None) -> dict[str, Any] | None:
    if not edits or not edits.points:
        return None
    accept = _group(manifest, "accept")
    limit = accept.get("max_toxicity")
    return {
        "chart": charts.scatter(
            edits.points,
            max_toxicity=_number(_group(manifest, "gate").get("tau") if limit is None else limit),
            min_similarity=_number(accept.get("min_similarity")),
        ),
        "shown": len(edits.points),
        "all": edits.candidates["all"],
        "similarity": edits.similarity.mean,
        "similarities": charts.one_histogram(edits.similarity, "similarity of replacements"),
        "passed": edits.candidates["passed"],
        "per_edit": edits.candidates["all"] / edits.n,
        "has_lines": bool(accept),
    }


def _group(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A group of settings; empty where the job has none of that name."""
    group = (manifest.get("config") or {}).get(name)
    return group if isinstance(group, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _agreement(documents: DocumentStats | None) -> dict[str, Any] | None:
    if documents is None:
        return None
    agreement = documents.agreement
    used = [i for i in range(len(agreement.names)) if agreement.count(i, i)]
    if len(used) < 2:
        return None
    names = [agreement.names[i] for i in used]
    pairs = []
    for a, i in enumerate(used):
        for j in used[a + 1 :]:
            if n := agreement.count(i, j):
                splits = [agreement.table[i, j, t].tolist() for t in range(len(THRESHOLDS))]
                pairs.append({"a": agreement.names[i], "b": agreement.names[j], "n": n, "splits": splits})
    matrix = [[agreement.correlation(i, j) for j in used] for i in used]
    return {"chart": charts.heat(names, matrix), "pairs": pairs, "thresholds": THRESHOLDS}


def _cost(manifest: Mapping[str, Any]) -> dict[str, Any]:
    counters = manifest.get("counters", {})
    steps = step_costs(counters)
    wall = manifest.get("seconds")
    rows = manifest.get("totals", {}).get("rows_in", 0)
    chart = None
    if len(steps) > 1 and any(s.seconds for s in steps):
        chart = charts.bars(
            [(s.name, s.seconds) for s in steps],
            suffixes=[seconds(s.seconds) for s in steps],
            colour=charts.AFTER,
            title="Seconds by step, over all workers",
        )
    return {
        "wall": wall,
        "rows_per_second": rows / wall if wall else None,
        "steps": steps,
        "chart": chart,
        "tokens": token_counts(counters),
        "counters": other_counters(counters),
    }


def _losses(found: Losses | None) -> dict[str, Any] | None:
    if found is None:
        return None
    groups = [{"stage": s, "reason": r, "n": n} for (s, r), n in found.groups.most_common(20)]
    return {
        "n": found.n,
        "groups": groups,
        "examples": found.examples,
        "more": max(0, len(found.groups) - 20),
    }


def _samples(edits: EditStats | None) -> list[dict[str, Any]]:
    if edits is None:
        return []
    return [
        {"title": title, "edits": [_sample(e) for e in group]}
        for title, group in edits.samples.items()
        if group
    ]


def _sample(edit: Mapping[str, Any]) -> dict[str, Any]:
    before, after = edit["before"][:_MAX_TEXT], edit["after"][:_MAX_TEXT]
    labels = zip(
        edit.get("labels") or [],
        edit.get("scores_before") or [],
        edit.get("scores_after") or [],
        strict=False,
    )
    return {
        **edit,
        "action_name": ACTION_NAMES.get(edit["action"], edit["action"]),
        "diff": word_diff(before, after),
        "heat": heat_pieces(before, edit.get("spans") or [], offset=edit["start"]),
        "label_rows": list(labels),
        "candidates": [
            {**c, "text": _clip(c["text"] or "", _MAX_CANDIDATE)} for c in (edit.get("candidates") or [])[:10]
        ],
        "cut": len(edit["before"]) > _MAX_TEXT or len(edit["after"]) > _MAX_TEXT,
    }


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + " …"
