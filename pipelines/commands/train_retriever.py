"""`tamis train retriever`: a thin function; what it does is imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.train_encoders import (
    DryRun,
    Output,
    Overwrite,
    Precision,
    Quiet,
    Seed,
    Set,
    Threads,
    _command,
    _given,
    _settings,
    _words,
)

_LOSS, _TRAINED, _DATA, _LEARNING = "Loss", "What is trained", "Data", "Learning"


def register(app: typer.Typer) -> None:
    """Add the verb to `tamis train`."""
    app.command(
        "retriever",
        epilog="Example: tamis train retriever groups/ --output retriever/ --loss lse_pair     "
        "A head in seconds: tamis train retriever groups/ --output head/ --train head     "
        "Queries alone, in minutes: tamis train retriever groups/ --output r/ --documents head --all-documents --loss sum_marg_lh     "
        "Curriculum: tamis train retriever groups/ --output r/ --epochs llm=2,human=1 --learning-rate llm=3e-5,human=1e-5",
    )(train_retriever)


def train_retriever(
    groups: Annotated[str, typer.Argument(help="Training groups: an output of `tamis groups`.")],
    output: Output,
    model: Annotated[
        str, typer.Option(help="Encoder to start from: minilm, a model folder, hf:ID.")
    ] = "minilm",
    loss: Annotated[
        str | None,
        typer.Option(
            help="lse_pair, joint_lh, sum_marg_lh, single_lh, rand1_lh, mnrl, margin_mse, kl.",
            rich_help_panel=_LOSS,
            show_default="lse_pair",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="1 / temperature; default 20 for cosines, 1 for inner products.",
            rich_help_panel=_LOSS,
            show_default=False,
        ),
    ] = None,
    positive_side: Annotated[
        str | None, typer.Option(help="lse_pair: all, min or max.", rich_help_panel=_LOSS, show_default=False)
    ] = None,
    negative_side: Annotated[
        str | None, typer.Option(help="lse_pair: all or max.", rich_help_panel=_LOSS, show_default=False)
    ] = None,
    divide_by_m: Annotated[
        bool, typer.Option("--divide-by-m", help="Divide by the number of positives.", rich_help_panel=_LOSS)
    ] = False,
    in_batch: Annotated[
        bool,
        typer.Option(
            "--in-batch/--own-negatives",
            help="Other queries' documents are negatives too.",
            rich_help_panel=_LOSS,
        ),
    ] = True,
    mask: Annotated[
        bool,
        typer.Option(
            "--mask/--no-mask",
            help="Keep known positives out of the in-batch negatives.",
            rich_help_panel=_LOSS,
        ),
    ] = True,
    train: Annotated[
        str | None,
        typer.Option(help="full, lora or head.", rich_help_panel=_TRAINED, show_default="full"),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="linear or mlp.", rich_help_panel=_TRAINED, show_default=False)
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            help="shared: as queries. fixed: they keep their vectors. head: behind a head of their own.",
            rich_help_panel=_TRAINED,
            show_default="shared",
        ),
    ] = None,
    all_documents: Annotated[
        bool,
        typer.Option(
            "--all-documents",
            help="Every document is a candidate in every step; needs vectors.",
            rich_help_panel=_LOSS,
        ),
    ] = False,
    vectors: Annotated[
        str | None,
        typer.Option(
            help="Output of `tamis embed` of the documents, where they are not trained.",
            rich_help_panel=_TRAINED,
            show_default=False,
        ),
    ] = None,
    query_vectors: Annotated[
        str | None,
        typer.Option(help="Heads: the same of the queries.", rich_help_panel=_TRAINED, show_default=False),
    ] = None,
    positives: Annotated[
        str | None,
        typer.Option(help="first, random_one, rotate or all.", rich_help_panel=_DATA, show_default=False),
    ] = None,
    max_positives: Annotated[
        int | None, typer.Option(help="Positives a group at most.", rich_help_panel=_DATA, show_default=False)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Documents a group.", rich_help_panel=_DATA, show_default=False)
    ] = None,
    stages: Annotated[
        str,
        typer.Option(
            help="Which stages, by comma, in this order.", rich_help_panel=_DATA, show_default=False
        ),
    ] = "",
    corpus: Annotated[
        str | None,
        typer.Option(help="Documents, for groups of ids.", rich_help_panel=_DATA, show_default=False),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(help="Queries, for groups of ids.", rich_help_panel=_DATA, show_default=False),
    ] = None,
    query_prefix: Annotated[
        str | None, typer.Option(help="Before every query.", rich_help_panel=_DATA, show_default=False)
    ] = None,
    passage_prefix: Annotated[
        str | None, typer.Option(help="Before every document.", rich_help_panel=_DATA, show_default=False)
    ] = None,
    query_length: Annotated[
        int | None, typer.Option(help="Tokens of a query.", rich_help_panel=_DATA, show_default="32")
    ] = None,
    passage_length: Annotated[
        int | None, typer.Option(help="Tokens of a document.", rich_help_panel=_DATA, show_default="128")
    ] = None,
    allow_poisoned: Annotated[
        bool,
        typer.Option("--allow-poisoned", help="Train on groups poisoned on purpose.", rich_help_panel=_DATA),
    ] = False,
    epochs: Annotated[
        str | None,
        typer.Option(help="Passes; by stage: llm=2,human=1.", rich_help_panel=_LEARNING, show_default=False),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of every stage, instead of epochs.", rich_help_panel=_LEARNING, show_default=False
        ),
    ] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            help="Peak; by stage: llm=3e-5,human=1e-5. It starts anew with every stage.",
            rich_help_panel=_LEARNING,
            show_default="3e-5, lora 2e-4, head 3e-4, queries alone 1e-4",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Queries a forward pass.",
            rich_help_panel=_LEARNING,
            show_default="32; heads and queries alone 128",
        ),
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Forward passes a step.", rich_help_panel=_LEARNING, show_default="1")
    ] = None,
    cached: Annotated[
        bool,
        typer.Option(
            "--cached", help="Large batches in little memory (GradCache).", rich_help_panel=_LEARNING
        ),
    ] = False,
    precision: Precision = None,
    seed: Seed = 0,
    set_: Set = None,
    threads: Threads = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Train a retriever on many positives a query: encoder, LoRA or head; resumable; saved for sentence-transformers."""
    from pipelines import train_retriever as job
    from pipelines.train_scorer import make_config

    given = {
        "data": groups, "output": output, "model": model, "loss": loss, "scale": scale, "positive_side": positive_side,
        "negative_side": negative_side, "divide_by_m": divide_by_m, "in_batch": in_batch, "mask": mask, "train": train,
        "head": head, "documents": documents, "all_documents": all_documents, "vectors": vectors, "query_vectors": query_vectors, "positives": positives,
        "max_positives": max_positives, "group_size": group_size, "stages": _words(stages), "corpus": corpus,
        "queries": queries, "query_prefix": query_prefix, "passage_prefix": passage_prefix, "query_length": query_length,
        "passage_length": passage_length, "allow_poisoned": allow_poisoned, "epochs": epochs, "max_steps": max_steps,
        "learning_rate": learning_rate, "batch_size": batch_size, "accumulate": accumulate, "cached": cached,
        "precision": precision, "seed": seed, "threads": threads, "dry_run": dry_run, "overwrite": overwrite,
        "quiet": quiet, "command": _command(),
    }  # fmt: skip
    job.run(make_config(job.TrainRetrieverConfig, {**_settings(set_), **_given(given)}))
