"""The page of `tamis judgments agree`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.metrics.bootstrap import Interval, ends
from pipelines.evaluation import charts
from pipelines.evaluation.page import Figure, Grid, Section, Tile, render_page
from pipelines.report.charts import unchecked

if TYPE_CHECKING:
    from pipelines.judgments_agree import AgreeResult, SetAgreement

_FIGURES = (
    ("precision", "precision"),
    ("recall", "recall"),
    ("f1", "F1"),
    ("accuracy", "accuracy"),
    ("kappa", "kappa"),
    ("weighted_kappa", "weighted kappa"),
    ("alpha", "alpha"),
    ("auc", "AUC"),
    ("tau", "tau-b"),
)


def render(result: AgreeResult, record: Mapping[str, Any], measure: str) -> str:
    """The page as HTML.

    Args:
        result: The figures.
        record: What `results.json` will hold.
        measure: By which runs were scored.
    """
    best = result.best
    with unchecked():
        sections = [_agreement(result), *(_one(s, result.against) for s in result.sets)]
        if any(s.runs for s in result.sets):
            sections.append(_runs(result, measure))
    kappa = best.figures["kappa"]
    auc = best.figures["auc"]
    tiles = [
        Tile(_mean(kappa), f"kappa of {best.name}", _ends(kappa)),
        Tile(_mean(auc), "AUC within a query", f"{_ends(auc)}; chance is 0.5" if auc else "not defined"),
        Tile(
            f"{best.positives[0].mean:.2f}",
            "positives a query",
            f"{best.positives[1].mean:.2f} by {result.against}",
        ),
        Tile(f"{100 * best.unreadable_share:.1f} %", "replies unreadable", f"of {best.asked:,}"),
    ]
    return render_page(
        job="judgments agree",
        headline=f"{best.name} agrees with {result.against} with a kappa of {_mean(kappa)}",
        lede="Every annotator and signal stands by itself. Kappa is agreement beyond chance (0 = chance, 1 = the same); AUC is "
        "the share of a query's (positive, negative) pairs put in the right order; weighted kappa and alpha compare grades. "
        "Intervals (95 %) draw queries with replacement.",
        tiles=tiles,
        sections=sections,
        record=record,
        warnings=result.notes,
    )


def _agreement(result: AgreeResult) -> Section:
    rows = [
        [
            s.name,
            f"{s.queries:,}",
            f"{s.pairs:,}",
            *(_cell(s.figures.get(key)) for key, _ in _FIGURES),
            f"{s.positives[0].mean:.2f}",
            f"{s.positives[1].mean:.2f}",
            f"{100 * s.covered:.1f} %",
            f"{100 * s.unreadable_share:.1f} %",
        ]
        for s in result.sets
    ]
    head = (
        "labels of",
        "queries",
        "pairs",
        *(title for _, title in _FIGURES),
        "positives a query",
        f"by {result.against}",
        f"positives of {result.against} asked about",
        "unreadable",
    )
    blocks: list[Figure | Grid] = []
    bars = [(s.name, s.figures["kappa"]) for s in result.sets]
    shown = [(name, x) for name, x in bars if x is not None]
    if shown:
        blocks.append(Figure(charts.interval_bars(shown, title="Cohen's kappa")))
    note = (
        f"Recall is over the positives of {result.against} that were asked about; the share that was is beside it: a pool that "
        "misses positives is not the judge's fault. Unreadable replies are no labels and count nowhere else."
    )
    blocks.append(Grid(head, rows, note=note, strong=(result.sets.index(result.best),)))
    return Section("agreement", "Agreement", "", blocks)


def _one(s: SetAgreement, against: str) -> Section:
    rows, columns, counts = s.confusion
    body = [[name, *(f"{n:,}" for n in line)] for name, line in zip(rows, counts, strict=True)]
    blocks = [Grid((f"{s.name} \\ {against}", *columns), body, title="Labels against labels")]
    if s.cuts:
        cut_rows = [
            [
                f"grade {g} and up",
                *(_cell(f[k]) for k in ("precision", "recall", "f1", "kappa")),
                f"{p.mean:.2f}",
            ]
            for g, f, p in s.cuts
        ]
        head = ("positive is", "precision", "recall", "F1", "kappa", "positives a query")
        note = (
            "A cut-off chosen here is chosen on the queries it is measured on: choose it on others before quoting its "
            "figures."
        )
        blocks.append(Grid(head, cut_rows, title="Cut-offs", note=note))
    if any(x is not None for x in s.by_set.values()):
        blocks.append(_sets(s, against))
    anchor = "set-" + "".join(c if c.isalnum() else "-" for c in s.name)
    return Section(anchor, s.name, "", blocks)


def _sets(s: SetAgreement, against: str) -> Grid:
    own = s.by_set
    body = [
        ["some", *(_cell(own.get(k)) for k in ("precision", "recall", "f1")), "", _cell(own.get("selected"))],
        ["none", "", "", "", _cell(own.get("empty_accuracy")), _cell(own.get("empty_selected"))],
    ]
    head = (f"positives of {against}", "precision", "recall", "F1", "none found either", "positives found")
    note = "Means over queries. Where nothing is positive, precision and recall are not defined: there the right set is the empty one."
    return Grid(
        head,
        [r for r, k in zip(body, ("f1", "empty_accuracy"), strict=True) if own.get(k)],
        title="Sets",
        note=note,
    )


def _runs(result: AgreeResult, measure: str) -> Section:
    blocks = []
    for s in result.sets:
        rows = [
            [
                name,
                f"{x.a.mean:.4f} {ends(x.a.as_dict(), 4)}",
                f"{x.b.mean:.4f} {ends(x.b.as_dict(), 4)}",
                f"{x.change.difference.mean:+.4f} {ends(x.change.difference.as_dict(), 4, '+')}",
                f"{x.change.p_value:.4f}",
                f"{100 * x.judged_a:.0f} %",
                f"{100 * x.judged_b:.0f} %",
            ]
            for name, x in s.runs.items()
        ]
        head = (
            "run",
            f"with {s.name}",
            f"with {result.against}",
            "difference",
            "p",
            "judged",
            f"judged by {result.against}",
        )
        note = "" if s.order is None else f"Kendall's tau-b of the order of the runs: {s.order}."
        blocks.append(Grid(head, rows, title=f"{measure}, {s.name}", note=note))
    say = (
        "The same rankings scored with each set of labels, over queries in which both found a positive. As trec_eval computes "
        "it: linear gain, equal scores ordered by document id descending, documents without a label count 0."
    )
    return Section("runs", "Rankings", say, blocks)


def _cell(x: Interval | None) -> str:
    return "–" if x is None else f"{x.mean:.3f} {ends(x.as_dict())}"


def _mean(x: Interval | None) -> str:
    return "–" if x is None else f"{x.mean:.3f}"


def _ends(x: Interval | None) -> str:
    return "not defined" if x is None else ends(x.as_dict(), between=" to ")
