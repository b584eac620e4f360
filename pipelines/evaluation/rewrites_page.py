"""The page of `tamis eval rewrites`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.metrics.bootstrap import Interval, ends
from pipelines.evaluation import charts
from pipelines.evaluation.page import Figure, Grid, Section, Text, Texts, Tile, render_page
from pipelines.report.charts import unchecked
from pipelines.report.words import word_diff
from transforms.evaluation.rewrites import METRICS

if TYPE_CHECKING:
    from pipelines.eval_rewrites import RewritesResult
    from pipelines.evaluation.pairs import Pairs

_MOST_CHARACTERS = 1_500
_NAMES = {
    "J": "J: harmless, near and fluent at once",
    "STA": "STA: share the judge finds harmless",
    "SIM": "SIM: similarity to the source",
    "FL": "FL: share of acceptable sentences",
}


def render(
    result: RewritesResult,
    record: Mapping[str, Any],
    pairs: Pairs,
    texts: Mapping[str, Sequence[str]],
    examples: int,
) -> str:
    """The page as HTML.

    Args:
        result: The figures.
        record: What `results.json` will hold.
        pairs: Sources and references, for examples.
        texts: Outputs by system, for examples.
        examples: How many texts a group.
    """
    order = result.ranked()
    best = order[0]
    with unchecked():
        sections = [_metrics(result, order), _table(result, record, order)]
    if examples:
        sections.append(_examples(result, pairs, texts, order, examples))
    warnings = [result.note] if result.note else []
    warnings += [
        f"{name} has no text for {n:,} of {result.rows:,} rows; they count as empty."
        for name, n in result.missing.items()
        if n
    ]
    j = result.systems[best].metrics["J"]
    return render_page(
        job="eval rewrites",
        headline=f"{best} has the best J of {len(order)} systems: {j.mean:.3f}",
        lede=f"{result.rows:,} sentences from {pairs.table.source}, judged one by one by {record['judging']['judge']}.",
        tiles=[
            Tile(
                f"{result.systems[n].metrics['J'].mean:.3f}",
                f"J of {n}",
                _range(result.systems[n].metrics["J"]),
            )
            for n in order[:5]
        ],
        sections=sections,
        record=record,
        warnings=warnings,
    )


def _metrics(result: RewritesResult, order: Sequence[str]) -> Section:
    figures = [
        Figure(
            charts.interval_bars(
                [(n, result.systems[n].metrics[m]) for n in order], title=_NAMES[m], highlight=result.against
            ),
            _NAMES[m],
        )
        for m in METRICS
    ]
    say = (
        "J is the mean over sentences of STA x SIM x FL, so a sentence counts only as far as it is harmless, near its "
        f"source and fluent at once. Bars in grey: {result.against}. {result.fluency} An output with nothing left has SIM and FL 0."
    )
    return Section("systems", "Systems", say, figures)


def _table(result: RewritesResult, record: Mapping[str, Any], order: Sequence[str]) -> Section:
    overlap = any(x.chrf for x in result.systems.values())
    rows, pairs = [], []
    for name in order:
        x = result.systems[name]
        cells = [
            _label(result, name),
            *(_figure(x.metrics[m]) for m in METRICS),
            f"{x.geometric.mean:.3f}",
            f"{x.toxicity.mean:.3f}",
        ]
        if overlap:
            cells += [
                "–" if x.chrf is None else f"{x.chrf.mean:.1f}",
                "–" if x.bleu is None else _figure(x.bleu, 1),
            ]
        cells += [f"{100 * v:.1f} %" for v in (x.facts.mean, x.copied, x.empty)]
        rows.append(cells)
        if name in result.changes:
            by = result.changes[name]
            adjusted = record["changes"][name]["J_p_value_holm"]
            deltas = [_signed(by[m].difference) + (" *" if by[m].p_value < 0.05 else "") for m in METRICS]
            pairs.append([_label(result, name), *deltas, f"{by['J'].p_value:.4f}", f"{adjusted:.4f}"])
    head = ["system", *METRICS, "geometric", "toxicity", *(["chrF", "BLEU"] if overlap else [])]
    note = (
        "Intervals (95 %) by bootstrap over sentences. Geometric: cube root of mean STA x mean SIM x mean FL, as earlier "
        "work reports. Facts: outputs that keep every number, name, address and negation and make none up."
    )
    blocks = [Grid([*head, "facts", "copied", "empty"], rows, note=note)]
    if pairs:
        blocks.append(
            Grid(
                ["system", *(f"Δ{m}" for m in METRICS), "p (J)", "p, Holm"],
                pairs,
                title=f"Difference from {result.against}",
                note="Paired bootstrap over sentences; * below 0.05 taken alone, Holm's correction is over all systems.",
            )
        )
    return Section("figures", "Figures", "", blocks)


def _examples(
    result: RewritesResult,
    pairs: Pairs,
    texts: Mapping[str, Sequence[str]],
    order: Sequence[str],
    examples: int,
) -> Section:
    groups = []
    shown = [n for n in order if n not in ("copy", "human")] or list(order)
    focus = result.against if result.against in shown else shown[0]
    for name in dict.fromkeys([focus, shown[0]]):
        joint = result.measures[name].joint
        by_joint = np.lexsort((np.arange(len(joint)), joint))
        by_joint = by_joint[result.measures[name].rows[by_joint]]
        for title, chosen in (
            (f"{name}: worst by J", by_joint[:examples]),
            (f"{name}: best by J", by_joint[::-1][:examples]),
        ):
            groups.append(Texts(title, [_text(result, pairs, texts, name, int(i), order) for i in chosen]))
    say = "The texts may offend, so they are veiled; click one to read it, with what the other systems made of it."
    return Section("examples", "Examples", say, groups)


def _text(
    result: RewritesResult,
    pairs: Pairs,
    texts: Mapping[str, Sequence[str]],
    name: str,
    i: int,
    order: Sequence[str],
) -> Text:
    m = result.measures[name]
    meta = [
        ("J", f"{m.joint[i]:.2f}"),
        ("toxicity", f"{m.toxicity[i]:.2f}"),
        ("SIM", f"{m.sim[i]:.2f}"),
        ("acceptability", f"{m.acceptability[i]:.2f}"),
        ("row", str(pairs.rows[i])),
    ]
    more = [("source", _cut(pairs.sources[i]))]
    for other in order:
        x = result.measures[other]
        if other not in (name, "copy") and x.rows[i]:
            more.append((f"{other} (J {x.joint[i]:.2f})", _cut(texts[other][i]) or "(nothing)"))
    return Text(meta, word_diff(_cut(pairs.sources[i]), _cut(texts[name][i])), more)


def _label(result: RewritesResult, name: str) -> str:
    """A system's name, with the number of sentences it was measured on where that is not all of them."""
    n = result.systems[name].metrics["J"].n
    return name if n == result.rows else f"{name} ({n:,} sentences)"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"


def _figure(x: Interval, places: int = 3) -> str:
    return f"{x.mean:.{places}f} {ends(x.as_dict(), places)}"


def _range(x: Interval) -> str:
    return ends(x.as_dict(), between=" to ")


def _signed(x: Interval) -> str:
    return f"{x.mean:+.3f} {ends(x.as_dict(), sign='+')}"
