"""The page of `tamis eval spans`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from models.metrics.bootstrap import ends
from pipelines.evaluation import charts
from pipelines.evaluation.page import Figure, Grid, Section, Text, Texts, Tile, render_page
from pipelines.report.charts import unchecked

if TYPE_CHECKING:
    from pipelines.eval_spans import Posts, SpansResult

_MOST_CHARACTERS = 1_500


def render(
    result: SpansResult, record: Mapping[str, Any], posts: Posts, found: Sequence[set[int]], examples: int
) -> str:
    """The page as HTML.

    Args:
        result: The figures.
        record: What `results.json` will hold.
        posts: Texts and gold spans, for examples.
        found: Characters the best mix predicts.
        examples: How many posts to show.
    """
    best = result.mixes[result.best]
    with unchecked():
        sections = [_figures(result)]
        if result.sweeps:
            sections.append(_sweep(result))
    if examples:
        sections.append(_examples(result, posts, found, examples))
    tiles = [
        Tile(
            f"{best.f1.mean:.3f}",
            f"character F1 of {result.best}",
            ends(best.f1.as_dict(), between=" to "),
        ),
        Tile(f"{result.posts:,}", "posts", f"{result.toxic:,} with gold spans"),
        Tile(f"{result.baselines['everything'].mean:.3f}", "marking everything", "baseline"),
        Tile(f"{result.baselines['nothing'].mean:.3f}", "marking nothing", "baseline"),
    ]
    return render_page(
        job="eval spans",
        headline=f"{result.best} finds toxic spans with a character F1 of {best.f1.mean:.3f}",
        lede="Mean over posts of the F1 of toxic characters, as SemEval-2021 task 5 scores it: a post without gold spans "
        "counts 1 where nothing was predicted, else 0. Intervals (95 %) are by post.",
        tiles=tiles,
        sections=sections,
        record=record,
    )


def _figures(result: SpansResult) -> Section:
    rows = []
    for name, x in result.mixes.items():
        change = result.changes.get(name)
        d = change.difference if change else None
        rows.append(
            [
                name,
                f"{x.f1.mean:.4f} {ends(x.f1.as_dict(), 4)}",
                "–" if x.f1_toxic is None else f"{x.f1_toxic.mean:.4f}",
                "–" if x.precision is None else f"{x.precision.mean:.3f}",
                "–" if x.recall is None else f"{x.recall.mean:.3f}",
                f"{x.empty:,}",
                "–" if d is None else f"{d.mean:+.4f} {ends(d.as_dict(), 4, '+')}",
                "–" if change is None else f"{change.p_value:.4f}",
            ]
        )
    head = (
        "sources",
        "F1",
        "F1, posts with gold",
        "precision",
        "recall",
        "posts without a span",
        f"F1 against {result.against}",
        "p",
    )
    bars = charts.interval_bars(
        [
            *((n, x.f1) for n, x in result.mixes.items()),
            *((f"({n})", x) for n, x in result.baselines.items()),
        ],
        title="Character F1",
    )
    note = "A span that several sources found counts for each of them, with the extent of their union."
    if result.missing:
        note += f" {result.missing:,} posts are not among the predictions and count as empty."
    strong = (list(result.mixes).index(result.best),)
    return Section("f1", "Character F1", "", [Figure(bars), Grid(head, rows, note=note, strong=strong)])


def _sweep(result: SpansResult) -> Section:
    rows = []
    for name, points in result.sweeps.items():
        threshold, f1 = max(points, key=lambda p: p[1])
        rows.append([name, f"{points[0][1]:.4f}", f"{threshold:g}", f"{f1:.4f}"])
    shown = dict(list(result.sweeps.items())[-5:])
    chart = charts.curves(shown, x_title="least score of a span", y_title="F1", title="F1 by threshold")
    say = "A threshold chosen here is chosen on the posts it is measured on: choose it on others before quoting its F1."
    grid = Grid(("sources", "F1, all spans", "best threshold", "F1 there"), rows)
    return Section("threshold", "Thresholds", say, [Figure(chart), grid])


def _examples(result: SpansResult, posts: Posts, found: Sequence[set[int]], examples: int) -> Section:
    each = result.mixes[result.best].each
    order = sorted(range(len(each)), key=lambda i: (each[i], i))
    half = max(1, examples // 2)
    groups = []
    for title, chosen in (("Worst", order[:half]), ("Best", order[::-1][:half])):
        texts = []
        for i in chosen:
            text = posts.texts[i][:_MOST_CHARACTERS]
            gold = " | ".join(posts.texts[i][a:b] for a, b in _ranges(posts.gold[i])) or "(nothing)"
            texts.append(
                Text([("F1", f"{each[i]:.2f}"), ("post", str(i))], _marked(text, found[i]), [("Gold", gold)])
            )
        groups.append(Texts(title, texts))
    return Section("posts", "Posts", f"What {result.best} marks; the gold spans are inside the fold.", groups)


def _marked(text: str, found: set[int]) -> list[tuple[str, str]]:
    return [
        ("mark" if inside else "equal", "".join(c for _, c in part))
        for inside, part in itertools.groupby(enumerate(text), key=lambda pair: pair[0] in found)
    ]


def _ranges(offsets: set[int]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for i in sorted(offsets):
        if out and out[-1][1] == i:
            out[-1] = (out[-1][0], i + 1)
        else:
            out.append((i, i + 1))
    return out
