"""The page, the card and the terminal lines of `tamis eval toxicity`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from models.metrics.bootstrap import Interval, ends
from models.scorers.judging import Verdict
from pipelines.evaluation.charts import SERIES, interval_bars
from pipelines.evaluation.page import Figure, Grid, Section, Text, Texts, Tile, render_page
from pipelines.evaluation.toxicity_figures import Measured, Protocol, interval
from pipelines.report.charts import to_svg, unchecked

NAMES = {
    "tp": "TP",
    "emt": "EMT",
    "mean_toxicity": "mean toxicity",
    "toxic_samples": "toxic samples",
    "dist1": "Dist-1",
    "dist2": "Dist-2",
    "dist3": "Dist-3",
    "perplexity": "perplexity",
}
_SHOWN = 4  # prompts a model whose worst continuations are shown
_BINS = 20


def headline_figures(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures that stand for a model: `combined` where there are groups, else those over all prompts."""
    return entry.get("combined") or entry["all"]


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """What is printed in the terminal."""
    for label, entry in record["results"].items():
        own = headline_figures(entry)
        fluency = own.get("perplexity")
        yield (
            f"{label}: TP {_pm(own['tp'])}, EMT {_pm(own['emt'])}"
            + (f", perplexity {fluency['mean']:.1f}" if fluency else "")
            + (f", {entry['failed']} prompts failed ({entry['first_error']})" if entry["failed"] else "")
        )
    for label, entry in record["differences"].items():
        if entry["prompts"]:
            yield f"{label} against {entry['against']}: TP {_change(entry['tp'])}, EMT {_change(entry['emt'])}"
    if record["judge"]["shared"]:
        yield f"note: the judge is not independent: {'; '.join(record['judge']['shared'])}"


def render(
    record: Mapping[str, Any], found: Mapping[str, Measured], protocol: Protocol, verdict: Verdict
) -> str:
    """The page."""
    results, config = record["results"], record["config"]
    labels = list(results)
    with unchecked():
        sections = [
            _main(record),
            *([_differences(record)] if record["differences"] else []),
            _distribution(found, protocol),
            *([_groups(record)] if any(r["groups"] for r in results.values()) else []),
            _fluency(record),
            _worst(found),
        ]
    warnings = [verdict.note] if verdict.note else []
    warnings += [
        f"{label}: {results[label]['failed']} prompts could not be continued: {results[label]['first_error']}"
        for label in labels
        if results[label]["failed"]
    ]
    prompts = record["prompts"]
    return render_page(
        job="eval toxicity",
        headline=_headline(record),
        lede=(
            f"{prompts['used']:,} prompts, {config['samples']} continuations of {config['new_tokens']} tokens each, "
            f"{len(config['seeds'])} seeds; temperature {config['temperature']:g}, top-p {config['top_p']:g}, "
            f"top-k {config['top_k'] or 'off'}. Only the continuation is scored, by {record['models']['judge']['name']}."
        ),
        tiles=_tiles(record),
        sections=sections,
        record=record,
        warnings=warnings,
    )


def card(record: Mapping[str, Any], verdict: Verdict) -> str:
    """The data card of the folder."""
    config, prompts = record["config"], record["prompts"]
    rows = [
        "---",
        "tags: [tamis, toxicity, evaluation]",
        "configs:",
        "- config_name: default",
        "  data_files: continuations.parquet",
        "---",
        "",
        "# How toxic is what the models say?",
        "",
        f"{prompts['used']:,} prompts, {config['samples']} continuations of {config['new_tokens']} tokens, seeds "
        f"{', '.join(map(str, config['seeds']))}; judged by `{verdict.judge}`.",
        "",
        "| model | TP | EMT | mean toxicity | Dist-1 / 2 / 3 | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for label, entry in record["results"].items():
        own = headline_figures(entry)
        rows.append("| " + " | ".join(_row(label, own)) + " |")
    if verdict.note:
        rows += ["", f"**{verdict.note}**"]
    rows += [
        "",
        "TP: share of prompts with a continuation above the threshold. EMT: mean over prompts of the highest score. "
        "Intervals by the bootstrap over prompts; ± is the deviation over seeds. `continuations.parquet` holds one row a "
        "model, prompt and seed, with the continuations and their scores: it contains what the models said, toxic or not.",
        "",
    ]
    return "\n".join(rows)


def _headline(record: Mapping[str, Any]) -> str:
    first, *others = record["results"]
    own = headline_figures(record["results"][first])
    if not others:
        return f"{first} goes on toxically from {own['tp']['mean']:.0%} of the prompts"
    best = min(others, key=lambda label: headline_figures(record["results"][label])["tp"]["mean"])
    return (
        f"{best} goes on toxically from {headline_figures(record['results'][best])['tp']['mean']:.0%} of the prompts, "
        f"{first} from {own['tp']['mean']:.0%}"
    )


def _tiles(record: Mapping[str, Any]) -> list[Tile]:
    tiles = []
    for label, entry in list(record["results"].items())[:3]:
        own = headline_figures(entry)
        note = f"{_range(own['tp'])}, ± {own['tp']['std']:.3f} over seeds"
        tiles.append(Tile(f"{own['tp']['mean']:.3f}", f"TP, {label}", note))
        tiles.append(Tile(f"{own['emt']['mean']:.3f}", f"EMT, {label}", _range(own["emt"])))
    return tiles


def _main(record: Mapping[str, Any]) -> Section:
    results = record["results"]
    blocks: list[Figure | Grid | Texts] = []
    first = next(iter(results)) if len(results) > 1 else None
    for name, title in (
        ("tp", "TP: prompts with a toxic continuation"),
        ("emt", "EMT: mean of the worst score"),
    ):
        figures = [(label, interval(headline_figures(entry)[name])) for label, entry in results.items()]
        blocks.append(Figure(interval_bars(figures, title=title, highlight=first), title))
    blocks.append(
        Grid(
            head=["model", "TP", "EMT", "mean toxicity", "Dist-1 / 2 / 3", "perplexity"],
            rows=[_row(label, headline_figures(entry)) for label, entry in results.items()],
            note="Mean, its interval by prompt, and ± the population deviation over seeds.",
        )
    )
    combined = next((e["combined"]["groups"] for e in results.values() if e.get("combined")), None)
    say = f"Combined: the plain mean over {', '.join(combined)}." if combined else "Over all prompts."
    return Section("toxicity", "Toxicity", say, blocks)


def _differences(record: Mapping[str, Any]) -> Section:
    rows = []
    for label, entry in record["differences"].items():
        prompts = f"{entry['prompts']:,}"
        for name in ("tp", "emt", "mean_toxicity"):
            one = entry.get(name)
            if one is None:  # no prompt in common
                continue
            gone = one["cut"]
            cut = f"{gone['mean']:.0%} [{gone['low']:.0%}, {gone['high']:.0%}]" if gone else "–"
            rows.append([label, NAMES[name], _signed(one["difference"]), cut, _p(one["p_value"]), prompts])
            if one.get("combined"):
                own = one["combined"]
                rows.append(
                    [
                        label,
                        f"{NAMES[name]}, combined",
                        _signed(own["difference"]),
                        "",
                        _p(own["p_value"]),
                        prompts,
                    ]
                )
        if entry.get("perplexity"):
            own = entry["perplexity"]
            times = f"× {own['ratio']['mean']:.2f} {_range(own['ratio'], 2)}"
            rows.append([label, NAMES["perplexity"], times, "", _p(own["p_value"]), prompts])
    against = next(iter(record["differences"].values()))["against"]
    grid = Grid(
        ["model", "figure", "difference", "cut by", "p", "prompts"],
        rows,
        words=(0, 1),
        note="Paired bootstrap over the prompts both have; p is two-sided. Perplexity: how many times the first's.",
    )
    return Section("differences", f"Against {against}", "Negative is less toxic.", [grid])


def _distribution(found: Mapping[str, Measured], protocol: Protocol) -> Section:
    series = {label: own.toxicity.max(axis=2).reshape(-1) for label, own in found.items()}
    note = f"Right of the line ({protocol.threshold:g}) a prompt counts as continued toxically."
    figure = Figure(_histograms(series, protocol.threshold), "The worst continuation of each prompt", note)
    return Section(
        "distribution",
        "Prompt by prompt",
        "Highest score of a prompt's continuations, under each seed.",
        [figure],
    )


def _groups(record: Mapping[str, Any]) -> Section:
    results = record["results"]
    groups = sorted({g for entry in results.values() for g in entry["groups"]})
    rows = []
    for group in groups:
        for label, entry in results.items():
            if group in entry["groups"]:
                own = entry["groups"][group]
                rows.append([group, label, f"{own['prompts']:,}", *_row(label, own)[1:]])
    figures = []
    for name in ("tp", "emt"):
        bars = [
            (f"{group} · {label}" if len(results) > 1 else group, interval(entry["groups"][group][name]))
            for group in groups
            for label, entry in results.items()
            if group in entry["groups"]
        ]
        figures.append(Figure(interval_bars(bars, title=f"{NAMES[name]} by group"), NAMES[name]))
    head = ["group", "model", "prompts", "TP", "EMT", "mean toxicity", "Dist-1 / 2 / 3", "perplexity"]
    return Section("groups", "Group by group", "", [*figures, Grid(head, rows, words=(0, 1))])


def _fluency(record: Mapping[str, Any]) -> Section:
    rows = []
    for label, entry in record["results"].items():
        own = entry["all"].get("perplexity")
        diversity = [f"{entry['all'][f'dist{n}']['mean']:.3f}" for n in (1, 2, 3)]
        if own is None:
            rows.append([label, *diversity, "–", "–", "–", "–", "–"])
            continue
        rows.append(
            [
                label,
                *diversity,
                f"{own['mean']:.1f} {_range(own, 1)}",
                f"{own['median']:.1f}",
                f"{own['by_token']['mean']:.1f}",
                f"{own['left_out']:,}",
                f"{own['empty']:,}",
            ]
        )
    head = [
        "model",
        "Dist-1",
        "Dist-2",
        "Dist-3",
        "mean perplexity",
        "median",
        "by token",
        "left out",
        "empty",
    ]
    reference = record["models"].get("reference")
    cap = record["config"]["max_perplexity"]
    say = (
        f"Perplexity of each continuation, its prompt before it, under {reference['name']}; "
        f"those of {cap:,.0f} or more are left out of the mean and counted. "
        if reference
        else "No reference model was given. "
    ) + "Dist-n: distinct n-grams a word over a prompt's continuations, prompt included."
    return Section("fluency", "Fluency and diversity", say, [Grid(head, rows)])


def _worst(found: Mapping[str, Measured]) -> Section:
    groups = []
    for label, own in found.items():
        peak = own.toxicity.reshape(len(own.ids), -1)
        texts = []
        for i in np.argsort(-peak.max(axis=1), kind="stable")[:_SHOWN]:
            flat = [t for group in own.samples[i] for t in group]
            text = flat[int(peak[i].argmax())]
            meta = [("score", f"{peak[i].max():.2f}"), ("prompt", own.ids[i])]
            texts.append(Text(meta, [("equal", own.prompts[i]), ("mark", text)]))
        groups.append(Texts(label, texts))
    return Section(
        "samples",
        "The worst continuations",
        "What the judge scored highest, after the prompt. Veiled until asked for.",
        groups,
    )


def _histograms(series: Mapping[str, np.ndarray], threshold: float) -> str:
    """Step lines over one axis, one a model."""
    import altair as alt

    edges = np.linspace(0, 1, _BINS + 1)
    data = [
        {"x": float(edges[k]), "share": float(n) / len(values), "model": label}
        for label, values in series.items()
        # The last bin's share once more, at its end: steps are drawn from each point to the next.
        for k, n in enumerate([*np.histogram(values, edges)[0], np.histogram(values, edges)[0][-1]])
    ]
    names = list(series)
    colours = [SERIES[i % len(SERIES)] for i in range(len(names))]
    lines_ = (
        alt.Chart(alt.InlineData(values=data), width=560, height=220)
        .mark_line(interpolate="step-after", strokeWidth=1.8)
        .encode(
            x=alt.X(
                "x:Q", title="highest toxicity of a continuation", scale=alt.Scale(domain=[0, 1], nice=False)
            ),
            y=alt.Y("share:Q", title="share of prompts", axis=alt.Axis(format="%")),
            color=alt.Color(
                "model:N",
                scale=alt.Scale(domain=names, range=colours),
                legend=alt.Legend(title=None, orient="top") if len(names) > 1 else None,
            ),
        )
    )
    rule = alt.Chart(alt.InlineData(values=[{"v": threshold}])).mark_rule(strokeDash=[4, 3]).encode(x="v:Q")
    return to_svg(alt.layer(lines_, rule), "Distribution of each prompt's highest toxicity, by model")


def _row(label: str, own: Mapping[str, Any]) -> list[str]:
    fluency = own.get("perplexity")
    return [
        label,
        _full(own["tp"]),
        _full(own["emt"]),
        f"{own['mean_toxicity']['mean']:.3f}",
        " / ".join(f"{own[f'dist{n}']['mean']:.2f}" for n in (1, 2, 3)),
        f"{fluency['mean']:.1f}" if fluency else "–",
    ]


def _full(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.3f} {_range(figure)} ± {figure['std']:.3f}"


def _pm(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.3f} {_range(figure)}"


def _range(figure: Mapping[str, Any] | Interval, places: int = 3) -> str:
    return ends(figure.as_dict() if isinstance(figure, Interval) else figure, places)


def _signed(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:+.3f} {ends(figure, sign='+')}"


def _change(entry: Mapping[str, Any]) -> str:
    cut = entry["cut"]
    share = f" ({-cut['mean']:+.0%})" if cut else ""
    return f"{_signed(entry['difference'])}{share}, p {_p(entry['p_value'])}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
