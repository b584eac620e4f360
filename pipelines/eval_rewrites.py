"""`tamis eval rewrites`: rewriting systems side by side, with STA, SIM, FL and J, chrF and BLEU, and significance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.metrics.bootstrap import DRAWS, Interval, PairedDifference
from models.protocols import Encoder, ModelInfo, ToxicityScorer
from models.scorers.judging import Verdict
from pipelines.evaluation.fluency import Fluency, load_fluency
from pipelines.evaluation.folder import EvalFolder, device_in_words
from pipelines.evaluation.judges import AUTO, JUDGES, with_judge
from pipelines.evaluation.pairs import (
    Pairs,
    SystemTexts,
    common_rows,
    read_pairs,
    system_texts,
)
from pipelines.evaluation.progress import counting
from pipelines.evaluation.rewrites_terminal import print_result
from schemas.errors import InputError
from transforms.detox.checks import normal_form
from transforms.evaluation.facts import count_facts
from transforms.evaluation.overlap import Overlap, overlap
from transforms.evaluation.rewrites import (
    METRICS,
    Measures,
    SystemFigures,
    compare_systems,
    holm,
    system_figures,
)
from transforms.evaluation.systems import BUILT_IN, DROP_FROM, delete_words, drop_sentences, mask_words
from transforms.requests import score_cached, similarity_cached

__all__ = ["RewritesEvalConfig", "RewritesResult", "print_result", "run"]

HUMAN = "human"
NONTOXIC_BELOW = 0.5


class RewritesEvalConfig(BaseModel):
    """Settings of `tamis eval rewrites`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[str, ...] = Field(
        (), description="Files or folders with the sources; none: a system's own input."
    )
    output: str = Field(description="Folder for the results; adding a system costs only that system.")
    source: str | None = Field(None, description="Column of the sources.")
    systems: dict[str, str] = Field(
        default_factory=dict,
        description="Name -> column, file (FILE#COLUMN), or finished `tamis detox` output.",
    )
    built_in: tuple[str, ...] | None = Field(
        None, description=f"Of {', '.join(BUILT_IN)}; default those the judge is independent of."
    )
    human: bool = Field(True, description="Score the first reference of each row as a system of its own.")
    references: tuple[str, ...] | None = Field(None, description="Columns of references; default by name.")
    id_column: str | None = Field(
        None, description="Column of ids to join files and outputs by; default by row."
    )
    common: bool = Field(False, description="Only the sources every named system was given.")
    limit: int = Field(0, ge=0, description="Only the first so many sources; 0 = all.")
    judge: str = Field(
        AUTO,
        description="Scorer that says what is toxic; never the one that ranked. auto: the first of "
        f"{', '.join(JUDGES)} that shares nothing with what did.",
    )
    judge_options: dict[str, Any] = Field(default_factory=dict)
    allow_shared_judge: bool = False
    encoder: str = "minilm"
    fluency: str = Field("lm:smollm2", description="lm:MODEL, hf:CLASSIFIER of acceptability, or none.")
    fluency_text: str | None = Field(None, description="Whole sentences to calibrate another lm: with.")
    fluency_label: str | None = Field(None, description="Label of an hf: classifier that means acceptable.")
    lexicon: str = Field("lexicon", description="Word list of delete and lexicon-mask.")
    classifier: str = Field("jigsaw-bilstm", description="Classifier of sentence-drop.")
    drop_from: float = Field(DROP_FROM, description="Score from which sentence-drop drops a sentence.")
    against: str | None = Field(
        None, description="System the others are compared with; default the first given."
    )
    examples: int = Field(6, ge=0, description="Examples a group on the page.")
    seed: int = 0
    draws: int = Field(DRAWS, ge=100)
    device: str = "auto"
    dtype: str = "auto"
    threads: int = Field(1, ge=1)
    cache: str | None = Field(None, description="Where scores are kept; default inside the output folder.")
    progress: str = "auto"
    storage_options: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Scorers:
    """The parts that measure, and what they are."""

    judge: ToxicityScorer
    encoder: Encoder
    fluency: Fluency
    lexicon: Any
    verdict: Verdict
    infos: dict[str, ModelInfo]


@dataclass(frozen=True)
class RewritesResult:
    """What came of it.

    Attributes:
        output: The result folder.
        rows: Sources.
        against: The system the others are compared with.
        systems: Figures by system, in the order they were named.
        measures: What they are made of, by system.
        changes: Other system -> metric -> difference from `against`.
        missing: Rows a system has no text for; they count as empty.
        left_out: Built-in systems that were not asked for and would not go with the judge, each with the reason.
        note: What a page must say of the judge; empty where it is independent.
        fluency: What FL is, in a sentence.
        record: What `results.json` holds.
    """

    output: str
    rows: int
    against: str
    systems: dict[str, SystemFigures]
    measures: dict[str, Measures] = field(repr=False)
    changes: dict[str, dict[str, PairedDifference]]
    missing: dict[str, int]
    left_out: dict[str, str]
    note: str
    fluency: str
    record: dict[str, Any] = field(repr=False, default_factory=dict)

    def ranked(self) -> list[str]:
        """The systems, best J first."""
        return sorted(self.systems, key=lambda n: -self.systems[n].metrics["J"].mean)


def run(config: RewritesEvalConfig) -> RewritesResult:
    """Run it.

    Raises:
        InputError: No sources, a system whose rows are not the sources', no such column.
        ModelError: A model cannot be had.
        OutputError: The folder holds something else.
        TamisError: The judge is a ranker of one of the systems.
    """
    pairs = read_pairs(
        config.inputs,
        config.systems,
        source=config.source,
        references=config.references,
        limit=config.limit,
        options=config.storage_options,
    )
    pairs, texts, missing = _given(config, pairs)
    config, verdict, left_out = with_judge(config, pairs)
    out = EvalFolder(config.output, "rewrites", cache=config.cache, options=config.storage_options)
    scorers = _load(config, out, verdict)
    texts = _built_in(config, out, pairs, scorers) | texts
    if config.human and any(pairs.references):
        texts |= {HUMAN: [r[0] if r else "" for r in pairs.references]}
    against = config.against or next(iter(config.systems), next(iter(texts), None))
    if against not in texts:
        raise InputError(f"--against {against}: no such system; there are {', '.join(texts) or 'none'}")
    spans = [[(a, b) for a, b, *_ in hits] for hits in scorers.lexicon.find_all(pairs.sources)]
    measures: dict[str, Measures] = {}
    overlaps: dict[str, Overlap | None] = {}
    for name, outputs in texts.items():
        with counting(f"{name}: texts measured", len(outputs), config.progress) as tell:
            # People are not measured against themselves.
            overlaps[name] = (
                None
                if name == HUMAN
                else overlap(outputs, pairs.references, seed=config.seed, draws=config.draws)
            )
            measures[name] = _measure(pairs.sources, outputs, spans, scorers, out, overlaps[name], tell)
        if name == HUMAN:  # a row nobody rewrote says nothing of people's rewrites
            given = np.array([bool(r) for r in pairs.references])
            measures[name] = replace(measures[name], given=given)
    how = {"seed": config.seed, "draws": config.draws}
    result = RewritesResult(
        config.output,
        len(pairs.sources),
        against,
        {
            n: system_figures(m, bleu=o.bleu if (o := overlaps[n]) else None, **how)
            for n, m in measures.items()
        },
        measures,
        compare_systems(measures, against, **how),
        missing,
        left_out,
        verdict.note,
        scorers.fluency.words,
    )
    out.write_table("sentences.parquet", _columns(pairs, texts, measures))
    record = _record(config, pairs, result, scorers, overlaps)
    from pipelines.evaluation.rewrites_page import render

    out.write_text("report.html", render(result, record, pairs, texts, config.examples))
    result.record.update(out.finish(record))
    return result


def _given(config: RewritesEvalConfig, pairs: Pairs) -> tuple[Pairs, dict[str, list[str]], dict[str, int]]:
    """The sources, and the named systems' texts for them."""
    found: dict[str, SystemTexts] = {}
    for name, spec in config.systems.items():
        if name == HUMAN or name in (BUILT_IN if config.built_in is None else config.built_in):
            raise InputError(f"--system {name}=...: that name is taken by a built-in system")
        found[name] = system_texts(pairs, spec, id_column=config.id_column, options=config.storage_options)
    if config.common and found:
        pairs, found = common_rows(pairs, found)
    texts = {name: [t or "" for t in s.texts] for name, s in found.items()}
    return pairs, texts, {name: s.missing for name, s in found.items()}


def _load(config: RewritesEvalConfig, out: EvalFolder, verdict: Verdict) -> Scorers:
    from models import registry

    how = {"device": config.device, "threads": config.threads}
    judge = registry.load("scorer", config.judge, **how, **config.judge_options)
    encoder = registry.load("encoder", config.encoder, **how)
    fluency = load_fluency(
        config.fluency,
        cache=out.cache,
        text=config.fluency_text,
        label=config.fluency_label,
        seed=config.seed,
        options=how | {"dtype": config.dtype},
        progress=config.progress,
        storage_options=config.storage_options,
    )
    lexicon = registry.load("scorer", config.lexicon)
    if not hasattr(lexicon, "find_all"):
        raise InputError(f"--lexicon {config.lexicon}: not a word list; pass `lexicon` or lexicon:FILE")
    infos = {"judge": judge.info, "encoder": encoder.info, "lexicon": lexicon.info}
    infos |= {"fluency": fluency.info} if fluency.info is not None else {}
    return Scorers(judge, encoder, fluency, lexicon, verdict, infos)


def _built_in(
    config: RewritesEvalConfig, out: EvalFolder, pairs: Pairs, scorers: Scorers
) -> dict[str, list[str]]:
    from models import registry

    made: dict[str, list[str]] = {}
    for name in config.built_in or ():
        if name == "copy":
            made[name] = list(pairs.sources)
        elif name == "delete":
            made[name] = delete_words(pairs.sources, scorers.lexicon)
        elif name == "lexicon-mask":
            made[name] = mask_words(pairs.sources, scorers.lexicon)
        else:
            classifier = registry.load(
                "scorer", config.classifier, device=config.device, threads=config.threads
            )
            scorers.infos["sentence-drop"] = classifier.info
            made[name] = drop_sentences(pairs.sources, classifier, out.cache, config.drop_from)
    return made


def _measure(
    sources: Sequence[str],
    outputs: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    scorers: Scorers,
    out: EvalFolder,
    shared: Overlap | None,
    tell: Callable[[int], None],
) -> Measures:
    empty = np.array([not any(c.isalnum() for c in t) for t in outputs])
    toxicity = score_cached(scorers.judge, outputs, out.cache)[:, 0].astype(np.float64)
    pairs = [(s, t) for s, t, gone in zip(sources, outputs, empty, strict=True) if not gone]
    sim = np.zeros(len(outputs))
    sim[~empty] = np.clip(similarity_cached(scorers.encoder, pairs, out.cache), 0, 1)
    acceptability = np.zeros(len(outputs))
    acceptability[~empty] = scorers.fluency.score([t for _, t in pairs], tell)
    tell(int(empty.sum()))
    fl = (acceptability >= scorers.fluency.threshold) & ~empty
    whole = [
        count_facts(s, t, p).whole if not gone else False
        for s, t, p, gone in zip(sources, outputs, spans, empty, strict=True)
    ]
    return Measures(
        toxicity,
        (toxicity < NONTOXIC_BELOW).astype(np.float64),
        sim,
        acceptability,
        fl.astype(np.float64),
        empty,
        np.array([normal_form(s) == normal_form(t) for s, t in zip(sources, outputs, strict=True)]),
        np.array(whole, bool),
        None if shared is None else shared.chrf,
    )


def _columns(
    pairs: Pairs, texts: Mapping[str, Sequence[str]], measures: Mapping[str, Measures]
) -> dict[str, Any]:
    """One row a (system, source)."""
    columns: dict[str, Any] = {"system": [], "row": [], "source": [], "output": []}
    arrays: dict[str, list[np.ndarray]] = {}
    for name, whole in measures.items():
        rows, m = np.flatnonzero(whole.rows), whole.only(whole.rows)
        columns["system"] += [name] * len(rows)
        for key, values in (("row", pairs.rows), ("source", pairs.sources), ("output", texts[name])):
            columns[key] += [values[i] for i in rows]
        chrf = m.chrf if m.chrf is not None else np.full(len(m.sta), np.nan)
        for key, values in {
            "toxicity": m.toxicity, "sta": m.sta, "sim": m.sim, "acceptability": m.acceptability, "fl": m.fl,
            "j": m.joint, "chrf": chrf, "empty": m.empty, "copied": m.copied, "facts_kept": m.whole,
        }.items():  # fmt: skip
            arrays.setdefault(key, []).append(values)
    return columns | {key: np.concatenate(parts) for key, parts in arrays.items()}


def _record(
    config: RewritesEvalConfig,
    pairs: Pairs,
    result: RewritesResult,
    scorers: Scorers,
    overlaps: Mapping[str, Overlap | None],
) -> dict[str, Any]:
    def maybe(x: Interval | None) -> dict[str, Any] | None:
        return None if x is None else x.as_dict()

    signature = next((o.signature for o in overlaps.values() if o), None)
    adjusted = dict(zip(result.changes, holm([c["J"].p_value for c in result.changes.values()]), strict=True))
    return {
        "config": config.model_dump(exclude={"storage_options", "progress", "cache", "threads"}),
        "device": device_in_words(config.device),
        "models": {role: asdict(info) for role, info in scorers.infos.items()},
        "judging": scorers.verdict.as_dict(),
        "fluency": {
            "is": scorers.fluency.words,
            "threshold": scorers.fluency.threshold,
            **scorers.fluency.record,
        },
        "overlap": signature,
        "rows": result.rows,
        "rows_with_references": sum(bool(r) for r in pairs.references),
        "references": pairs.reference_columns,
        "against": result.against,
        "left_out": result.left_out,
        "systems": {
            name: {
                **{k: x.metrics[k].as_dict() for k in METRICS},
                "geometric": x.geometric.as_dict(),
                "toxicity": x.toxicity.as_dict(),
                "chrf": maybe(x.chrf),
                "bleu": maybe(x.bleu),
                "facts_kept": x.facts.as_dict(),
                "empty": x.empty,
                "copied": x.copied,
                "without_output": result.missing.get(name, 0),
                "rows": x.metrics["J"].n,
            }
            for name, x in result.systems.items()
        },
        "changes": {
            name: {k: d.as_dict() for k, d in by.items()} | {"J_p_value_holm": adjusted[name]}
            for name, by in result.changes.items()
        },
    }
