"""`tamis train ngram`: options only; what it does is imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AllowPoisoned


def register(app: typer.Typer) -> None:
    """Add the command to `tamis train`."""
    app.command(
        "ngram",
        epilog="Example: tamis train ngram a.csv,label=label,positive=hate b.csv,text=tweet,label=class,positive=0+1 "
        "-o judge/     then: tamis eval toxicity ... --judge ngram:judge",
    )(train_ngram)


def train_ngram(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Labelled texts: file, folder, glob or URL (CSV too); PATH,key=value,... gives a set columns of its own.",
            show_default=False,
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the model.")],
    text_column: Annotated[str, typer.Option(help="Column with the texts.")] = "text",
    label: Annotated[str, typer.Option(help="Column of 0/1 or probabilities.")] = "",
    label_column: Annotated[str, typer.Option(help="Or: the column with the class.")] = "",
    positive: Annotated[str, typer.Option(help="And the classes that are toxic, by comma.")] = "",
    training_data: Annotated[
        str,
        typer.Option(
            help="Tag of the data, by which a judge is kept apart from a ranker; default: from names and fingerprints.",
            show_default=False,
        ),
    ] = "",
    inverse_penalty: Annotated[
        float, typer.Option(help="Larger fits more closely.", rich_help_panel="Learning")
    ] = 8.0,
    least_texts: Annotated[
        int, typer.Option(help="N-grams in fewer texts are not used.", min=1, rich_help_panel="Learning")
    ] = 3,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance/--no-balance",
            help="Make toxic texts count as much as the others together.",
            rich_help_panel="Learning",
        ),
    ] = True,
    eval_fraction: Annotated[
        float, typer.Option(help="Share held out, by a hash of the text.", rich_help_panel="Learning")
    ] = 0.1,
    allow_poisoned: AllowPoisoned = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another run's model in the folder.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing.")] = False,
) -> None:
    """Fit a scorer over character n-grams in a minute on one core: a judge unlike any neural ranker."""
    from pipelines import train_ngram as job
    from pipelines.train_scorer import make_config

    given = {
        "data": tuple(data), "output": output, "text_column": text_column, "label": label,
        "label_column": label_column, "positive": tuple(p.strip() for p in positive.split(",") if p.strip()),
        "training_data": training_data, "inverse_penalty": inverse_penalty, "least_texts": least_texts,
        "balance": balance, "eval_fraction": eval_fraction, "allow_poisoned": allow_poisoned, "overwrite": overwrite, "quiet": quiet,
    }  # fmt: skip
    job.run(make_config(job.TrainNgramConfig, given))
