"""What a comparison leaves for people: report.html, the card README.md, results.md (tables), results.json, arms.parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.metrics.bootstrap import ends
from pipelines.compare import arms, charts
from pipelines.compare.costs import clock
from pipelines.compare.receipts import write_json
from pipelines.report.charts import unchecked
from pipelines.report.formatting import environment, flatten

_HERE = Path(__file__).parent
Results = Mapping[str, Any]


def write_pages(output: Path, results: Results) -> None:
    """Write every file a comparison shows; each in one piece, so that a page is never half of one."""
    write_json(output / "results.json", results)
    _write_arms(output / "arms.parquet", results)
    for name, text in (
        ("report.html", render("compare.html.jinja", results)),
        ("README.md", render("compare_card.md.jinja", results)),
        ("results.md", render("compare_tables.md.jinja", results)),
    ):
        temporary = output / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output / name)


def render(template: str, results: Results) -> str:
    """A page of the results."""
    import jinja2

    env = environment().overlay(loader=jinja2.FileSystemLoader(_HERE))
    env.filters.update(ci=interval, pci=percent_interval, signed=signed, span=span, clear=clear)
    with unchecked():
        return str(
            env.get_template(template).render(_context(results, drawn=template.endswith("html.jinja")))
        )


def interval(value: Mapping[str, Any] | None, places: int = 3) -> str:
    """`0.412 [0.371, 0.455]`."""
    if not value:
        return "–"
    return f"{value['mean']:.{places}f} {ends(value, places)}"


def percent_interval(value: Mapping[str, Any] | None) -> str:
    """`53 % [45, 60]`."""
    if not value:
        return "–"
    return f"{100 * value['mean']:.1f} % {ends(value, 1, scale=100)}"


def signed(value: Mapping[str, Any] | None, places: int = 3) -> str:
    """`-0.210 [-0.250, -0.170]`."""
    if not value:
        return "–"
    return f"{value['mean']:+.{places}f} {ends(value, places, '+')}"


def clear(arm: Mapping[str, Any]) -> str:
    """Which of an arm's intervals do not touch those of the raw corpus."""
    names = [name.upper() for name in ("emt", "tp") if arm[f"{name}_apart"]]
    return " and ".join(names) or ("–" if arm["emt_apart"] is None else "neither")


def span(value: float | None) -> str:
    """Seconds in the unit a person would use."""
    return "–" if value is None else clock(value)


def headline(results: Results) -> str:
    """One sentence that says what came of it."""
    focus = next((a for a in results["arms"] if a["name"] == results["focus"]), None)
    if focus is None or not focus["emt_reduction"]:
        return f"{len(results['arms'])} corpora, one small model each"
    emt, tp = focus["emt_reduction"], focus["tp_reduction"]
    if emt.get("n", 2) < 2 or emt["low"] <= 0 <= emt["high"]:
        return f"Training on {focus['name']} instead of the raw corpus makes no difference that these prompts can show"
    word = "less" if emt["mean"] > 0 else "more"
    both = (
        f" and is toxic on {abs(100 * tp['mean']):.0f} % {'fewer' if tp['mean'] > 0 else 'more'} prompts"
        if tp
        else ""
    )
    return f"Trained on {focus['name']}, the model is {abs(100 * emt['mean']):.0f} % {word} toxic at its worst{both} than trained on raw"


def _context(results: Results, *, drawn: bool) -> dict[str, Any]:
    listed = results["arms"]
    raw = next((a for a in listed if a["name"] == arms.RAW), None)
    focus = next((a for a in listed if a["name"] == results["focus"]), None)
    neutral = [a for a in listed if a["neutral"]]
    context: dict[str, Any] = {
        "r": results,
        "arms": listed,
        "raw": raw,
        "focus": focus,
        "neutral": neutral,
        "headline": headline(results),
        "against": _against(results),
        "fact_kinds": list(
            dict.fromkeys(k for a in listed if a["facts_kept"] for k in a["facts_kept"]["kept"])
        ),
        "several_seeds": any(len(a["seeds"]) > 1 for a in listed),
        "total_seconds": sum(c["seconds"] for c in results["cost"].values()),
    }
    if drawn:
        context |= {
            "css": (_HERE.parent / "report" / "report.css").read_text("utf-8"),
            "config": flatten(results["config"]),
            "charts": _charts(listed, neutral),
        }
    return context


def _charts(
    listed: Sequence[Mapping[str, Any]], neutral: Sequence[Mapping[str, Any]]
) -> dict[str, str | None]:
    drawn: dict[str, str | None] = {
        **dict.fromkeys(("kept", "neutral", "perplexity")),
        "emt": charts.dots(
            [(a["name"], a["emt"]) for a in listed], title="expected maximum toxicity", reference=arms.RAW
        ),
        "tp": charts.dots(
            [(a["name"], a["tp"]) for a in listed],
            title="prompts with a toxic continuation",
            percent=True,
            reference=arms.RAW,
        ),
    }
    kept = [(a["name"], a["kept"], a["emt"]["mean"]) for a in listed if a["kept"] is not None]
    if kept:
        drawn["kept"] = charts.trade_off(
            kept, x_title="rows kept", y_title="expected maximum toxicity", percent=True, reference=arms.RAW
        )
    if neutral:
        drawn["neutral"] = charts.dots(
            [(a["name"], a["neutral"]) for a in neutral],
            title="perplexity of the neutral text",
            reference=arms.RAW,
        )
        drawn["perplexity"] = charts.trade_off(
            [(a["name"], a["neutral"]["mean"], a["emt"]["mean"]) for a in neutral],
            x_title="perplexity of the neutral text", y_title="expected maximum toxicity", reference=arms.RAW,
        )  # fmt: skip
    return drawn


def _against(results: Results) -> list[dict[str, Any]]:
    """The focus arm against every other: differences, focus minus other."""
    rows = []
    for pair in results["pairs"]:
        if results["focus"] not in (pair["a"], pair["b"]):
            continue
        flip = pair["b"] == results["focus"]
        row: dict[str, Any] = {"name": pair["a"] if flip else pair["b"]}
        for name in ("tp", "emt"):
            found = pair[name]
            if found is None:
                row[name], row[f"{name}_p"] = None, None
                continue
            gap = found["difference"]
            row[name] = (
                {"mean": -gap["mean"], "low": -gap["high"], "high": -gap["low"], "n": gap["n"]}
                if flip
                else gap
            )
            row[f"{name}_p"] = found["p_value"]
        rows.append(row)
    return rows


def _write_arms(path: Path, results: Results) -> None:
    """One row an arm and training seed, flat: for whoever wants to plot it."""
    rows = []
    for arm in results["arms"]:
        for seed in arm["seeds"]:
            key = str(seed)
            perplexity, neutral = arm["perplexity"] or {}, arm["neutral"] or {}
            rows.append(
                {
                    "arm": arm["name"],
                    "seed": seed,
                    "rows": arm["rows"],
                    "kept": arm["kept"],
                    "epochs": arm["epochs"],
                    "tokens_trained": arm["tokens_trained"],
                    "judge_mean_of_corpus": arm["judge_mean"],
                    "tp": arm["tp"]["by_seed"][key],
                    "emt": arm["emt"]["by_seed"][key],
                    **{f"distinct_{n + 1}": d["by_seed"][key] for n, d in enumerate(arm["distinct"])},
                    "perplexity": perplexity.get("by_seed", {}).get(key),
                    "neutral_perplexity": neutral.get("by_seed", {}).get(key),
                }
            )
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(rows), temporary)
    temporary.replace(path)
