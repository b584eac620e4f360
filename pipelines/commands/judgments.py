"""`tamis judgments ...` and `tamis groups`: options only, what they do is imported when they are called."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import Progress, Storage, pairs

judgments_app = typer.Typer(
    name="judgments",
    help="Relevance and utility labels: in and out of every format, and how far they agree.",
    no_args_is_help=True,
)
Overwrite = Annotated[
    bool, typer.Option(help="Replace what other settings left in the folder.", rich_help_panel="Running")
]
Output = Annotated[str, typer.Option("--output", "-o", help="Folder to write to.")]
PositiveValue = Annotated[
    float, typer.Option(help="Labels that are a value are positive above this.", rich_help_panel="Labels")
]
PositiveRank = Annotated[
    int | None,
    typer.Option(
        help="Labels that are a rank are positive up to this.", rich_help_panel="Labels", show_default=False
    ),
]
Unify = Annotated[
    str,
    typer.Option(
        help="How labels of several annotators merge: apart (an error), max, majority, prefer_human.",
        rich_help_panel="Labels",
    ),
]
AcrossTargets = Annotated[
    bool,
    typer.Option(
        "--across-targets", help="Also merge labels of different target models.", rich_help_panel="Labels"
    ),
]
LabelSource = Annotated[
    str | None,
    typer.Option(help="Only human, or only llm labels.", rich_help_panel="Labels", show_default=False),
]
Annotator = Annotated[
    list[str] | None, typer.Option(help="Only labels of this annotator.", rich_help_panel="Labels")
]
Signal = Annotated[list[str] | None, typer.Option(help="Only this signal.", rich_help_panel="Labels")]
TargetModel = Annotated[
    list[str] | None,
    typer.Option(help="Only labels for this reader; `agnostic`: for any.", rich_help_panel="Labels"),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `tamis`."""
    app.add_typer(judgments_app)
    judgments_app.command(
        "import",
        epilog="Example: tamis judgments import beir/nfcorpus -o labels/     "
        "tamis judgments import judged.qrels --annotator nist -o labels/",
    )(import_)
    judgments_app.command(
        "export",
        epilog="Example: tamis judgments export labels/ --format trec-qrels -o qrels/     "
        "tamis judgments export labels/ --pool bm25.run --format sentence-transformers --layout triplet -o st/",
    )(export)
    judgments_app.command(
        "agree",
        epilog="Example: tamis judgments agree llm/ human/ --run bm25=bm25.run --run dense=dense.run -o agreement/",
    )(agree)
    app.command(
        "groups",
        epilog="Example: tamis groups labels/ --pool bm25.run --relative-margin 0.05 -o groups/",
    )(groups)


def import_(
    source: Annotated[str, typer.Argument(help="File, folder or URL of any known format.")],
    output: Output,
    format: Annotated[
        str | None,
        typer.Option(
            help="Its format, where looking does not tell: beir, trec-qrels, trec-run, tevatron, tevatron-v2, "
            "sentence-transformers, flagembedding, pylate, datasets, table.",
            show_default=False,
        ),
    ] = None,
    label_source: Annotated[
        str | None,
        typer.Option(
            help="human or llm, where the source does not say; default human (a teacher's scores: llm).",
            rich_help_panel="Labels",
            show_default=False,
        ),
    ] = None,
    annotator: Annotated[
        str | None,
        typer.Option(
            help="Who judged, where the source does not say.", rich_help_panel="Labels", show_default=False
        ),
    ] = None,
    signal: Annotated[
        str | None,
        typer.Option(
            help="What the labels are (qrels, utilsel, ...).", rich_help_panel="Labels", show_default=False
        ),
    ] = None,
    target_model: Annotated[
        str | None,
        typer.Option(
            help="Reader the labels hold for; default any.", rich_help_panel="Labels", show_default=False
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split to read; may be repeated; default all.", rich_help_panel="Labels"),
    ] = None,
    negatives: Annotated[
        str,
        typer.Option(
            help="Given negatives are candidates nobody judged (pool), or labels of grade 0 (judged).",
            rich_help_panel="Labels",
        ),
    ] = "pool",
    source_: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="Which copy of the documents, where people and models wrote one each; `all` keeps every copy.",
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[bool, typer.Option(help="Also write the documents.")] = True,
    overwrite: Overwrite = False,
    storage_option: Storage = None,
) -> None:
    """Bring labels, queries, documents and candidates of any format into tables, every label with its origin."""
    from pipelines import judgments_import as job

    config = job.ImportConfig(
        source=source,
        output=output,
        format=format,
        label_source=label_source,
        annotator=annotator,
        signal=signal,
        target_model=target_model,
        splits=tuple(split or ()),
        corpus_source=source_,
        negatives=negatives,
        corpus=corpus,
        overwrite=overwrite,
        storage_options=pairs(storage_option),
    )
    job.print_result(job.run(config))


def export(
    source: Annotated[list[str], typer.Argument(help="Collections of any format.")],
    format: Annotated[
        str,
        typer.Option(
            help="beir, trec-qrels, trec-run, tevatron, tevatron-v2, sentence-transformers, flagembedding, pylate, datasets."
        ),
    ],
    output: Output,
    corpus: Annotated[
        str | None, typer.Option(help="Documents; default those of the collection.", show_default=False)
    ] = None,
    queries: Annotated[
        str | None, typer.Option(help="Queries; default those of the collection.", show_default=False)
    ] = None,
    pool: Annotated[
        list[str] | None, typer.Option(help="Candidates: a pool, or a TREC run. May be repeated.")
    ] = None,
    source_: Annotated[
        str | None,
        typer.Option(
            "--source", help="Which copy of the documents, where there are several.", show_default=False
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of labels that have none.", rich_help_panel="Format")
    ] = "test",
    negatives: Annotated[
        int | None,
        typer.Option(
            help="Negatives a row; default all.", min=1, rich_help_panel="Format", show_default=False
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="sentence-transformers: pair, triplet, n-tuple, labeled-pair, labeled-list.",
            rich_help_panel="Format",
            show_default=False,
        ),
    ] = None,
    positive_from: Annotated[
        int, typer.Option(help="Least grade of a positive.", rich_help_panel="Labels")
    ] = 1,
    positive_value: PositiveValue = 0.0,
    positive_rank: PositiveRank = None,
    unify: Unify = "apart",
    across_targets: AcrossTargets = False,
    label_source: LabelSource = None,
    annotator: Annotator = None,
    signal: Signal = None,
    target_model: TargetModel = None,
    only_split: Annotated[
        list[str] | None, typer.Option(help="Only labels of this split.", rich_help_panel="Labels")
    ] = None,
    overwrite: Overwrite = False,
    storage_option: Storage = None,
) -> None:
    """Write labels in another tool's format, and say what it has no place for."""
    from pipelines import judgments_export as job

    config = job.ExportConfig(
        source=tuple(source),
        output=output,
        format=format,
        pools=tuple(pool or ()),
        corpus=corpus,
        queries=queries,
        corpus_source=source_,
        label_source=label_source,
        annotators=tuple(annotator or ()),
        signals=tuple(signal or ()),
        target_models=tuple(target_model or ()),
        splits=tuple(only_split or ()),
        unify=unify.replace("-", "_"),
        across_targets=across_targets,
        positive_from=positive_from,
        positive_value=positive_value,
        positive_rank=positive_rank,
        split=split,
        negatives=negatives,
        layout=layout,
        overwrite=overwrite,
        storage_options=pairs(storage_option),
    )
    job.print_result(job.run(config))


def agree(
    a: Annotated[str, typer.Argument(help="Labels to look at: each annotator and signal by itself.")],
    b: Annotated[str, typer.Argument(help="Labels to compare with (human).")],
    output: Output,
    run: Annotated[
        list[str] | None,
        typer.Option(help="A ranking to score with both labels: FILE or NAME=FILE. May be repeated."),
    ] = None,
    measure: Annotated[str, typer.Option(help="As ir-measures writes it: nDCG@10, RR@10, AP.")] = "nDCG@10",
    positive_from: Annotated[int, typer.Option(help="Least grade of a positive of A.")] = 1,
    positive_from_b: Annotated[
        int | None, typer.Option(help="Least grade of a positive of B; default as A's.", show_default=False)
    ] = None,
    positive_value: Annotated[
        float, typer.Option(help="Labels that are a value are positive above this.")
    ] = 0.0,
    positive_rank: Annotated[
        int | None,
        typer.Option(help="Labels that are a rank are positive up to this.", show_default=False),
    ] = None,
    unjudged: Annotated[
        str,
        typer.Option(
            help="Pairs B did not judge: skip; negative; auto: negative where B lists positives only."
        ),
    ] = "auto",
    unify_b: Annotated[
        str,
        typer.Option(
            help="How several annotators of B merge: apart (an error), max, majority, prefer_human."
        ),
    ] = "apart",
    annotator: Annotated[list[str] | None, typer.Option(help="Only this annotator of A.")] = None,
    signal: Annotated[list[str] | None, typer.Option(help="Only this signal of A.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Only this split of B.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every draw.", rich_help_panel="Running")] = 0,
    draws: Annotated[
        int, typer.Option(help="Bootstrap resamples.", min=100, rich_help_panel="Running")
    ] = 2000,
    storage_option: Storage = None,
) -> None:
    """Say how far labels agree: precision, recall, kappa, AUC by annotator and cut-off, and what runs make of both."""
    from pathlib import PurePosixPath

    from pipelines import judgments_agree as job
    from pipelines.commands.eval_quality import named

    runs = [r if "=" in r else f"{PurePosixPath(r).name.rpartition('.')[0] or r}={r}" for r in run or []]
    config = job.AgreeConfig(
        a=a,
        b=b,
        output=output,
        runs=named(runs, "--run"),
        measure=measure,
        positive_from=positive_from,
        positive_from_b=positive_from_b,
        positive_value=positive_value,
        positive_rank=positive_rank,
        unjudged=unjudged,
        unify_b=unify_b.replace("-", "_"),
        annotators=tuple(annotator or ()),
        signals=tuple(signal or ()),
        splits=tuple(split or ()),
        seed=seed,
        draws=draws,
        storage_options=pairs(storage_option),
    )
    job.print_result(job.run(config), measure)


def groups(
    judgments: Annotated[list[str], typer.Argument(help="Collections with labels, of any format.")],
    output: Output,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Documents; default those of the collection.", rich_help_panel="Texts", show_default=False
        ),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help="Queries; default those of the collection.", rich_help_panel="Texts", show_default=False
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Which copy of the documents, where there are several.",
            rich_help_panel="Texts",
            show_default=False,
        ),
    ] = None,
    with_text: Annotated[
        bool,
        typer.Option(
            "--with-text/--ids-only", help="Texts in the groups, or ids alone.", rich_help_panel="Texts"
        ),
    ] = True,
    regime: Annotated[
        str,
        typer.Option(
            help="single; curriculum: LLM labels, then human ones; union: both at once. auto: curriculum where there are both.",
            rich_help_panel="Labels",
        ),
    ] = "auto",
    positive_from: Annotated[
        list[str] | None,
        typer.Option(
            help="Least grade of a positive: 2, or by stage: llm=2. May be repeated; default 1.",
            rich_help_panel="Labels",
            show_default=False,
        ),
    ] = None,
    positive_value: PositiveValue = 0.0,
    positive_rank: PositiveRank = None,
    unify: Unify = "apart",
    across_targets: AcrossTargets = False,
    label_source: LabelSource = None,
    annotator: Annotator = None,
    signal: Signal = None,
    target_model: TargetModel = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Only this split.", rich_help_panel="Labels")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(help="Candidates: a pool, or a TREC run. May be repeated.", rich_help_panel="Negatives"),
    ] = None,
    negatives_from: Annotated[
        list[str] | None,
        typer.Option(
            help="Source of negatives (bm25, judged, random), in order of preference; default all.",
            rich_help_panel="Negatives",
        ),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Only candidates of these ranks: 10-200.", rich_help_panel="Negatives", show_default=False
        ),
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Least score.", rich_help_panel="Negatives", show_default=False)
    ] = None,
    max_score: Annotated[
        float | None, typer.Option(help="Highest score.", rich_help_panel="Negatives", show_default=False)
    ] = None,
    absolute_margin: Annotated[
        float | None,
        typer.Option(
            help="Score below the positive's by this.", rich_help_panel="Negatives", show_default=False
        ),
    ] = None,
    relative_margin: Annotated[
        float | None,
        typer.Option(
            help="Score below the positive's by this share of it: 0.05.",
            rich_help_panel="Negatives",
            show_default=False,
        ),
    ] = None,
    margin_against: Annotated[
        str, typer.Option(help="weakest, strongest or mean positive.", rich_help_panel="Negatives")
    ] = "weakest",
    without_score: Annotated[
        str,
        typer.Option(
            help="keep or drop candidates where no positive has a score to compare with.",
            rich_help_panel="Negatives",
        ),
    ] = "keep",
    max_negatives: Annotated[
        int | None,
        typer.Option(
            help="Negatives a query keeps; default all.", rich_help_panel="Negatives", show_default=False
        ),
    ] = None,
    min_negatives: Annotated[
        int,
        typer.Option(
            help="Fewer drop the query; 0: in-batch negatives alone.", min=0, rich_help_panel="Negatives"
        ),
    ] = 1,
    random_negatives: Annotated[
        int, typer.Option(help="Documents drawn at random a query.", min=0, rich_help_panel="Negatives")
    ] = 0,
    mask_copies: Annotated[
        bool,
        typer.Option(
            help="Mask documents of equal text, and rewrites, of a positive.", rich_help_panel="Negatives"
        ),
    ] = True,
    positives: Annotated[
        str,
        typer.Option(help="first, random_one, rotate, all.", rich_help_panel="Draw (for the trainer)"),
    ] = "all",
    max_positives: Annotated[
        int,
        typer.Option(
            help="Cap; -1 leaves one slot for a negative.", rich_help_panel="Draw (for the trainer)"
        ),
    ] = 4,
    group_size: Annotated[
        int, typer.Option(help="Documents a group.", rich_help_panel="Draw (for the trainer)")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    queries_per_shard: Annotated[int, typer.Option(min=1, rich_help_panel="Running")] = 20_000,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count, and write nothing.", rich_help_panel="Running")
    ] = False,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Make training groups of judgments: every positive in order of quality, negatives with their provenance."""
    from pipelines import groups as job

    first, last = _ranks(ranks)
    config = job.GroupsConfig(
        judgments=tuple(judgments),
        output=output,
        corpus=corpus,
        queries=queries,
        corpus_source=source,
        pools=tuple(pool or ()),
        with_text=with_text,
        regime=regime,
        positive_from=_by_stage(positive_from),
        positive_value=positive_value,
        positive_rank=positive_rank,
        unify=unify.replace("-", "_"),
        across_targets=across_targets,
        label_source=label_source,
        annotators=tuple(annotator or ()),
        signals=tuple(signal or ()),
        target_models=tuple(target_model or ()),
        splits=tuple(split or ()),
        sources=tuple(negatives_from or ()),
        first_rank=first,
        last_rank=last,
        min_score=min_score,
        max_score=max_score,
        absolute_margin=absolute_margin,
        relative_margin=relative_margin,
        margin_against=margin_against,
        without_score=without_score,
        max_negatives=max_negatives,
        min_negatives=min_negatives,
        random_negatives=random_negatives,
        mask_copies=mask_copies,
        positives=positives.replace("-", "_"),
        max_positives=max_positives,
        group_size=group_size,
        seed=seed,
        queries_per_shard=queries_per_shard,
        overwrite=overwrite,
        progress=progress,
        storage_options=pairs(storage_option),
    )
    job.print_result(job.run(config, dry_run=dry_run))


def _ranks(text: str | None) -> tuple[int, int | None]:
    """`10-200`, `10-` or `-200`."""
    if text is None:
        return 1, None
    first, sign, last = text.partition("-")
    try:
        return int(first or 1), int(last) if last else (None if sign else int(first))
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not FIRST-LAST", param_hint="--ranks") from None


def _by_stage(items: list[str] | None) -> dict[str, int]:
    """`2` for all stages, `llm=2` for one."""
    rules: dict[str, int] = {}
    for item in items or []:
        stage, sign, grade = item.rpartition("=")
        try:
            rules[stage if sign else ""] = int(grade)
        except ValueError:
            raise typer.BadParameter(f"'{item}' is no grade", param_hint="--positive-from") from None
    return rules
