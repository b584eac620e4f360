"""`tamis label`: options only; what it does is imported when it is called."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipelines.commands.options import Progress, Storage, pairs, run_settings

_WHAT, _METHOD, _JUDGE, _COST, _RUNNING = "What", "Method", "Judge", "Cost", "Running"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "label",
        context_settings={"allow_extra_args": True},
        epilog="Example: tamis label pool/ -o labels/ --depth 30     What would it take: tamis label pool/ -o labels/ --dry-run     "
        "With a server: tamis label pool/ -o labels/ --method graded --model openai:http://localhost:8000/v1#llama     "
        "Arguments after `--` go to Beam.",
    )(label)


def label(
    ctx: typer.Context,
    pool: Annotated[
        list[str],
        typer.Argument(
            help="Output of `tamis pool`, a pool, or a TREC run; several are one.", show_default=False
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write to; resumed if it holds this job.")
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="Pointwise: yes_no, graded, graded_verbal, likelihood. Listwise: relsel, utilsel, utilsel_specific, utilrank, item. By gain, for one "
            "reader: answer_gain, likelihood_gain, leave_one_out, marginal, erag.",
            show_default="likelihood with smollm2, else yes_no",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Documents; default the pool's.", rich_help_panel=_WHAT, show_default=False),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            help="Queries, perhaps with gold answers (`answers`); default the pool's.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    human: Annotated[
        list[str] | None,
        typer.Option(help="Labels of people to compare with; default the pool's.", rich_help_panel=_WHAT),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Which copy of the documents, where there are several.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="Only queries people judged in this split; may be repeated.", rich_help_panel=_WHAT
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            help="Candidates a query, best rank first (human positives stay); default all.",
            min=1,
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    limit_queries: Annotated[
        int | None,
        typer.Option(
            help="So many queries, chosen by their ids.", min=1, rich_help_panel=_WHAT, show_default=False
        ),
    ] = None,
    passage_tokens: Annotated[
        int | None,
        typer.Option(
            help="Cut passages to so many tokens; default: to what the judge's context leaves room for.",
            min=16,
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="smollm2, a model folder, hf:ID, openai:URL#MODEL.", rich_help_panel=_JUDGE),
    ] = "smollm2",
    model_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the judge; may be repeated.", rich_help_panel=_JUDGE),
    ] = None,
    adapter: Annotated[
        str,
        typer.Option(
            help="LoRA adapter: auto (the shipped judge, where it fits), none, a name, a folder.",
            rich_help_panel=_JUDGE,
        ),
    ] = "auto",
    target_model: Annotated[
        str | None,
        typer.Option(
            help="Reader that labels by gain are for; default the judge.",
            rich_help_panel=_JUDGE,
            show_default=False,
        ),
    ] = None,
    target_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the reader; may be repeated.", rich_help_panel=_JUDGE),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt file in place of the method's: FILE or ROLE=FILE.", rich_help_panel=_METHOD
        ),
    ] = None,
    permutations: Annotated[
        int | None,
        typer.Option(
            help="Orders a list is shown in; votes are merged.",
            min=1,
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="yes_no: positive above this probability.", rich_help_panel=_METHOD, show_default=False
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="yes_no, likelihood: none, or null (against a passage that says nothing).",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option(
            help="yes_no, likelihood: labels of people for some of these queries; slope and bias are fitted on them.",
            rich_help_panel=_METHOD,
            show_default=False,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any option of the method, NAME=VALUE; may be repeated.", rich_help_panel=_METHOD
        ),
    ] = None,
    budget_tokens: Annotated[
        int | None,
        typer.Option(
            help="Ask nothing more once so many tokens are spent; a larger one goes on.",
            min=1,
            rich_help_panel=_COST,
            show_default=False,
        ),
    ] = None,
    price_in: Annotated[
        float | None,
        typer.Option(
            help="Price of a million prompt tokens.", min=0, rich_help_panel=_COST, show_default=False
        ),
    ] = None,
    price_out: Annotated[
        float | None,
        typer.Option(
            help="Price of a million answer tokens.", min=0, rich_help_panel=_COST, show_default=False
        ),
    ] = None,
    with_corpus: Annotated[
        bool,
        typer.Option(
            "--with-corpus/--no-corpus",
            help="Write the judged documents beside the labels.",
            rich_help_panel=_RUNNING,
        ),
    ] = True,
    workers: Annotated[
        int, typer.Option(help="Worker processes on this machine.", min=1, rich_help_panel=_RUNNING)
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=_RUNNING)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.", rich_help_panel=_RUNNING)] = "auto",
    threads: Annotated[
        int, typer.Option(help="Torch threads a worker.", min=1, rich_help_panel=_RUNNING)
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of every draw.", rich_help_panel=_RUNNING)] = 0,
    overwrite: Annotated[
        bool,
        typer.Option(
            help="Replace what other settings left in the folder; answers already paid for are used again.",
            rich_help_panel=_RUNNING,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Say what it would take (pairs, tokens, price, time), then stop.", rich_help_panel=_RUNNING
        ),
    ] = False,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Label the documents of a pool with a language model: relevance and utility, by many methods, within a budget."""
    from pipelines import label as job
    from pipelines.label_config import LabelConfig, default_method
    from pipelines.settings import validated

    named = {"permutations": permutations, "threshold": threshold, "calibrate": calibrate}
    options: dict[str, Any] = {**pairs(set_), **{k: v for k, v in named.items() if v is not None}}
    given = [p.partition("=") if "=" in p else ("", "=", p) for p in prompt or []]
    config = validated(
        LabelConfig,
        {
            "pools": tuple(pool),
            "output": output,
            "method": method or default_method(model),
            "method_options": options,
            "corpus": corpus,
            "queries": queries,
            "human": tuple(human or ()),
            "corpus_source": source,
            "splits": tuple(split or ()),
            "depth": depth,
            "limit_queries": limit_queries,
            "passage_tokens": passage_tokens,
            "model": model,
            "model_options": pairs(model_option),
            "adapter": adapter,
            "target_model": target_model,
            "target_options": pairs(target_option),
            "prompts": {role: path for role, _, path in given},
            "calibrate_on": calibrate_on,
            "budget_tokens": budget_tokens,
            "price_in": price_in,
            "price_out": price_out,
            "documents": "pooled" if with_corpus else "none",
            "seed": seed,
            "dtype": dtype,
            "device": device,
            "threads": threads,
            "overwrite": overwrite,
            "storage_options": pairs(storage_option),
        },
    )
    result = job.run(config, run_settings(workers, None, overwrite, dry_run, progress, ctx.args))
    job.print_result(config, result)
