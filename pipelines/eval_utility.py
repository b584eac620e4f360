"""`tamis eval utility`: what the rewriting cost, in fluency of the model trained on it and in facts of the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.metrics.bootstrap import DRAWS, Interval, ends
from models.protocols import ModelInfo
from pipelines.evaluation.facts import FactTable, count_output
from pipelines.evaluation.folder import EvalFolder, device_in_words
from pipelines.evaluation.progress import counting
from pipelines.evaluation.tables import read_table
from schemas.errors import InputError
from schemas.fingerprint import derive_seed
from transforms.evaluation.likelihood import surprisals_cached
from transforms.evaluation.perplexity import (
    DocumentLosses,
    PerplexityChange,
    PerplexityFigures,
    cut_documents,
    perplexity_change,
    perplexity_figures,
)


class UtilityEvalConfig(BaseModel):
    """Settings of `tamis eval utility`; perplexity (text and models), facts (rewritten), or both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str = Field(description="Folder for the results; run again to add to it.")
    text: str | None = Field(None, description="Held-out neutral text: file, folder, glob or URL.")
    text_column: str = "text"
    models: dict[str, str] = Field(
        default_factory=dict,
        description="Name -> folder or name of a model, `,adapter=FOLDER` behind it for LoRA.",
    )
    against: str | None = Field(
        None, description="The model the others are compared with; default the first."
    )
    documents: int = Field(0, ge=0, description="Documents to use, drawn by content; 0 = all.")
    max_chars: int = Field(4000, ge=0, description="Characters of a document that count; 0 = all.")
    rewritten: dict[str, str] = Field(
        default_factory=dict, description="Name -> finished `tamis detox` output whose facts are counted."
    )
    seed: int = 0
    draws: int = Field(DRAWS, ge=100, description="Bootstrap resamples.")
    device: str = "auto"
    dtype: str = "auto"
    threads: int = Field(1, ge=1)
    cache: str | None = Field(None, description="Where scores are kept; default inside the output folder.")
    progress: str = "auto"
    storage_options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class UtilityResult:
    """What came of it.

    Attributes:
        output: The result folder.
        documents: Documents of the neutral text.
        against: The model the others were compared with; None without models.
        perplexity: By model.
        changes: By model other than `against`.
        facts: By rewritten corpus.
        record: What `results.json` holds.
    """

    output: str
    documents: int
    against: str | None
    perplexity: dict[str, PerplexityFigures]
    changes: dict[str, PerplexityChange]
    facts: dict[str, FactTable]
    record: dict[str, Any] = field(repr=False, default_factory=dict)


def run(config: UtilityEvalConfig) -> UtilityResult:
    """Run it.

    Raises:
        InputError: Nothing to do, no text, no such column.
        ModelError: A model cannot be had, or cannot score tokens.
        OutputError: The folder holds something else.
    """
    _check(config)
    infos = {name: _describe(spec) for name, spec in config.models.items()}  # before hours of scoring
    out = EvalFolder(config.output, "utility", cache=config.cache, options=config.storage_options)
    texts = _neutral_texts(config) if config.models else []
    sizes = np.array([len(t.encode("utf-8", "surrogatepass")) for t in texts], np.float64)
    losses: dict[str, DocumentLosses] = {}
    for name, spec in config.models.items():
        losses[name], infos[name] = _score(config, out, name, spec, texts)
    against = (config.against or next(iter(losses))) if losses else None
    how = {"seed": config.seed, "draws": config.draws}
    perplexity = {n: perplexity_figures(x, sizes, **how) for n, x in losses.items()}
    changes = {
        n: perplexity_change(x, losses[against], sizes, **how)
        for n, x in losses.items()
        if against is not None and n != against
    }
    facts = {
        name: count_output(url, config.storage_options, seed=config.seed, draws=config.draws)
        for name, url in config.rewritten.items()
    }
    if losses:
        columns: dict[str, Any] = {"document": list(range(len(texts))), "bytes": sizes.astype(np.int64)}
        for name, x in losses.items():
            columns |= {f"{name}.nats": x.nats, f"{name}.tokens": x.tokens.astype(np.int64)}
        out.write_table("documents.parquet", columns)
    if facts:
        out.write_table("edits.parquet", _edit_columns(facts))
    result = UtilityResult(config.output, len(texts), against, perplexity, changes, facts)
    record = _record(config, result, infos, losses, sizes)
    from pipelines.evaluation.utility_page import render

    out.write_text("report.html", render(result, record))
    result.record.update(out.finish(record))
    return result


def _check(config: UtilityEvalConfig) -> None:
    if config.text and not config.models:
        raise InputError("--text is for perplexity, which needs models; pass --model NAME=FOLDER")
    if not config.models and not config.rewritten:
        raise InputError("nothing to measure: pass --text with --model NAME=FOLDER, or --rewritten NAME=OUT")
    if config.models and not config.text:
        raise InputError("perplexity needs a neutral text the models were not trained on; pass --text FILE")
    if config.against is not None and config.against not in config.models:
        raise InputError(f"--against {config.against}: no such model; named are {', '.join(config.models)}")


def _neutral_texts(config: UtilityEvalConfig) -> list[str]:
    table = read_table(str(config.text), config.storage_options)
    texts = cut_documents([t for t in table.texts(config.text_column) if t and t.strip()], config.max_chars)
    texts = list(dict.fromkeys(texts))  # a document that stands there twice says nothing new
    if config.documents and config.documents < len(texts):
        # By content: the same documents whatever the order, and the same for every model.
        kept = sorted(texts, key=lambda t: derive_seed(config.seed, "utility", t))[: config.documents]
        chosen = set(kept)
        texts = [t for t in texts if t in chosen]
    if not texts:
        raise InputError(f"{config.text}: column '{config.text_column}' holds no text")
    return texts


def _parts(spec: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = spec.partition(",adapter=")
    return name, ({"adapter": rest} if rest else {})


def _describe(spec: str) -> ModelInfo:
    from models import registry

    name, options = _parts(spec)
    return registry.describe("lm", name, **options)


def _score(
    config: UtilityEvalConfig, out: EvalFolder, name: str, spec: str, texts: Sequence[str]
) -> tuple[DocumentLosses, ModelInfo]:
    from models import registry

    model_name, options = _parts(spec)
    if not model_name.startswith("openai:"):
        options |= {"device": config.device, "dtype": config.dtype, "threads": config.threads}
    model = registry.load("lm", model_name, **options)
    with counting(f"{name}: documents scored", len(texts), config.progress) as tell:
        scored = surprisals_cached(model, texts, out.cache, tell)
    if len(config.models) > 2:
        registry.forget()  # many models are compared, and each is used once
    nats = np.array([float(x.sum(dtype=np.float64)) for x in scored])
    return DocumentLosses(nats, np.array([len(x) for x in scored], np.float64)), model.info


def _edit_columns(facts: Mapping[str, FactTable]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for name, table in facts.items():
        for column, values in table.items.items():
            columns.setdefault(column, []).extend(values)
        columns.setdefault("corpus", []).extend([name] * table.edits)
    return columns


def _record(
    config: UtilityEvalConfig,
    result: UtilityResult,
    infos: Mapping[str, ModelInfo],
    losses: Mapping[str, DocumentLosses],
    sizes: np.ndarray,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "config": config.model_dump(exclude={"storage_options", "progress", "cache", "threads"}),
        "models": {name: asdict(info) for name, info in infos.items()},
    }
    if losses:
        record |= {
            "device": device_in_words(config.device),
            "documents": result.documents,
            "bytes": int(sizes.sum()),
            "against": result.against,
            "perplexity": {
                name: {
                    "perplexity": figures.perplexity.as_dict(),
                    "bits_per_byte": figures.bits_per_byte.as_dict(),
                    "tokens": int(losses[name].tokens.sum()),
                }
                for name, figures in result.perplexity.items()
            },
            "changes": {
                name: {
                    "perplexity_ratio": change.perplexity_ratio.as_dict(),
                    "bits_per_byte": change.bits_per_byte.as_dict(),
                    "p_value": change.p_value,
                    "by_token": change.by_token,
                }
                for name, change in result.changes.items()
            },
        }
    if result.facts:
        record["facts"] = {name: table.as_dict() for name, table in result.facts.items()}
    return record


def print_result(result: UtilityResult) -> None:
    """Say what came of it."""
    from rich.table import Table

    from pipelines.evaluation.progress import wide_console

    console = wide_console()
    if result.perplexity:
        table = Table(title=f"{result.documents:,} documents", title_justify="left", box=None)
        for heading in ("model", "perplexity", "bits/byte", f"against {result.against}", "p"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for name, figures in result.perplexity.items():
            change = result.changes.get(name)
            table.add_row(
                name,
                _show(figures.perplexity, 2),
                _show(figures.bits_per_byte, 4),
                _show_percent(change.perplexity_ratio) if change else "",
                f"{change.p_value:.3f}" if change else "",
            )
        console.print(table)
    for name, facts in result.facts.items():
        table = Table(title=f"{name}: facts kept, {facts.edits:,} edits", title_justify="left", box=None)
        for heading in ("rung", "edits", *facts.kinds, "nothing lost or made up"):
            table.add_column(heading, justify="left" if heading == "rung" else "right")
        for row in facts.rows:
            kept = ["–" if row.kept[k] is None else f"{100 * row.kept[k].mean:.1f} %" for k in facts.kinds]
            table.add_row(row.action, f"{row.edits:,}", *kept, f"{100 * row.whole.mean:.1f} %")
        console.print(table)
    console.print(f"report: {result.output}/report.html", soft_wrap=True)


def _show(x: Interval, places: int) -> str:
    return f"{x.mean:.{places}f} {ends(x.as_dict(), places)}"


def _show_percent(x: Interval) -> str:
    return f"{100 * x.mean:+.1f} % {ends(x.as_dict(), 1, '+', 100)}"
