"""`tamis eval toxicity`: options only; what it does is imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import Progress, pairs


def register(app: typer.Typer) -> None:
    """Add the command to `tamis eval`."""
    app.command(
        "toxicity",
        context_settings={"allow_extra_args": True},
        epilog="Example: tamis eval toxicity smollm2 cleaned=models/clean --prompts prompts.jsonl -o toxicity/ "
        "--group-column group     Arguments after `--` go to Beam.",
    )(toxicity)


def toxicity(
    ctx: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            help="[LABEL=]MODEL: a name, a model folder, an adapter folder, or BASE+ADAPTER. The first is what "
            "the others are compared with.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        str,
        typer.Option(help="Prompts, one a row: CSV, TSV, JSONL, Parquet, Arrow; file, folder, glob, URL."),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write to; resumed if it holds this evaluation.")
    ],
    adapter: Annotated[
        str | None, typer.Option(help="LoRA adapter of the models, by name or folder.")
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option(help="Column with the prompts; default: prompt or text.", rich_help_panel="Prompts"),
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column with ids.", rich_help_panel="Prompts")] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column that names a prompt's group.", rich_help_panel="Prompts")
    ] = None,
    combine: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated groups whose plain mean is the combined figure; default all.",
            rich_help_panel="Prompts",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use so many prompts, chosen by content.", min=1, rich_help_panel="Prompts"),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Continuations of a prompt, for each seed.", min=1, rich_help_panel="Sampling")
    ] = 25,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens of a continuation, at most.", min=1, rich_help_panel="Sampling")
    ] = 20,
    temperature: Annotated[float, typer.Option(min=0, rich_help_panel="Sampling")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass; 1 = off.", rich_help_panel="Sampling")] = 0.9,
    top_k: Annotated[
        int,
        typer.Option(
            help="Keep the k likeliest tokens; 0 = off. The paper's released code ran with its library's default, 50.",
            min=0,
            rich_help_panel="Sampling",
        ),
    ] = 0,
    seeds: Annotated[
        str,
        typer.Option(
            help="How many (5 = 0,1,2,3,4), a range (1337-1341), or a list (7,11).",
            rich_help_panel="Sampling",
        ),
    ] = "5",
    threshold: Annotated[
        float, typer.Option(help="A score strictly above it is toxic.", rich_help_panel="Judging")
    ] = 0.5,
    judge: Annotated[
        str, typer.Option(help="Scorer that judges (`tamis models list`).", rich_help_panel="Judging")
    ] = "jigsaw-bilstm",
    judge_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the judge; may be repeated.", rich_help_panel="Judging"),
    ] = None,
    ranker: Annotated[
        list[str] | None,
        typer.Option(
            help="Scorer that ranked or filtered the training data, where the models' records do not say it; may be "
            "repeated.",
            rich_help_panel="Judging",
        ),
    ] = None,
    allow_shared_judge: Annotated[
        bool,
        typer.Option(
            "--allow-shared-judge",
            help="Judge with what ranked the training data all the same; the page says so.",
            rich_help_panel="Judging",
        ),
    ] = False,
    reference: Annotated[
        str,
        typer.Option(help="Model that measures fluency; `none` = do not.", rich_help_panel="Judging"),
    ] = "smollm2",
    max_perplexity: Annotated[
        float,
        typer.Option(
            help="Continuations of this or more are left out of the mean.", rich_help_panel="Judging"
        ),
    ] = 1e4,
    draws: Annotated[int, typer.Option(help="Bootstrap draws.", min=100, rich_help_panel="Judging")] = 2000,
    workers: Annotated[
        int, typer.Option(help="Worker processes on this machine.", min=1, rich_help_panel="Running")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel="Running")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel="Running")] = "auto",
    threads: Annotated[
        int, typer.Option(help="Torch threads a worker.", min=1, rich_help_panel="Running")
    ] = 1,
    batch_rows: Annotated[
        int | None,
        typer.Option(
            help="Continuations decoded together; default by the device.", min=1, rich_help_panel="Running"
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(help="Replace what other settings left in the folder.", rich_help_panel="Running"),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(help="Check everything, say what would be sampled, stop.", rich_help_panel="Running"),
    ] = False,
    progress: Progress = "auto",
) -> None:
    """How toxic is what models say: many continuations of every prompt, the worst counts (TP, EMT).

    Several models are shown side by side, each compared with the first in pairs.
    """
    from pipelines import eval_toxicity as evaluation
    from pipelines.run import RunSettings

    config = evaluation.make_config(
        {
            "models": models, "adapter": adapter, "prompts": prompts, "output": output,
            "prompt_column": prompt_column, "id_column": id_column, "group_column": group_column,
            "combine": [g.strip() for g in combine.split(",")] if combine else [], "limit": limit, "samples": samples,
            "new_tokens": new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
            "seeds": read_seeds(seeds), "threshold": threshold, "judge": judge, "judge_options": pairs(judge_option),
            "rankers": ranker or [], "allow_shared_judge": allow_shared_judge, "reference": reference,
            "max_perplexity": max_perplexity, "draws": draws, "device": device, "dtype": dtype, "threads": threads,
            "batch_rows": batch_rows,
        }
    )  # fmt: skip
    settings = RunSettings(
        workers=workers, overwrite=overwrite, dry_run=dry_run, progress=progress, beam_args=tuple(ctx.args)
    )
    evaluation.print_result(config, evaluation.run(config, settings))


def read_seeds(text: str) -> list[int]:
    """Seeds as typed: `5` (how many, from 0), `1337-1341` (a range), `7,11` or `7,` (a list).

    Raises:
        typer.BadParameter: Anything else.
    """
    try:
        if "," in text:
            return [int(part) for part in text.split(",") if part.strip()]
        first, dash, last = text.partition("-")
        found = list(range(int(first), int(last) + 1)) if dash else list(range(int(text)))
    except ValueError:
        found = []
    if not found:
        raise typer.BadParameter(
            f"'{text}' names no seeds; write how many (5), a range (1337-1341) or a list (7,11)"
        )
    return found
