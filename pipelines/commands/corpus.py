"""`tamis detox` and `tamis score`: thin functions; what they do is imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.options import Progress, Storage, Workers, numbers, pairs, run_settings


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        context_settings={"allow_extra_args": True},
        epilog="Example: tamis detox corpus/ --output clean/ --workers 2     "
        "On Dataflow: tamis detox gs://b/corpus --output gs://b/clean -- --runner=DataflowRunner --project=P --region=R",
    )(detox)
    app.command(
        context_settings={"allow_extra_args": True},
        epilog="Example: tamis score corpus/ --output scores/ --scorer linear",
    )(score)


def detox(
    ctx: typer.Context,
    input: Annotated[str, typer.Argument(help="File, folder, glob, URL, `datasets` folder or hub id.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write to; resumed if it holds this job.")
    ],
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Column with row ids; default <shard>#<row>.")] = None,
    gate: Annotated[
        str,
        typer.Option(
            help="cascade, all (classifier sees every segment), none (rewrite all).",
            rich_help_panel="Finding",
        ),
    ] = "cascade",
    tau: Annotated[
        float, typer.Option(help="A segment scored at least this is toxic.", rich_help_panel="Finding")
    ] = 0.5,
    scorer: Annotated[
        str,
        typer.Option(
            help="Classifier that decides and ranks (`tamis models list`).", rich_help_panel="Finding"
        ),
    ] = "jigsaw-bilstm",
    scorer_option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE for the classifier (checkpoint=, config=, label=, dtype=); may be repeated.",
            rich_help_panel="Finding",
        ),
    ] = None,
    lexicon: Annotated[
        str,
        typer.Option(help="`lexicon`, or `lexicon:FILE` with one term a line.", rich_help_panel="Finding"),
    ] = "lexicon",
    localize: Annotated[
        str,
        typer.Option(
            help="What finds the toxic words: lexicon, occlusion, socd (needs a toxic model), by commas.",
            rich_help_panel="Finding",
        ),
    ] = "lexicon,occlusion",
    model: Annotated[
        str,
        typer.Option(
            help="Language model that rewrites: smollm2, a folder, hf:ID, openai:URL#MODEL.",
            rich_help_panel="Rewriting",
        ),
    ] = "smollm2",
    adapter: Annotated[
        str | None,
        typer.Option(
            help="LoRA adapter, by name or folder; `none` for no adapter.", rich_help_panel="Rewriting"
        ),
    ] = None,
    decoding: Annotated[
        str,
        typer.Option(
            help="prompt_only, or contrastive: logratio, official, vanilla_cd. Without a toxic model one is trained on "
            "what the gate flags.",
            rich_help_panel="Rewriting",
        ),
    ] = "prompt_only",
    toxic_adapter: Annotated[
        str | None,
        typer.Option(help="LoRA adapter of the toxic model to steer away from.", rich_help_panel="Rewriting"),
    ] = None,
    toxic_full: Annotated[
        bool,
        typer.Option(
            "--toxic-full",
            help="Train all weights of the toxic model, not an adapter.",
            rich_help_panel="Rewriting",
        ),
    ] = False,
    compare_modes: Annotated[
        int,
        typer.Option(
            help="Show in the report what every decoding mode makes of so many passages.",
            min=0,
            rich_help_panel="Rewriting",
        ),
    ] = 0,
    prompt: Annotated[
        str, typer.Option(help="Prompt, by name or file.", rich_help_panel="Rewriting")
    ] = "detox-rewrite-v1",
    unit: Annotated[
        str,
        typer.Option(help="Rewrite each toxic sentence, or the whole document.", rich_help_panel="Rewriting"),
    ] = "sentence",
    temperatures: Annotated[
        str, typer.Option(help="Comma-separated sampling temperatures.", rich_help_panel="Rewriting")
    ] = "0.6,0.8,1.0,1.2,1.5",
    per_temperature: Annotated[
        int, typer.Option(help="Candidates for each.", rich_help_panel="Rewriting")
    ] = 2,
    max_toxicity: Annotated[
        float | None,
        typer.Option(
            help="A replacement must score below this; default --tau.",
            rich_help_panel="Accepting",
            show_default=False,
        ),
    ] = None,
    min_similarity: Annotated[
        float, typer.Option(help="Least cosine similarity to the source.", rich_help_panel="Accepting")
    ] = 0.45,
    fusion_lambda: Annotated[
        float,
        typer.Option("--lambda", help="Rank by (1-L)*similarity - L*toxicity.", rich_help_panel="Accepting"),
    ] = 0.5,
    ladder: Annotated[
        str | None,
        typer.Option(
            help="Rungs, in order: candidate,span_edit,redact,drop_segment,drop_document,flag.",
            rich_help_panel="Accepting",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="TOML or JSON file with any settings; options given here win.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting by its path: --set accept.redaction='[...]'."),
    ] = None,
    workers: Workers = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel="Running")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel="Running")] = "auto",
    threads: Annotated[
        int, typer.Option(help="Torch threads a worker.", min=1, rich_help_panel="Running")
    ] = 1,
    unit_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows a unit of work: what one commit holds; default by the corpus.",
            min=1,
            rich_help_panel="Running",
            show_default=False,
        ),
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option(help="Parquet codec of the output; default as the input.", rich_help_panel="Running"),
    ] = None,
    row_group_rows: Annotated[
        int | None,
        typer.Option(help="Rows a Parquet row group; default as the input.", rich_help_panel="Running"),
    ] = None,
    max_dead: Annotated[
        int | None, typer.Option(help="Stop when more rows than this have died.", rich_help_panel="Running")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            help="Replace what other settings of this job left in the folder.", rich_help_panel="Running"
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Check and plan, then stop.", rich_help_panel="Running")
    ] = False,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Rewrite the toxic parts of a corpus and give the same corpus back, with a record of every change.

    Arguments after `--` go to Beam.
    """
    from pipelines import detox as job

    given: dict[str, Any] = {
        "text_column": text_column, "id_column": id_column, "scorer": scorer, "scorer_extra": pairs(scorer_option), "lexicon": lexicon, "model": model,
        "adapter": adapter, "decoding.mode": decoding, "decoding.toxic_adapter": toxic_adapter,
        "decoding.train.full": toxic_full, "decoding.compare_modes": compare_modes,
        "localize.sources": [s.strip() for s in localize.split(",") if s.strip()], "prompt": prompt, "seed": seed, "gate.gate": gate, "gate.tau": tau, "rewrite.unit": unit,
        "rewrite.sampling.temperatures": numbers("--temperatures", temperatures),
        "rewrite.sampling.per_temperature": per_temperature, "accept.max_toxicity": max_toxicity,
        "accept.min_similarity": min_similarity, "accept.fusion_lambda": fusion_lambda,
        "accept.ladder": [r.strip() for r in ladder.split(",") if r.strip()] if ladder else None, "device": device, "dtype": dtype, "threads": threads,
        "compression": compression, "row_group_rows": row_group_rows, "max_dead": max_dead,
    }  # fmt: skip
    flags = {  # option name -> setting, to know which were typed and which are defaults
        "scorer_option": "scorer_extra", "decoding": "decoding.mode", "toxic_adapter": "decoding.toxic_adapter",
        "toxic_full": "decoding.train.full", "compare_modes": "decoding.compare_modes", "localize": "localize.sources", "gate": "gate.gate", "tau": "gate.tau", "unit": "rewrite.unit", "temperatures": "rewrite.sampling.temperatures",
        "per_temperature": "rewrite.sampling.per_temperature", "max_toxicity": "accept.max_toxicity",
        "min_similarity": "accept.min_similarity", "fusion_lambda": "accept.fusion_lambda", "ladder": "accept.ladder",
    }  # fmt: skip
    typed = {
        flags.get(name, name)
        for name in ctx.params
        if (source := ctx.get_parameter_source(name)) is not None and source.name != "DEFAULT"
    }
    settings = job.load_settings(config, {k: v for k, v in given.items() if k in typed}, set_ or [])
    full = job.make_config(
        {**settings, "input": input, "output": output, "storage_options": pairs(storage_option)}
    )
    result = job.run(full, run_settings(workers, unit_rows, overwrite, dry_run, progress, ctx.args))
    job.print_result(full, result)


def score(
    ctx: typer.Context,
    input: Annotated[str, typer.Argument(help="File, folder, glob, URL, `datasets` folder or hub id.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write to.")],
    scorer: Annotated[str, typer.Option(help="Scorer, by name (`tamis models list`).")] = "lexicon",
    attribute: Annotated[str, typer.Option(help="Name of the attribute the scores go to.")] = "score",
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="Column with row ids.")] = None,
    workers: Workers = 1,
    unit_rows: Annotated[
        int | None,
        typer.Option(help="Rows a unit of work.", min=1, rich_help_panel="Running", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option(rich_help_panel="Running")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Check and plan, then stop.", rich_help_panel="Running")
    ] = False,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Put a scorer's labels beside every row and change nothing. Arguments after `--` go to Beam."""
    from pipelines import score as job

    config = job.ScoreConfig(
        input=input,
        output=output,
        scorer=scorer,
        attribute=attribute,
        text_column=text_column,
        id_column=id_column,
        storage_options=pairs(storage_option),
    )
    result = job.run(config, run_settings(workers, unit_rows, overwrite, dry_run, progress, ctx.args))
    job.print_result(config, result)
