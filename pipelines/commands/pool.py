"""`tamis pool`: options only; what it does is imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import Progress, Storage, pairs

_WHAT, _SOURCES, _LEXICAL, _DENSE, _RUNNING = "What", "Sources", "BM25", "Dense", "Running"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "pool",
        epilog="Example: tamis pool beir/nfcorpus --split test --dense minilm --human -o pool/     "
        "Then: tamis label pool/ -o labels/     Without labels: tamis pool --corpus docs/ --queries q.jsonl -o pool/",
    )(pool)


def pool(
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write to; resumed if it holds this job.")
    ],
    collection: Annotated[
        str | None,
        typer.Argument(help="Collection of any format: documents, queries, judgments.", show_default=False),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Documents; default the collection's.", rich_help_panel=_WHAT, show_default=False),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(help="Queries; default the collection's.", rich_help_panel=_WHAT, show_default=False),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            "--corpus-source",
            help="Which copy of the documents, where there are several.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Only queries judged in this split; may be repeated.", rich_help_panel=_WHAT),
    ] = None,
    sample_queries: Annotated[
        int | None,
        typer.Option(
            help="Only so many queries, drawn by seed and id.",
            min=1,
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str, typer.Option(help="Text of a document, made of its columns.", rich_help_panel=_WHAT)
    ] = "{title} {text}",
    bm25: Annotated[bool, typer.Option("--bm25/--no-bm25", help="BM25.", rich_help_panel=_SOURCES)] = True,
    dense: Annotated[
        list[str] | None,
        typer.Option(
            help="Output of `tamis embed` (OUTPUT@ENCODER: asked by an encoder trained against it), or an encoder by name, which "
            "then embeds the corpus; NAME= before it names the source. May be repeated.",
            rich_help_panel=_SOURCES,
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(help="A ranking that is there: [NAME=]FILE. May be repeated.", rich_help_panel=_SOURCES),
    ] = None,
    human: Annotated[
        bool,
        typer.Option(
            "--human",
            help="What people judged good too, with its rank and score in every retriever.",
            rich_help_panel=_SOURCES,
        ),
    ] = False,
    positive_from: Annotated[
        int, typer.Option(help="Least grade of what people judged good.", rich_help_panel=_SOURCES)
    ] = 1,
    random: Annotated[
        int, typer.Option(help="Documents drawn at random a query.", min=0, rich_help_panel=_SOURCES)
    ] = 0,
    depth: Annotated[
        list[str] | None,
        typer.Option(
            help="Documents a query: 200, or by source bm25=200. May be repeated; default 100.",
            rich_help_panel=_SOURCES,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="Documents a query keeps, the best of all sources fused; people's are never cut.",
            min=1,
            rich_help_panel=_SOURCES,
            show_default=False,
        ),
    ] = None,
    fuse: Annotated[
        str, typer.Option(help="How the budget is spent: rrf, interleave.", rich_help_panel=_SOURCES)
    ] = "rrf",
    keep_self: Annotated[
        bool,
        typer.Option(
            "--keep-self", help="Keep a document whose id is the query's.", rich_help_panel=_SOURCES
        ),
    ] = False,
    k1: Annotated[
        float, typer.Option(help="Saturation; 0.82 on MS MARCO passages.", min=0, rich_help_panel=_LEXICAL)
    ] = 0.9,
    b: Annotated[
        float, typer.Option(help="Length; 0.68 on MS MARCO passages.", min=0, max=1, rich_help_panel=_LEXICAL)
    ] = 0.4,
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
    exact: Annotated[
        bool, typer.Option("--exact", help="Look at every vector, index or not.", rich_help_panel=_DENSE)
    ] = False,
    documents: Annotated[
        str, typer.Option(help="Documents written beside the pool: pooled, all, none.")
    ] = "pooled",
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    queries_per_shard: Annotated[int, typer.Option(min=1, rich_help_panel=_RUNNING)] = 5_000,
    workers: Annotated[int, typer.Option(help="Processes that embed.", min=1, rich_help_panel=_RUNNING)] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=_RUNNING)] = "auto",
    threads: Annotated[int, typer.Option(help="Threads a process.", min=1, rich_help_panel=_RUNNING)] = 1,
    overwrite: Annotated[
        bool,
        typer.Option(help="Replace what other settings left in the folder.", rich_help_panel=_RUNNING),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count, and write nothing.", rich_help_panel=_RUNNING)
    ] = False,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Find what is worth judging: for each query the union of BM25, dense retrievers, rankings and people's positives."""
    from pipelines import pool as job

    config = job.PoolConfig(
        collection=collection,
        output=output,
        corpus=corpus,
        queries=queries,
        corpus_source=source,
        splits=tuple(split or ()),
        sample_queries=sample_queries,
        text=text,
        bm25=bm25,
        k1=k1,
        b=b,
        stopwords=stopwords,
        stemmer=stemmer,
        dense=job.parse_named(dense or [], "--dense"),
        dense_options=pairs(dense_option),
        runs=job.parse_named(run or [], "--run"),
        human=human,
        positive_from=positive_from,
        random=random,
        depth=by_source(depth),
        budget=budget,
        fusion=fuse,
        keep_self=keep_self,
        exact=exact,
        documents=documents,
        seed=seed,
        queries_per_shard=queries_per_shard,
        device=device,
        threads=threads,
        workers=workers,
        overwrite=overwrite,
        progress=progress,
        storage_options=pairs(storage_option),
    )
    job.print_result(job.run(config, dry_run=dry_run))


def by_source(items: list[str] | None) -> dict[str, int]:
    """`200` for all sources, `bm25=200` for one."""
    found: dict[str, int] = {}
    for item in items or []:
        name, sign, number = item.rpartition("=")
        try:
            found[name if sign else ""] = int(number)
        except ValueError:
            raise typer.BadParameter(
                f"'{item}' is not a number, nor SOURCE=NUMBER", param_hint="--depth"
            ) from None
    return found
