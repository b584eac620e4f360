"""`tamis detox`: the same corpus back, minus the toxicity, meaning kept, with a record of every change.

HSPD (Shao et al., ACL 2026) as a production job: segment, gate, localise, rewrite, accept. The typed configuration
here is all that decides the result; `python -m pipelines.detox` takes the same options as `tamis detox`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from models import prompts, registry
from models.lineage import GATE
from models.protocols import ModelInfo
from models.scorers.fluency import load_fluency_scorer
from pipelines.detox_config import DecodingOptions, DetoxConfig, load_settings, make_config
from pipelines.run import RunResult, RunSettings, run_job
from pipelines.steering_views import update_views
from pipelines.toxic_model import (
    ToxicModel,
    check_training,
    describe_training,
    find_toxic_model,
    ready_toxic_model,
    to_stderr,
)
from transforms.detox.steps import (
    AcceptRewrites,
    GateToxicity,
    LocalizeToxicSpans,
    RewriteToxicSegments,
    SegmentText,
)
from transforms.shards.engine import Job
from transforms.shards.formats import AssembleOptions, UnitLimits


def build_job(config: DetoxConfig, trained: ToxicModel | None = None) -> Job:
    """The job of a configuration: its steps, and the models' pinned revisions.

    Args:
        config: As the user gave it.
        trained: The toxic model that was trained for this very job; its revision is part of what the job is.

    Raises:
        ModelError: A model cannot be had; no row has been touched.
    """
    config.check_toxic()
    given, config = config, config.with_toxic(trained.folder, full=trained.full) if trained else config
    scorer_options = config.scorer_options()
    # Roles tell a judge who decided about the texts (`models.lineage`); of two roles of one model the last counts.
    infos: list[tuple[str, ModelInfo]] = [("lexicon", registry.describe("scorer", config.lexicon))]
    if config.gate.gate == "cascade":
        infos.append((GATE, registry.describe("scorer", config.linear)))
    infos.append(("ranker", registry.describe("scorer", config.scorer, **dict(scorer_options))))
    if config.accept.needs_encoder:
        infos.append(("similarity", registry.describe("encoder", config.encoder, threads=config.threads)))
    if config.accept.needs_fluency:
        infos.append(("fluency", load_fluency_scorer().info))
    rewriting: tuple[RewriteToxicSegments, ...] = ()
    if config.accept.needs_candidates:  # a filter (drop, redact) loads no language model
        model_options = config.model_options()
        infos.append(("rewriter", registry.describe("lm", config.model, **dict(model_options))))
        rewriting = (
            RewriteToxicSegments(
                config.rewrite, model=config.model, model_options=model_options, prompt=config.prompt
            ),
        )
    contrast_options = config.contrast_options() if "socd" in config.localize.sources else ()
    if contrast_options:
        infos.append(("contrast", registry.describe("lm", config.model, **dict(contrast_options))))
    if "tagger" in config.localize.sources:
        infos.append(("localizer", registry.describe("tagger", config.localize.tagger or "")))
    if trained is not None:
        infos.append(("toxic", trained.info))
    prompt = prompts.load_prompt(config.prompt)
    steps = (
        SegmentText(config.segment),
        GateToxicity(
            config.gate,
            lexicon=config.lexicon,
            linear=config.linear,
            classifier=config.scorer,
            classifier_options=scorer_options,
        ),
        LocalizeToxicSpans(
            config.localize,
            config.gate,
            lexicon=config.lexicon,
            classifier=config.scorer,
            classifier_options=scorer_options,
            contrast=config.model if contrast_options else None,
            contrast_options=contrast_options,
            tagger_options=(("threads", config.threads),),
        ),
        *rewriting,
        AcceptRewrites(
            config.accept,
            config.gate,
            config.segment,
            scorer=config.scorer,
            scorer_options=scorer_options,
            lexicon=config.lexicon,
            encoder=config.encoder,
            encoder_options=(("threads", config.threads),),
        ),
    )
    return Job(
        name="detox",
        input_url="",
        output_url=config.output,
        text_column=config.text_column,
        id_column=config.id_column,
        steps=steps,
        config={**given.semantic(), "prompt_tag": prompt.tag},
        models=tuple({info.tag: asdict(info) | {"role": role} for role, info in infos}.values()),
        seed=config.seed,
        assemble=AssembleOptions(config.compression, config.row_group_rows),
        max_dead=config.max_dead,
        # A rewritten row costs seconds: small units share the work well and are committed often.
        limits=UnitLimits(rows=16, bytes=1 << 20),
        max_units=1024,
        on_finish="pipelines.report:write_report",
        input_options=config.storage_options,
        output_options=config.storage_options,
    )


def run(config: DetoxConfig, settings: RunSettings) -> RunResult:
    """Run the job, or go on with it where an earlier run stopped."""
    config.check_toxic()
    if settings.dry_run and config.trains:
        trained = find_toxic_model(config, settings)
        note = f"toxic model: {trained.folder}, trained before" if trained else describe_training(config)
        if trained is None:
            check_training(config, settings)
        job = build_job(config, trained) if trained else build_job(config.without_contrast())
        result = run_job(job, config.input, settings)
        return replace(result, notes=(note, *result.notes))
    if config.trains:
        build_job(config.without_contrast())  # whatever else is amiss is said before minutes of training
    trained = ready_toxic_model(config, settings)
    result = run_job(build_job(config, trained), config.input, settings)
    if result.manifest is not None:
        _add_views(config.with_toxic(trained.folder, full=trained.full) if trained else config, settings)
    return result


def _add_views(config: DetoxConfig, settings: RunSettings) -> None:
    """Put into the report what takes the models; the output is whole, whatever becomes of that."""
    quiet = settings.progress == "quiet"
    try:
        update_views(config, (lambda line: None) if quiet else to_stderr)
    except Exception as error:
        to_stderr(f"the report lacks its view of the decoding ({type(error).__name__}: {error})")


def print_result(config: DetoxConfig, result: RunResult) -> None:
    """Say in a few lines what came of it and where to look."""
    plan = result.plan
    if result.detail:
        print(f"{result.state}: {result.detail}")
        return
    if result.manifest is None:
        unreadable = sum(1 for s in plan.shards if s.error)
        print(
            f"would read {plan.rows} rows in {len(plan.shards)} shards ({plan.units} units, {result.done} already done"
            + (f", {unreadable} shards unreadable" if unreadable else "")
            + ")"
        )
        for note in result.notes:
            print(note)
        return
    t = result.manifest["totals"]
    print(
        f"{result.state}: {t['rows_in']} rows in, {t['rows_kept']} kept ({t['rows_changed']} of them rewritten, "
        f"{t['edits']} edits), {t['rows_dropped']} dropped, {t['rows_dead']} dead"
    )
    for note in result.notes:
        print(note)
    print(f"corpus: {config.output}/data")
    print(f"report: {config.output}/report.html")
    if t["rows_dead"]:
        print(
            f"dead rows: tamis inspect {config.output} --table dead; tamis retry {config.output} replays them"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m pipelines.detox`: the same options as `tamis detox`."""
    import sys

    from pipelines.cli import main as cli

    cli(["detox", *(sys.argv[1:] if argv is None else argv)])


__all__ = [
    "DecodingOptions",
    "DetoxConfig",
    "build_job",
    "load_settings",
    "main",
    "make_config",
    "print_result",
    "run",
]

if __name__ == "__main__":
    from pipelines.detox import main as imported_main  # classes pickle by their real module, not __main__

    imported_main()
