"""`tamis eval spans`: how well toxic spans are found, as SemEval-2021 task 5 scores it, by source and by mix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models.metrics.bootstrap import DRAWS, Interval, PairedDifference, ends, mean_interval, paired_difference
from pipelines.evaluation.folder import EvalFolder
from pipelines.evaluation.joins import is_output, read_job
from pipelines.evaluation.tables import Table, distinct_ids, read_table
from schemas.errors import InputError
from transforms.detox.span_f1 import character_f1
from transforms.evaluation.spans import (
    MixFigures,
    ScoredSpan,
    mix_offsets,
    mixes_of,
    parse_spans,
    score_mix,
    sources_of,
    sweep,
)

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20))


class SpansEvalConfig(BaseModel):
    """Settings of `tamis eval spans`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    predicted: str = Field(
        description="Output of tamis (its attribute `spans`), or a file with a column of spans."
    )
    gold: str = Field(description="File with the spans people marked.")
    output: str = Field(description="Folder for the results.")
    spans_column: str = Field("spans", description="Column (or attribute) of predicted spans.")
    gold_column: str = Field("spans", description="Column of gold spans.")
    text_column: str = Field("text", description="Column with the text, in both.")
    id_column: str | None = Field(
        None, description="Column of row ids to join by; default by row, or by text."
    )
    mixes: tuple[tuple[str, ...], ...] = Field(
        (), description="Sets of sources to score; default all there are."
    )
    threshold: float = Field(0.0, description="Only spans scored at least this count.")
    against: str | None = Field(
        None, description="Mix the others are compared with (`a+b`); default the largest."
    )
    examples: int = Field(12, ge=0, description="Posts shown on the page.")
    seed: int = 0
    draws: int = Field(DRAWS, ge=100)
    storage_options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class SpansResult:
    """What came of it.

    Attributes:
        output: The result folder.
        posts: Posts scored.
        toxic: Posts with a gold span.
        missing: Posts without any prediction in the predictions' file; they count as predicted empty.
        mixes: Figures by mix, in order of size.
        against: The mix the others are compared with.
        changes: Paired difference of F1 by other mix.
        sweeps: (threshold, F1) by mix, where spans carry scores.
        baselines: F1 of predicting nothing, and everything.
        record: What `results.json` holds.
    """

    output: str
    posts: int
    toxic: int
    missing: int
    mixes: dict[str, MixFigures]
    against: str
    changes: dict[str, PairedDifference]
    sweeps: dict[str, list[tuple[float, float]]]
    baselines: dict[str, Interval]
    record: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def best(self) -> str:
        """The mix with the highest F1 (of equals the smaller)."""
        return max(self.mixes, key=lambda name: self.mixes[name].f1.mean)


@dataclass(frozen=True)
class Posts:
    """n posts with gold and predicted spans."""

    texts: list[str]
    gold: list[set[int]]
    predicted: list[list[ScoredSpan]]
    missing: int


def run(config: SpansEvalConfig) -> SpansResult:
    """Run it.

    Raises:
        InputError: No such column, no spans, rows that do not belong together, no such source.
        OutputError: The folder holds something else.
    """
    posts = read_posts(config)
    out = EvalFolder(config.output, "spans", options=config.storage_options)
    names = sources_of(posts.predicted)
    chosen = config.mixes or tuple(mixes_of(names))
    _check_sources(config, names)
    if not chosen:  # nothing was predicted at all: that too has a score
        chosen = ((config.spans_column,),)
    how = {"seed": config.seed, "draws": config.draws}
    offsets = {
        "+".join(mix): [mix_offsets(p, mix, config.threshold) for p in posts.predicted] for mix in chosen
    }
    mixes = {name: score_mix(found, posts.gold, **how) for name, found in offsets.items()}
    against = config.against or list(mixes)[-1]
    if against not in mixes:
        raise InputError(f"--against {against}: no such mix; scored are {', '.join(mixes)}")
    changes = {
        name: paired_difference(x.each, mixes[against].each, **how)
        for name, x in mixes.items()
        if name != against
    }
    scored = any(s.score != 1 for spans in posts.predicted for s in spans)
    sweeps = {"+".join(mix): sweep(posts.predicted, posts.gold, mix, THRESHOLDS) for mix in chosen if scored}
    nothing = [character_f1((), g) for g in posts.gold]
    everything = [character_f1(range(len(t)), g) for t, g in zip(posts.texts, posts.gold, strict=True)]
    result = SpansResult(
        config.output,
        len(posts.texts),
        sum(bool(g) for g in posts.gold),
        posts.missing,
        mixes,
        against,
        changes,
        sweeps,
        {"nothing": mean_interval(nothing, **how), "everything": mean_interval(everything, **how)},
    )
    columns: dict[str, Any] = {
        "post": list(range(len(posts.texts))),
        "gold_characters": [len(g) for g in posts.gold],
    }
    for name, x in mixes.items():
        columns |= {f"{name}.characters": [len(p) for p in offsets[name]], f"{name}.f1": x.each}
    out.write_table("posts.parquet", columns)
    record = _record(config, result)
    from pipelines.evaluation.spans_page import render

    out.write_text("report.html", render(result, record, posts, offsets[result.best], config.examples))
    result.record.update(out.finish(record))
    return result


def read_posts(config: SpansEvalConfig) -> Posts:
    """Read gold and predicted spans and put them side by side."""
    gold_table = read_table(config.gold, config.storage_options)
    texts = [t or "" for t in gold_table.texts(config.text_column)]
    if not texts:
        raise InputError(f"{config.gold} holds no posts")
    gold = []
    for i, value in enumerate(gold_table.column(config.gold_column)):
        spans = parse_spans(value, f"{config.gold}, row {i}")
        gold.append({c for s in spans for c in range(s.start, s.end)})
    predicted = _predicted(config, gold_table, texts)
    for i, (text, marked, spans) in enumerate(zip(texts, gold, predicted, strict=True)):
        last = max([*marked, *(s.end - 1 for s in spans or ())], default=-1)
        if last >= len(text):
            raise InputError(f"row {i}: a span reaches character {last}, but the text has {len(text)}")
    return Posts(texts, gold, [p or [] for p in predicted], sum(p is None for p in predicted))


def _predicted(config: SpansEvalConfig, gold: Table, texts: list[str]) -> list[list[ScoredSpan] | None]:
    """The predictions for each gold post; None where there are none to be found."""
    if is_output(config.predicted, config.storage_options):
        job = read_job(config.predicted, attribute=config.spans_column, options=config.storage_options)
        rows = job.align(gold, texts=texts, id_column=config.id_column)
        where = f"{config.predicted}, row {{}}"
        return [None if r is None else parse_spans(r.value, where.format(i)) for i, r in enumerate(rows)]
    table = read_table(config.predicted, config.storage_options)
    values = table.column(config.spans_column)
    parsed = [parse_spans(v, f"{config.predicted}, row {i}") for i, v in enumerate(values)]
    if config.id_column is not None:
        ids = distinct_ids(table.column(config.id_column), config.predicted)
        known = dict(zip(ids, parsed, strict=True))
        found = [known.get(k) for k in distinct_ids(gold.column(config.id_column), config.gold)]
    elif config.text_column in table.columns:
        by_text: dict[str | None, list[ScoredSpan]] = {}
        for i, (text, spans) in enumerate(zip(table.texts(config.text_column), parsed, strict=True)):
            if by_text.setdefault(text, spans) != spans:
                raise InputError(
                    f"{config.predicted}: the text of row {i} stands there twice, with other spans; pass --id-column"
                )
        found = [by_text.get(t) for t in texts]
    elif len(table) == len(texts):
        found = list(parsed)
    else:
        raise InputError(
            f"{config.predicted} has {len(table):,} rows and no column '{config.text_column}', {config.gold} has "
            f"{len(texts):,} rows: they cannot be joined; pass --id-column"
        )
    if all(f is None for f in found):
        raise InputError(f"no post of {config.gold} is in {config.predicted}; pass --id-column")
    return found


def _check_sources(config: SpansEvalConfig, names: list[str]) -> None:
    for mix in config.mixes:
        for source in mix:
            if source not in names:
                known = ", ".join(names) or "none"
                raise InputError(f"--source {','.join(mix)}: no span is from '{source}' (sources: {known})")


def _record(config: SpansEvalConfig, result: SpansResult) -> dict[str, Any]:
    def figures(x: MixFigures) -> dict[str, Any]:
        named = {"f1": x.f1, "f1_toxic": x.f1_toxic, "precision": x.precision, "recall": x.recall}
        return {k: None if v is None else v.as_dict() for k, v in named.items()} | {
            "posts_without_a_span": x.empty
        }

    return {
        "config": config.model_dump(exclude={"storage_options"}),
        "models": {},
        "posts": result.posts,
        "posts_with_gold_spans": result.toxic,
        "posts_without_prediction": result.missing,
        "mixes": {name: figures(x) for name, x in result.mixes.items()},
        "best": result.best,
        "against": result.against,
        "changes": {name: x.as_dict() for name, x in result.changes.items()},
        "sweeps": {name: [list(p) for p in points] for name, points in result.sweeps.items()},
        "baselines": {name: x.as_dict() for name, x in result.baselines.items()},
    }


def print_result(result: SpansResult) -> None:
    """Say what came of it."""
    from rich.table import Table as RichTable

    from pipelines.evaluation.progress import wide_console

    table = RichTable(
        title=f"{result.posts:,} posts, {result.toxic:,} with gold spans", title_justify="left", box=None
    )
    for heading in ("sources", "F1", "95 %", "precision", "recall", f"against {result.against}", "p"):
        table.add_column(
            heading, justify="left" if heading == "sources" else "right", no_wrap=heading != "sources"
        )
    for name, x in result.mixes.items():
        change = result.changes.get(name)
        table.add_row(
            name,
            f"{x.f1.mean:.4f}",
            ends(x.f1.as_dict(), between="-"),
            "–" if x.precision is None else f"{x.precision.mean:.3f}",
            "–" if x.recall is None else f"{x.recall.mean:.3f}",
            f"{change.difference.mean:+.4f}" if change else "",
            f"{change.p_value:.3f}" if change else "",
        )
    for name, interval in result.baselines.items():
        table.add_row(
            f"({name})", f"{interval.mean:.4f}", ends(interval.as_dict(), between="-"), "", "", "", ""
        )
    console = wide_console()
    console.print(table)
    if result.missing:
        console.print(f"{result.missing:,} posts are not among the predictions and count as empty")
    for name, points in result.sweeps.items():
        threshold, f1 = max(points, key=lambda p: p[1])
        console.print(f"{name}: best at threshold {threshold:g} with {f1:.4f} (chosen on these posts)")
    console.print(f"report: {result.output}/report.html", soft_wrap=True)
