"""The page of `tamis eval utility`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.metrics.bootstrap import Interval, ends
from pipelines.evaluation import charts
from pipelines.evaluation.page import Figure, Grid, Section, Tile, render_page
from pipelines.report.charts import unchecked
from pipelines.report.formatting import ACTION_NAMES

if TYPE_CHECKING:
    from pipelines.eval_utility import UtilityResult


def render(result: UtilityResult, record: Mapping[str, Any]) -> str:
    """The page as HTML."""
    with unchecked():
        sections = [s for s in (_perplexity(result), *_facts(result)) if s]
    return render_page(
        job="eval utility",
        headline=_headline(result),
        lede="What rewriting a corpus cost: how well a model trained on it still predicts neutral text, and which facts "
        "of the text are still there.",
        tiles=_tiles(result, record),
        sections=sections,
        record=record,
    )


def _headline(result: UtilityResult) -> str:
    if result.changes:
        name, change = next(iter(result.changes.items()))
        x = change.perplexity_ratio
        word = "higher" if x.mean > 0 else "lower"
        return f"On neutral text {name} has {abs(100 * x.mean):.1f} % {word} perplexity than {result.against}"
    if result.perplexity:
        name, figures = next(iter(result.perplexity.items()))
        return f"{name} has perplexity {figures.perplexity.mean:.1f} on neutral text"
    name, table = next(iter(result.facts.items()))
    return f"{100 * table.rows[0].whole.mean:.1f} % of {table.edits:,} edits of {name} lost no fact and made none up"


def _tiles(result: UtilityResult, record: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    if result.perplexity:
        tiles.append(Tile(f"{result.documents:,}", "neutral documents", f"{record['bytes']:,} bytes"))
        for name, change in list(result.changes.items())[:3]:
            x = change.perplexity_ratio
            note = f"{100 * x.low:+.1f} to {100 * x.high:+.1f} %, p {change.p_value:.3f}"
            tiles.append(
                Tile(f"{100 * x.mean:+.1f} %", f"perplexity of {name} against {result.against}", note)
            )
    for name, table in list(result.facts.items())[:3]:
        tiles.append(
            Tile(
                f"{100 * table.rows[0].whole.mean:.1f} %",
                f"edits of {name} with all facts",
                f"of {table.edits:,}",
            )
        )
    return tiles


def _perplexity(result: UtilityResult) -> Section | None:
    if not result.perplexity:
        return None
    rows = []
    for name, figures in result.perplexity.items():
        change = result.changes.get(name)
        rows.append(
            [
                name,
                _interval(figures.perplexity, 2),
                _interval(figures.bits_per_byte, 4),
                _percent(change.perplexity_ratio) if change else "–",
                f"{change.p_value:.4f}" if change else "–",
            ]
        )
    blocks: list[Figure | Grid] = [
        Figure(
            charts.interval_bars(
                [(n, f.bits_per_byte) for n, f in result.perplexity.items()],
                title="Bits by byte",
                places=4,
                highlight=result.against,
                from_zero=False,
            ),
            "Bits by byte (lower is better)",
        )
    ]
    if result.changes:
        blocks.append(
            Figure(
                charts.interval_bars(
                    [(n, c.perplexity_ratio.map(lambda v: 100 * v)) for n, c in result.changes.items()],
                    title="Change of perplexity in per cent",
                    places=1,
                ),
                f"Perplexity against {result.against}, per cent (below 0 is better)",
            )
        )
    head = ("model", "perplexity", "bits by byte", f"perplexity against {result.against}", "p")
    apart = not all(c.by_token for c in result.changes.values())
    note = "Intervals (95 %) are by document; differences are paired by document."
    note += " Models with another tokenizer are compared by byte, not by token." if apart else ""
    blocks.append(Grid(head, rows, note=note))
    say = "A neutral text none of the models was trained on. Perplexity is by token, bits by byte do not depend on the tokenizer."
    return Section("perplexity", "Neutral text", say, blocks)


def _facts(result: UtilityResult) -> list[Section]:
    sections = []
    for i, (name, table) in enumerate(result.facts.items()):
        rows = []
        for row in table.rows:
            cells = [
                "–" if (x := row.kept[k]) is None else f"{100 * x.mean:.1f} % of {row.there[k]:,}"
                for k in table.kinds
            ]
            action = ACTION_NAMES.get(row.action, row.action)
            rows.append(
                [action, f"{row.edits:,}", *cells, f"{row.invented:,}", _percent(row.whole, signed=False)]
            )
        head = ("rung", "edits", *table.kinds, "made up", "lost and made up nothing")
        say = (
            "Numbers, names, addresses (URLs, e-mail) and negations of each replaced passage that its replacement still "
            "has; what stood inside a toxic span is nothing to be kept."
        )
        grid = Grid(
            head, rows, note=f"{table.documents_dropped:,} documents were dropped as a whole.", strong=(0,)
        )
        sections.append(Section(f"facts-{i}", f"Facts: {name}", say, [grid]))
    return sections


def _interval(x: Interval, places: int) -> str:
    return f"{x.mean:.{places}f} {ends(x.as_dict(), places)}"


def _percent(x: Interval, *, signed: bool = True) -> str:
    sign = "+" if signed else ""
    return f"{100 * x.mean:{sign}.1f} % {ends(x.as_dict(), 1, sign, 100)}"
