"""`tamis train scorer` and `tamis train spans`: thin functions; what they do is imported when they are called."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from pipelines.commands.options import AllowPoisoned

_LEARNING, _RUNNING = "Learning", "Running"

Output = Annotated[str, typer.Option("--output", "-o", help="Folder for the trained model.")]
Model = Annotated[str, typer.Option(help="Encoder to start from: minilm, a model folder, hf:ID.")]
TextColumn = Annotated[str, typer.Option(help="Column with the texts.")]
Tag = Annotated[
    str,
    typer.Option(
        "--training-data",
        help="Tag of the data, by which a judge is kept apart from a ranker; default: from names and fingerprints.",
        show_default=False,
    ),
]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data.", rich_help_panel=_LEARNING)]
MaxSteps = Annotated[
    int | None, typer.Option(help="Steps to take, instead of epochs.", rich_help_panel=_LEARNING)
]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_LEARNING)]
BatchSize = Annotated[int | None, typer.Option(help="Texts a forward pass.", rich_help_panel=_LEARNING)]
MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens of a text that are learned from.", rich_help_panel=_LEARNING)
]
EvalFraction = Annotated[
    float | None, typer.Option(help="Share held out, by a hash of the text.", rich_help_panel=_LEARNING)
]
Precision = Annotated[
    str | None, typer.Option(help="float32, or bfloat16 (mixed).", rich_help_panel=_LEARNING)
]
Seed = Annotated[int, typer.Option(help="Seed of the run.", rich_help_panel=_LEARNING)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other setting, KEY=VALUE: schedule, warmup, weight-decay, accumulate, save-steps ...",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Torch threads; 0: all cores.", rich_help_panel=_RUNNING)]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the plan with the time it takes; write nothing.", rich_help_panel=_RUNNING
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace another run's model in the folder.", rich_help_panel=_RUNNING),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress lines.", rich_help_panel=_RUNNING)]


def register(app: typer.Typer) -> None:
    """Add both verbs to `tamis train`."""
    app.command(
        "scorer",
        epilog="Example: tamis train scorer posts.csv --label-column class --positive hate,offensive --output scorer/     "
        "Two sets: tamis train scorer a.csv,label=label,positive=hate,weight=3 b.csv,text=tweet,labels=toxic+insult "
        "--output scorer/",
    )(train_scorer)
    app.command(
        "spans",
        epilog="Example: tamis train spans posts.csv --spans-column spans --output tagger/",
    )(train_spans)


def train_scorer(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Labelled texts: file, folder, glob or URL (CSV too); PATH,key=value,... gives a set columns of its own."
        ),
    ],
    output: Output,
    model: Model = "minilm",
    text_column: TextColumn = "text",
    labels: Annotated[
        str, typer.Option(help="Columns of 0/1 or probabilities, by comma; empty or -1 = unknown.")
    ] = "",
    label_column: Annotated[str, typer.Option(help="Or: the column with the class.")] = "",
    positive: Annotated[str, typer.Option(help="And the classes that are toxic, by comma.")] = "",
    training_data: Tag = "",
    balance: Annotated[
        bool | None,
        typer.Option(
            "--balance/--no-balance",
            help="Make positives count as much as negatives.",
            rich_help_panel=_LEARNING,
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="auto, temperature, shift or none.", rich_help_panel=_LEARNING),
    ] = None,
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    learning_rate: Rate = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    eval_fraction: EvalFraction = None,
    precision: Precision = None,
    seed: Seed = 0,
    allow_poisoned: AllowPoisoned = False,
    set_: Set = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a toxicity classifier on labelled texts: calibrated, resumable, saved for transformers and for Detoxify."""
    from pipelines import train_scorer as job

    given = {
        "data": tuple(data), "output": output, "model": model, "text_column": text_column, "labels": _words(labels),
        "label_column": label_column, "positive": _words(positive), "training_data": training_data, "balance": balance,
        "calibration": calibration, "epochs": epochs, "max_steps": max_steps, "learning_rate": learning_rate,
        "batch_size": batch_size, "max_length": max_length, "eval_fraction": eval_fraction, "precision": precision,
        "allow_poisoned": allow_poisoned, "seed": seed, "threads": threads, "dry_run": dry_run, "overwrite": overwrite, "quiet": quiet,
        "command": _command(),
    }  # fmt: skip
    job.run(job.make_config(job.TrainScorerConfig, {**_settings(set_), **_given(given)}))


def train_spans(
    data: Annotated[str, typer.Argument(help="Texts with spans: file, folder, glob or URL (CSV too).")],
    output: Output,
    model: Model = "minilm",
    text_column: TextColumn = "text",
    spans_column: Annotated[
        str, typer.Option(help="Character offsets, or [start, end) pairs, as a list or its JSON text.")
    ] = "spans",
    training_data: Tag = "",
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    learning_rate: Rate = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    eval_fraction: EvalFraction = None,
    precision: Precision = None,
    seed: Seed = 0,
    allow_poisoned: AllowPoisoned = False,
    set_: Set = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a tagger on texts with toxic spans: threshold tuned for the span score, resumable, a localiser of detox."""
    from pipelines import train_spans as job
    from pipelines.train_scorer import make_config

    given = {
        "data": data, "output": output, "model": model, "text_column": text_column, "spans_column": spans_column,
        "training_data": training_data, "epochs": epochs, "max_steps": max_steps, "learning_rate": learning_rate,
        "batch_size": batch_size, "max_length": max_length, "eval_fraction": eval_fraction, "precision": precision,
        "allow_poisoned": allow_poisoned, "seed": seed, "threads": threads, "dry_run": dry_run, "overwrite": overwrite, "quiet": quiet,
        "command": _command(),
    }  # fmt: skip
    job.run(make_config(job.TrainSpansConfig, {**_settings(set_), **_given(given)}))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _settings(items: list[str] | None) -> dict[str, str]:
    values = {}
    for item in items or []:
        key, sign, value = item.partition("=")
        if not sign:
            raise typer.BadParameter(f"--set {item}: not KEY=VALUE")
        values[key.strip().replace("-", "_")] = value.strip()
    return values


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _command() -> str:
    """The command line as it was typed, where this is a process of its own."""
    import shlex
    from pathlib import PurePath

    program = PurePath(sys.argv[0]).name
    return shlex.join(["tamis", *sys.argv[1:]]) if program in ("tamis", "cli.py") else ""
