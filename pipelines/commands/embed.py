"""`tamis embed`, `tamis index` and `tamis search`: thin functions; what they do is imported when they are called."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipelines.commands.options import Progress, Storage, pairs, run_settings

_TEXT, _MODEL, _INDEX, _RUNNING = "Text", "Model", "Index", "Running"

Setting = Annotated[
    list[str] | None,
    typer.Option(
        "--index-option",
        help="KEY=VALUE of the index: metric, codec, lists, neighbours, construction, probe, recall, part_mb ...",
        rich_help_panel=_INDEX,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=_RUNNING)]
Threads = Annotated[int, typer.Option(help="Threads a worker.", min=1, rich_help_panel=_RUNNING)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        context_settings={"allow_extra_args": True},
        epilog="Example: tamis embed corpus/ --output vectors/ --text '{title} {text}' --index ivf     "
        "Then: tamis search vectors/ 'what are statins for?'",
    )(embed)
    app.command(epilog="Example: tamis index vectors/ --kind hnsw --index-option recall=0.99")(index)
    app.command(
        epilog="Example: tamis search vectors/ 'what are statins for?' -k 5     "
        "A run: tamis search vectors/ --queries queries.jsonl -k 100 --output run.trec"
    )(search)


def embed(
    ctx: typer.Context,
    input: Annotated[str, typer.Argument(help="File, folder, glob, URL, `datasets` folder or hub id.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write to; resumed if it holds this job.")
    ],
    encoder: Annotated[
        str,
        typer.Option("--encoder", "--model", help="minilm, a model folder, hf:ID.", rich_help_panel=_MODEL),
    ] = "minilm",
    text: Annotated[
        str | None,
        typer.Option(
            help="Text made of columns: '{title} {text}'.", rich_help_panel=_TEXT, show_default=False
        ),
    ] = None,
    text_columns: Annotated[
        str | None,
        typer.Option(
            help="Columns joined with a space: title,text.", rich_help_panel=_TEXT, show_default=False
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the text.", rich_help_panel=_TEXT)] = "text",
    id_column: Annotated[
        str | None, typer.Option(help="Column with row ids; default <shard>#<row>.", rich_help_panel=_TEXT)
    ] = None,
    long: Annotated[
        str,
        typer.Option(
            help="Texts over the model's limit: truncate, or mean (of windows, weighted by tokens).",
            rich_help_panel=_TEXT,
        ),
    ] = "truncate",
    kind: Annotated[
        str,
        typer.Option(
            "--as", help="document or query: which of the model's prompts to use.", rich_help_panel=_MODEL
        ),
    ] = "document",
    prompt_name: Annotated[
        str | None,
        typer.Option(help="Prompt of the model, by name.", rich_help_panel=_MODEL, show_default=False),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Text before every text, instead of the model's prompt; '' for none.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            help="mean, cls, max, lasttoken, weightedmean; default: the model's own.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Vectors of unit length; default: as the model says.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(
            help="Keep so many numbers of each vector (Matryoshka models).",
            min=1,
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str,
        typer.Option(
            help="Stored numbers: float32, float16, int8 (with a scale a row).", rich_help_panel=_MODEL
        ),
    ] = "float32",
    attribute: Annotated[str, typer.Option(help="Name of the attribute the vectors go to.")] = "embedding",
    index: Annotated[
        str | None,
        typer.Option(
            help="Build an index too: flat, ivf, hnsw, or a FAISS factory string.",
            rich_help_panel=_INDEX,
            show_default=False,
        ),
    ] = None,
    index_option: Setting = None,
    workers: Annotated[
        int, typer.Option(help="Worker processes on this machine.", min=1, rich_help_panel=_RUNNING)
    ] = 1,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="The model computes in: float32, bfloat16, auto.", rich_help_panel=_RUNNING)
    ] = "float32",
    threads: Threads = 1,
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Padded tokens a batch; default 4096 on a CPU, 65536 elsewhere.",
            min=1,
            rich_help_panel=_RUNNING,
            show_default=False,
        ),
    ] = None,
    unit_rows: Annotated[
        int | None,
        typer.Option(help="Rows a unit of work.", min=1, rich_help_panel=_RUNNING, show_default=False),
    ] = None,
    checkpoint: Annotated[
        bool,
        typer.Option(
            help="Keep what a unit at work has computed, so that a killed run resumes within it.",
            rich_help_panel=_RUNNING,
        ),
    ] = True,
    overwrite: Annotated[
        bool,
        typer.Option(
            help="Replace what other settings of this job left in the folder.", rich_help_panel=_RUNNING
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Check and plan, then stop.", rich_help_panel=_RUNNING)
    ] = False,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Put a vector beside every row and change nothing; with --index, make the rows searchable.

    Arguments after `--` go to Beam.
    """
    from pydantic import ValidationError

    from pipelines import embed as job
    from schemas.errors import TamisError
    from transforms.embed.text import TextTemplate

    if text is not None and text_columns is not None:
        raise typer.BadParameter("pass --text or --text-columns, not both")
    if text_columns is not None:
        text = TextTemplate.joined(tuple(c.strip() for c in text_columns.split(",") if c.strip())).template
    fields: dict[str, Any] = {
        "input": input, "output": output, "encoder": encoder, "text": text, "text_column": text_column,
        "id_column": id_column, "long": long, "kind": kind, "prompt_name": prompt_name, "prefix": prefix,
        "pooling": pooling, "normalize": normalize, "dimensions": dimensions, "store": store, "attribute": attribute,
        "index": job.make_index_config(index, pairs(index_option)) if index else None, "device": device, "dtype": dtype,
        "threads": threads, "token_budget": token_budget, "checkpoint": checkpoint,
        "storage_options": pairs(storage_option),
    }  # fmt: skip
    try:
        config = job.EmbedConfig(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-").replace("kind", "as")
        raise TamisError(f"--{option}: {first['msg']}") from error
    result = job.run(config, run_settings(workers, unit_rows, overwrite, dry_run, progress, ctx.args))
    job.print_result(config, result)


def index(
    out: Annotated[str, typer.Argument(help="Output of `tamis embed` (path or URL).", show_default=False)],
    kind: Annotated[str, typer.Option(help="flat, ivf, hnsw, or a FAISS factory string.")] = "ivf",
    index_option: Setting = None,
    attribute: Annotated[
        str | None, typer.Option(help="Which embedding; default: the job's own.", show_default=False)
    ] = None,
    threads: Threads = 1,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress lines.", rich_help_panel=_RUNNING)
    ] = False,
    storage_option: Storage = None,
) -> None:
    """Build an index over an output's embeddings, or another one; measured against exact search."""
    import sys

    from pipelines import embed as job

    entry = job.index_output(
        out,
        job.make_index_config(kind, pairs(index_option)),
        attribute=attribute,
        threads=threads,
        options=pairs(storage_option),
        notify=(lambda line: None) if quiet else (lambda line: print(f"index: {line}", file=sys.stderr)),
    )
    print(job.describe_index(out, entry))


def search(
    out: Annotated[str, typer.Argument(help="Output of `tamis embed` (path or URL).", show_default=False)],
    query: Annotated[str, typer.Argument(help="What to look for.")] = "",
    k: Annotated[int, typer.Option("-k", "--top", help="Hits a query.", min=1)] = 10,
    queries: Annotated[
        str | None,
        typer.Option(
            help="File of queries instead: JSONL (_id, text), TSV (id, text), Parquet.", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Where the run goes: .parquet, else TREC format.", show_default=False
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look at every vector, index or not.")] = False,
    probe: Annotated[
        int | None,
        typer.Option(
            help="How much of the index to look at (IVF lists, HNSW breadth).", min=1, show_default=False
        ),
    ] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Prompt of the model for queries, by name.", show_default=False)
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Text before every query, instead of the model's prompt.", show_default=False),
    ] = None,
    query_encoder: Annotated[
        str | None,
        typer.Option(
            help="Encoder of the queries, trained against these vectors (tamis train retriever --documents fixed).",
            show_default=False,
        ),
    ] = None,
    tag: Annotated[str, typer.Option(help="Run tag of a TREC run.")] = "tamis",
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, whole texts.")] = False,
    device: Device = "auto",
    threads: Threads = 1,
    storage_option: Storage = None,
) -> None:
    """Find the rows nearest to a query, with the model that embedded them."""
    from pipelines import search as job

    if bool(query) == bool(queries):
        raise typer.BadParameter("pass a query, or --queries FILE")
    options = job.SearchOptions(
        exact=exact,
        probe=probe,
        prompt_name=prompt_name,
        prefix=prefix,
        query_encoder=query_encoder,
        device=device,
        threads=threads,
    )
    searcher = job.Searcher(out, options, pairs(storage_option))
    if queries is None:
        job.show_hits(searcher, query, k, as_json=as_json)
        return
    run = job.run_file(searcher, job.read_queries(queries), k, output, tag=tag)
    if run:
        print(run, end="")
