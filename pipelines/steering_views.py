"""What only the models can show of a contrastive run: where it steered, and what the other modes would have chosen.

The report is written where no model is at hand, so a run that decodes contrastively measures both afterwards, in the
process that started it, on a few passages of its own edits, and writes the report again:

    traces  the tokens of winning candidates, with alpha and k at each: the candidate is drawn once more, from its seed
    modes   some flagged passages (`--compare-modes N`), each by itself, rewritten and judged in every decoding mode

Which passages is decided by a hash of their content, so the same ones stand there whatever the shards and workers.
The corpus is whole before this begins, and nothing in it depends on this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa

from models import registry
from models.prompts import load_prompt
from pipelines.detox_config import DetoxConfig
from pipelines.report import write_report
from pipelines.report.output import Output
from schemas import flight
from schemas.fingerprint import digest
from transforms.detox.options import SegmentOptions
from transforms.detox.rewrite import Planner, Unit, core
from transforms.detox.segment import segment_spans
from transforms.detox.steps import AcceptRewrites, GateToxicity, RewriteToxicSegments, SegmentText
from transforms.shards.cache import RequestCache
from transforms.shards.engine import CACHE, read_units
from transforms.shards.files import Folder
from transforms.shards.plan import ReadTask, load_plan
from transforms.shards.steps import StepContext, apply_step

if TYPE_CHECKING:
    from models.decoding.model import SoCDModel

VIEWS = "_tamis/views.json"
MODES = ("prompt_only", "vanilla_cd", "official", "logratio")
TRACES = 4
# Longer passages make neither a chart nor a table that can be read.
LONGEST = 400
_COLUMNS = ("shard", "row", "segment", "before", "after", "action", "seed")
Say = Callable[[str], None]


def update_views(config: DetoxConfig, say: Say = lambda line: None) -> bool:
    """Measure what is missing of a finished output's views, and write its report again; whether there was anything new.

    Args:
        config: The job's settings, its toxic model among them.
        say: Called with each line for people.

    Raises:
        TamisError: The models cannot be had.
    """
    steers = config.decoding.mode != "prompt_only" and config.accept.needs_candidates
    count = config.decoding.compare_modes if config.accept.needs_candidates else 0
    if not steers and not count:
        return False
    output = Output(config.output, config.storage_options)
    run = output.require_manifest()["run_id"]
    views = output.read_json(VIEWS) or {}
    fresh = views.get("run") != run
    if not fresh and views.get("asked", 0) >= count:
        return False
    if fresh:
        traces = trace_edits(config, sample_edits(config, output, 2 * TRACES, ("rewrite",))) if steers else []
        views = {"run": run, "traces": traces, "modes": [], "asked": 0}
    if count:
        passages = list(dict.fromkeys(p.text for p in sample_edits(config, output, 2 * count)))[:count]
        say(f"rewriting {len(passages)} passages in {len(MODES)} decoding modes, for the report")
        views |= {"modes": compare_modes(config, passages), "asked": count}
    output.folder.write(VIEWS, orjson.dumps(views))
    shown = bool(views["traces"] or views["modes"])
    if shown:
        write_report(config.output, options=config.storage_options)
    return shown


@dataclass(frozen=True)
class Passage:
    """What an edit was about.

    Attributes:
        document: The original text it stands in.
        start: Where it begins, in characters.
        end: Exclusive.
        edit: The edit's columns.
    """

    document: str
    start: int
    end: int
    edit: dict[str, Any]

    @property
    def text(self) -> str:
        """The passage itself."""
        return self.document[self.start : self.end]


def sample_edits(
    config: DetoxConfig, output: Output, count: int, actions: tuple[str, ...] | None = None
) -> list[Passage]:
    """Some of a job's edits with the whole passages they were about, by a hash of their content.

    Args:
        config: The job's settings.
        output: Its finished output.
        count: At most so many.
        actions: Only edits of these kinds; None = all. (The edit of a minimal change holds less than its passage.)
    """
    kept: dict[bytes, dict[str, Any]] = {}
    for _, batch in output.batches("edits", _COLUMNS, batch_rows=2_048) if output.files("edits") else ():
        for edit in batch.select(list(_COLUMNS)).to_pylist():
            if (actions is None or edit["action"] in actions) and len(edit["before"]) <= LONGEST:
                kept.setdefault(digest("view", edit["before"], edit["after"]), edit)
        if len(kept) > 2 * count + 2_048:
            kept = {key: kept[key] for key in sorted(kept)[:count]}
    chosen = [kept[key] for key in sorted(kept)[:count]]
    texts = _documents(config, output, {(edit["shard"], edit["row"]) for edit in chosen})
    passages = []
    for edit in chosen:
        text = texts.get((edit["shard"], edit["row"]), "")
        whole = edit["segment"] is None
        spans = [(0, len(text))] if whole else segment_spans(text, config.segment)[edit["segment"] :][:1]
        passages += [
            Passage(text, *bounds, edit)
            for bounds in (core(text, *span) for span in spans)
            if bounds[0] < bounds[1]
        ]
    return [p for p in passages if len(p.text) <= LONGEST]


def _documents(config: DetoxConfig, output: Output, rows: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Original texts by shard and row; the units they lie in are read once each."""
    plan = load_plan(output.folder)
    if plan is None:
        return {}
    source = Folder(plan.input_url, **config.storage_options)
    found: dict[tuple[str, int], str] = {}
    for shard in plan.shards:
        wanted = sorted(row for name, row in rows if name == shard.name)
        for unit in shard.units:
            here = [row for row in wanted if unit.first_row <= row < unit.first_row + unit.rows]
            if not here:
                continue
            task = ReadTask(shard.name, unit.unit, 1)
            for _, batch in read_units(source, shard, task, config.text_column, config.id_column):
                column = batch.column(config.text_column)
                found |= {(shard.name, row): column[row - unit.first_row].as_py() for row in here}
    return found


def trace_edits(
    config: DetoxConfig, passages: Iterable[Passage], count: int = TRACES
) -> list[dict[str, Any]]:
    """Where the winning candidates of some edits were steered.

    Args:
        config: The job's settings.
        passages: In the order they are tried; one that was asked for in pieces is passed over.
        count: At most so many.

    Returns:
        For each: `before`, `after`, `temperature`, and lists of one length: `tokens` (their text), `alpha`, `k`,
        `edited`; `vocabulary` is the number of tokens there are.
    """
    from models.lm.sampling import job_rows

    model: SoCDModel = registry.load("lm", config.model, **dict(config.model_options()))  # type: ignore[assignment]
    planner = Planner(model, load_prompt(config.prompt), config.rewrite)
    sampling = config.rewrite.sampling.sampling()
    found: list[dict[str, Any]] = []
    for passage in passages:
        if len(found) == count:
            break
        edit, whole = passage.edit, (passage.start, passage.end)
        request = planner.request(Unit(0, 0, *whole, (whole,)), whole, passage.document, config.seed)
        row = next((r for r in job_rows(0, request.seed, sampling) if r.seed == edit["seed"]), None)
        if row is None:
            continue
        room = planner.output_budget(passage.text)
        one = replace(sampling, temperatures=(row.temperature,), max_new_tokens=room)
        ((generation, traces),) = model.generate_traced([request], one)
        for candidate, trace in zip(generation.candidates, traces, strict=True):
            if candidate.seed == row.seed:
                found.append(
                    {
                        "before": passage.text,
                        "after": edit["after"],
                        "temperature": row.temperature,
                        "tokens": model.token_texts(trace.tokens),
                        "alpha": [round(a, 4) for a in trace.alpha],
                        "k": trace.k,
                        "edited": trace.edited,
                        "vocabulary": model.base.vocabulary,
                    }
                )
    return found


def compare_modes(config: DetoxConfig, passages: list[str]) -> list[dict[str, Any]]:
    """Rewrite passages in every mode, with the same seeds, and judge them as the job does.

    Args:
        config: The job's settings; only the mode differs.
        passages: Each is taken as a text of its own, all of it toxic.

    Returns:
        For each passage `text`, `toxicity`, and by mode (`modes`) what would have been chosen: `text`, `toxicity`,
        `similarity`, `temperature`, `accepted`, the `reasons` where it was not, and how many of its distinct
        candidates `passed`; None where there was no candidate.
    """
    cache = RequestCache(f"{config.output.rstrip('/')}/{CACHE}", **config.storage_options)
    context = StepContext(text_column="text", seed=config.seed, cache=cache)
    batch = pa.record_batch({"text": pa.array(passages, pa.string())})
    batch = flight.launch(batch, first_row=0, ids=pa.array([str(i) for i in range(len(passages))]))
    segmenting = SegmentOptions(unit="document", language=config.segment.language)
    scorer = {"scorer": config.scorer, "scorer_options": config.scorer_options()}
    gate = GateToxicity(
        config.gate.model_copy(update={"gate": "none"}),
        lexicon=config.lexicon,
        linear=None,
        classifier=config.scorer,
        classifier_options=config.scorer_options(),
    )
    for step in (SegmentText(segmenting), gate):
        batch = apply_step(step, batch, context)
    rewrite = config.rewrite.model_copy(update={"unit": "sentence", "context_chars": 0})
    accept = AcceptRewrites(
        config.accept.under(config.gate).model_copy(
            update={"ladder": ("candidate", "flag"), "recheck": False}
        ),
        config.gate,
        segmenting,
        lexicon=config.lexicon,
        encoder=config.encoder,
        encoder_options=(("threads", config.threads),),
        **scorer,
    )
    toxicity = flight.attribute(batch, "toxicity").field("score").to_pylist()
    out: list[dict[str, Any]] = [
        {"text": text, "toxicity": score, "modes": {}} for text, score in zip(passages, toxicity, strict=True)
    ]
    for mode in MODES:
        steps = (
            RewriteToxicSegments(
                rewrite, model=config.model, model_options=config.model_options(mode), prompt=config.prompt
            ),
            accept,
        )
        done = batch
        for step in steps:
            done = apply_step(step, done, context)
        for row, edits in zip(out, done.column(flight.EDITS).to_pylist(), strict=True):
            row["modes"][mode] = _choice(edits[0]) if edits else None
    return out


def _choice(edit: dict[str, Any]) -> dict[str, Any] | None:
    """What was chosen, or the best that was not good enough."""
    candidates = [c for c in edit["candidates"] or [] if c["toxicity"] is not None]
    if not candidates:
        return None
    accepted = edit["action"] == "rewrite"
    best = (
        next((c for c in candidates if c["text"] == edit["after"]), candidates[0])
        if accepted
        else candidates[0]
    )
    return {
        **{name: best[name] for name in ("text", "toxicity", "similarity", "temperature")},
        "accepted": accepted,
        "reasons": list(best["reasons"]),
        "passed": sum(not c["reasons"] for c in candidates),
        "distinct": len(candidates),
    }
