"""`tamis eval retrieval`: options only; what it does is imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import Progress, Storage, pairs

_WHAT, _LABELS, _SCORES, _LEXICAL, _DENSE, _RUNNING = "What", "Labels", "Scores", "BM25", "Dense", "Running"


def register(app: typer.Typer) -> None:
    """Add the command to `tamis eval`."""
    app.command(
        "retrieval",
        epilog="Example: tamis eval retrieval beir/nfcorpus --split test --system bm25 --system minilm --system mine=runs/mine -o "
        "eval/     Rankings that are there: tamis eval retrieval test.qrels --run a=a.run --run b=b.run -o eval/",
    )(retrieval)


def retrieval(
    collection: Annotated[
        str, typer.Argument(help="Collection of any format (folder, .zip): documents, queries, labels.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the results.")],
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="bm25, bm25:b=0.75, an encoder (name, folder, hf:ID), or an output of `tamis embed` (OUTPUT@ENCODER: asked by an "
            "encoder trained against it); NAME= before it names it. May be repeated.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(help="A ranking that is there: [NAME=]FILE. May be repeated.", rich_help_panel=_WHAT),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="System the others are compared with; default the first.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Documents; default the collection's.", rich_help_panel=_WHAT, show_default=False),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(help="Queries; default the collection's.", rich_help_panel=_WHAT, show_default=False),
    ] = None,
    corpus_source: Annotated[
        str | None,
        typer.Option(
            "--corpus-source",
            "--source",
            help="Which copy of the documents, where there are several.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str, typer.Option(help="Text of a document, made of its columns.", rich_help_panel=_WHAT)
    ] = "{title} {text}",
    depth: Annotated[int, typer.Option(help="Documents a query.", min=1, rich_help_panel=_WHAT)] = 1000,
    split: Annotated[
        list[str] | None, typer.Option(help="Labels of this split; may be repeated.", rich_help_panel=_LABELS)
    ] = None,
    label_source: Annotated[
        str | None,
        typer.Option(help="Only human, or only llm labels.", rich_help_panel=_LABELS, show_default=False),
    ] = None,
    annotator: Annotated[
        list[str] | None, typer.Option(help="Only labels of this annotator.", rich_help_panel=_LABELS)
    ] = None,
    signal: Annotated[
        list[str] | None, typer.Option(help="Only this signal.", rich_help_panel=_LABELS)
    ] = None,
    unify: Annotated[
        str,
        typer.Option(
            help="How labels of several annotators merge: apart (an error), max, majority, prefer_human.",
            rich_help_panel=_LABELS,
        ),
    ] = "apart",
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="As ir-measures writes it; may be repeated. Default nDCG@10, RR@10, R@100, R@1000, AP.",
            rich_help_panel=_SCORES,
        ),
    ] = None,
    denominator: Annotated[
        str,
        typer.Option(
            help="Means are over all judged queries, or over those every system answered: judged, answered.",
            rich_help_panel=_SCORES,
        ),
    ] = "judged",
    keep_self: Annotated[
        bool,
        typer.Option("--keep-self", help="Keep a document whose id is the query's.", rich_help_panel=_SCORES),
    ] = False,
    draws: Annotated[int, typer.Option(help="Bootstrap draws.", min=100, rich_help_panel=_SCORES)] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.", rich_help_panel=_SCORES)] = 0,
    k1: Annotated[float, typer.Option(help="Saturation.", min=0, rich_help_panel=_LEXICAL)] = 0.9,
    b: Annotated[float, typer.Option(help="Length.", min=0, max=1, rich_help_panel=_LEXICAL)] = 0.4,
    stopwords: Annotated[
        str, typer.Option(help="Stop words left out: en, de, fr, ..., none.", rich_help_panel=_LEXICAL)
    ] = "en",
    stemmer: Annotated[
        str, typer.Option(help="Snowball stemmer: english, german, ..., none.", rich_help_panel=_LEXICAL)
    ] = "none",
    dense_option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE for encoders: prefix, query_prefix, prompt_name, query_prompt_name, pooling, normalize, "
            "dimensions, long, dtype, store, token_budget, metric.",
            rich_help_panel=_DENSE,
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            help="Search encoders by name through a FAISS index: flat, ivf, hnsw; default: look at every vector.",
            rich_help_panel=_DENSE,
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Look at every vector, index or not.", rich_help_panel=_DENSE)
    ] = False,
    work: Annotated[
        str | None,
        typer.Option(
            help="Folder where indexes, vectors and answers are kept, to be shared between evaluations; default inside "
            "the output.",
            rich_help_panel=_RUNNING,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that embed.", min=1, rich_help_panel=_RUNNING)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=_RUNNING)] = "auto",
    threads: Annotated[int, typer.Option(help="Threads a process.", min=1, rich_help_panel=_RUNNING)] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count, and write nothing.", rich_help_panel=_RUNNING)
    ] = False,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Score retrievers and rankings on a collection, side by side, with intervals and paired tests."""
    from pipelines import eval_retrieval as job

    given: dict[str, object] = {"measures": tuple(measure)} if measure else {}
    config = job.RetrievalEvalConfig(
        collection=collection,
        output=output,
        systems=job.parse_systems(system or []),
        runs=job.parse_systems(run or []),
        baseline=baseline,
        corpus=corpus,
        queries=queries,
        corpus_source=corpus_source,
        splits=tuple(split or ()),
        depth=depth,
        text=text,
        k1=k1,
        b=b,
        stopwords=stopwords,
        stemmer=stemmer,
        dense_options=pairs(dense_option),
        index=index,
        exact=exact,
        keep_self=keep_self,
        denominator=denominator,
        label_source=label_source,
        annotators=tuple(annotator or ()),
        signals=tuple(signal or ()),
        unify=unify.replace("-", "_"),
        seed=seed,
        draws=draws,
        work=work,
        device=device,
        threads=threads,
        workers=workers,
        progress=progress,
        storage_options=pairs(storage_option),
        **given,  # type: ignore[arg-type]
    )
    job.print_result(job.run(config, dry_run=dry_run))
