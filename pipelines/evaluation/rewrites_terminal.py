"""What `tamis eval rewrites` says in the terminal: one line a system, best first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.metrics.bootstrap import ends
from transforms.evaluation.rewrites import METRICS

if TYPE_CHECKING:
    from pipelines.eval_rewrites import RewritesResult


def print_result(result: RewritesResult) -> None:
    """Say what came of it."""
    from rich.table import Table

    from pipelines.evaluation.progress import wide_console

    console = wide_console()
    table = Table(title=f"{result.rows:,} sentences", title_justify="left", box=None)
    has_overlap = any(x.chrf for x in result.systems.values())
    for heading in (
        "system",
        "J",
        "95 %",
        "STA",
        "SIM",
        "FL",
        *(("chrF", "BLEU") if has_overlap else ()),
        "ΔJ",
        "p",
    ):
        table.add_column(heading, justify="left" if heading == "system" else "right", no_wrap=True)
    for name in result.ranked():
        x = result.systems[name]
        j, change = x.metrics["J"], result.changes.get(name)
        cells = [
            name if j.n == result.rows else f"{name} ({j.n:,})",
            f"{j.mean:.3f}",
            ends(j.as_dict(), between="-"),
            *(f"{x.metrics[k].mean:.3f}" for k in METRICS[1:]),
        ]
        if has_overlap:
            cells += [
                "–" if x.chrf is None else f"{x.chrf.mean:.1f}",
                "–" if x.bleu is None else f"{x.bleu.mean:.1f}",
            ]
        cells += [f"{change['J'].difference.mean:+.3f}", f"{change['J'].p_value:.3f}"] if change else ["", ""]
        table.add_row(*cells)
    console.print(table)
    console.print(f"ΔJ: against {result.against}, paired bootstrap. {result.fluency}", soft_wrap=True)
    for name, n in result.missing.items():
        if n:
            console.print(f"{name} has no text for {n:,} rows; they count as empty")
    for name, reason in result.left_out.items():
        console.print(f"{name} is left out: {reason}", soft_wrap=True)
    if result.note:
        console.print(result.note, soft_wrap=True)
    console.print(f"report: {result.output}/report.html", soft_wrap=True)
