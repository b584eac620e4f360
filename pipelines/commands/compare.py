"""`tamis compare`: options only; what it does is imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_ARMS, _TRAIN, _EVAL, _RUN = "Arms", "Training", "Evaluation", "Running"
Many = list[str] | None


def register(app: typer.Typer) -> None:
    """Add the command to `tamis`."""
    app.command(
        "compare",
        epilog="Example: tamis compare corpus.jsonl --arm logratio=clean -o evidence --make raw,drop-documents "
        "--held-out more.jsonl --neutral neutral.jsonl --judge hf:judge --workers 2     See the plan: --dry-run",
    )(compare)


def compare(
    raw: Annotated[str, typer.Argument(help="The corpus as it came.")],
    clean: Annotated[
        Many,
        typer.Argument(help="Cleaned versions of it, each an arm named by its folder.", show_default=False),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder to write to; resumed if it holds a comparison.")
    ] = "",
    arm: Annotated[
        Many, typer.Option(help="NAME=FOLDER of an arm made before; may be repeated.", rich_help_panel=_ARMS)
    ] = None,
    make: Annotated[
        str,
        typer.Option(
            help="Arms to make: raw, drop-documents, drop-sentences, lexicon-mask, prompt_only, vanilla_cd, official, "
            "logratio, ablations; all = all of these but ablations; none.",
            rich_help_panel=_ARMS,
        ),
    ] = "all",
    recipe: Annotated[
        Many,
        typer.Option(
            help="NAME:path=value, a setting of the detox job for one arm; may be repeated. A new NAME is a new arm.",
            rich_help_panel=_ARMS,
        ),
    ] = None,
    set_: Annotated[
        Many,
        typer.Option(
            "--set",
            help="path=value, a setting of the detox job for all rewriting arms.",
            rich_help_panel=_ARMS,
        ),
    ] = None,
    detox_config: Annotated[
        Path | None, typer.Option(help="Settings of the detox job, TOML or JSON.", rich_help_panel=_ARMS)
    ] = None,
    scorer: Annotated[
        str, typer.Option(help="Classifier that filters, gates and ranks.", rich_help_panel=_ARMS)
    ] = "jigsaw-bilstm",
    scorer_option: Annotated[
        Many, typer.Option(help="KEY=VALUE for it; may be repeated.", rich_help_panel=_ARMS)
    ] = None,
    lexicon: Annotated[
        str, typer.Option(help="Word list of lexicon-mask.", rich_help_panel=_ARMS)
    ] = "lexicon",
    tau: Annotated[
        float, typer.Option(help="Score from which on a sentence is toxic.", rich_help_panel=_ARMS)
    ] = 0.5,
    toxic_adapter: Annotated[
        str | None,
        typer.Option(help="Toxic adapter made before; default: trained here.", rich_help_panel=_ARMS),
    ] = None,
    toxic_data: Annotated[
        str | None, typer.Option(help="Texts to train it on; default the raw corpus.", rich_help_panel=_ARMS)
    ] = None,
    toxic_tokens: Annotated[
        int, typer.Option(help="Tokens to train it on.", rich_help_panel=_ARMS)
    ] = 120_000,
    text_column: Annotated[str, typer.Option(help="Column with the text.", rich_help_panel=_ARMS)] = "text",
    id_column: Annotated[str | None, typer.Option(help="Column with row ids.", rich_help_panel=_ARMS)] = None,
    model: Annotated[
        str, typer.Option(help="Small model to train: smollm2, a folder, hf:ID.", rich_help_panel=_TRAIN)
    ] = "smollm2",
    train_tokens: Annotated[
        int, typer.Option(help="Training tokens of every arm.", min=1, rich_help_panel=_TRAIN)
    ] = 30_000,
    full: Annotated[
        bool, typer.Option("--full/--lora", help="Train all weights, or an adapter.", rich_help_panel=_TRAIN)
    ] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak; default 6e-4 for LoRA, 5e-5 for all weights.", rich_help_panel=_TRAIN),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a step.", min=1, rich_help_panel=_TRAIN)] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens a row.", min=8, rich_help_panel=_TRAIN)] = 512,
    precision: Annotated[str, typer.Option(help="bfloat16 or float32.", rich_help_panel=_TRAIN)] = "bfloat16",
    seeds: Annotated[
        str,
        typer.Option(
            help="Training seeds, of the main arms if --other-seeds is given.", rich_help_panel=_TRAIN
        ),
    ] = "0,1",
    other_seeds: Annotated[
        str | None,
        typer.Option(help="Training seeds of the arms that are not --main.", rich_help_panel=_TRAIN),
    ] = None,
    main: Annotated[
        str, typer.Option(help="Arms worked on first.", rich_help_panel=_TRAIN)
    ] = "raw,drop-documents,logratio,prompt_only",
    prompts: Annotated[str | None, typer.Option(help="Prompts, one a row.", rich_help_panel=_EVAL)] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Toxic rows no arm is trained on, to make prompts of.", rich_help_panel=_EVAL),
    ] = None,
    held_out_column: Annotated[str, typer.Option(help="Their column.", rich_help_panel=_EVAL)] = "text",
    group_column: Annotated[
        str | None, typer.Option(help="Column with groups.", rich_help_panel=_EVAL)
    ] = None,
    make_prompts: Annotated[int, typer.Option(help="Prompts to make.", min=1, rich_help_panel=_EVAL)] = 200,
    prompt_words: Annotated[int, typer.Option(help="Words of each.", min=1, rich_help_panel=_EVAL)] = 8,
    judge: Annotated[
        str,
        typer.Option(help="Scorer that judges the models; never the one that ranks.", rich_help_panel=_EVAL),
    ] = "",
    judge_option: Annotated[
        Many, typer.Option(help="KEY=VALUE for it; may be repeated.", rich_help_panel=_EVAL)
    ] = None,
    allow_shared_judge: Annotated[
        bool, typer.Option(help="Judge with a ranker all the same; the page says so.", rich_help_panel=_EVAL)
    ] = False,
    samples: Annotated[int, typer.Option(help="Continuations a prompt.", min=1, rich_help_panel=_EVAL)] = 25,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each.", min=1, rich_help_panel=_EVAL)] = 20,
    reference: Annotated[
        str, typer.Option(help="Model that measures fluency; none = do not.", rich_help_panel=_EVAL)
    ] = "smollm2",
    neutral: Annotated[
        str | None, typer.Option(help="Held-out neutral text, for perplexity.", rich_help_panel=_EVAL)
    ] = None,
    neutral_column: Annotated[str, typer.Option(help="Its column.", rich_help_panel=_EVAL)] = "text",
    focus: Annotated[
        str | None,
        typer.Option(help="Arm compared with every other; default the SoCD one.", rich_help_panel=_EVAL),
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="Arm neutral perplexity is compared with.", rich_help_panel=_EVAL)
    ] = "drop-documents",
    workers: Annotated[
        int,
        typer.Option(
            help="Stages side by side, one torch thread each; 0 = one after another in this process.",
            min=0,
            rich_help_panel=_RUN,
        ),
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.", rich_help_panel=_RUN)] = "auto",
    stages: Annotated[
        str | None,
        typer.Option(
            help="Kinds of stages to run, with all they need: prompts, toxic, corpus, facts, train, toxicity, utility.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    arms: Annotated[str | None, typer.Option(help="Arms to work on.", rich_help_panel=_RUN)] = None,
    keep_models: Annotated[
        bool, typer.Option(help="Keep the trained models once they are evaluated.", rich_help_panel=_RUN)
    ] = True,
    overwrite: Annotated[
        bool,
        typer.Option(help="Do stages again whose settings or inputs have changed.", rich_help_panel=_RUN),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(help="Check everything, print the plan with its cost, then stop.", rich_help_panel=_RUN),
    ] = False,
    quiet: Annotated[bool, typer.Option(help="No progress lines.", rich_help_panel=_RUN)] = False,
) -> None:
    """Does the cleaned corpus make a cleaner model? Train one small model on each version, evaluate, write one page."""
    import shlex
    import sys

    from pipelines.compare import run
    from pipelines.compare.options import given_arms, make_config, names, numbers, pairs, recipes

    if not output:
        raise typer.BadParameter("pass --output FOLDER", param_hint="--output")
    settings: dict[str, Any] = {
        "raw": raw, "output": output, "given": given_arms(clean, arm), "make": names(make), "recipes": recipes(recipe),
        "scorer": scorer, "scorer_options": pairs(scorer_option), "lexicon": lexicon, "tau": tau,
        "toxic": {"adapter": toxic_adapter, "data": toxic_data, "tokens": toxic_tokens},
        "text_column": text_column, "id_column": id_column, "model": model,
        "train": {
            "tokens": train_tokens, "lora": not full, "learning_rate": learning_rate, "batch_size": batch_size,
            "max_length": max_length, "precision": precision,
        },
        "seeds": numbers(seeds), "other_seeds": None if other_seeds is None else numbers(other_seeds),
        "main": names(main), "prompts": prompts, "held_out": held_out, "held_out_column": held_out_column,
        "group_column": group_column, "make_prompts": make_prompts, "prompt_words": prompt_words, "judge": judge,
        "judge_options": pairs(judge_option), "allow_shared_judge": allow_shared_judge, "samples": samples,
        "new_tokens": new_tokens, "reference": reference, "neutral": neutral, "neutral_column": neutral_column,
        "focus": focus, "baseline": baseline, "workers": workers, "device": device, "stages": names(stages),
        "only": names(arms), "keep_models": keep_models, "overwrite": overwrite, "dry_run": dry_run, "quiet": quiet,
        "command": shlex.join(["tamis", *sys.argv[1:]]),
    }  # fmt: skip
    result = run(make_config(settings, detox_config, set_ or []))
    from pipelines.compare.options import print_result

    print_result(result)
    if result.failed:
        raise typer.Exit(1)
