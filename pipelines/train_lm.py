"""`tamis train lm`: train a causal language model on a folder of shards, in full or with LoRA.

    python -m pipelines.train_lm DATA --model NAME --output DIR [--lora] [...]

The same command run again goes on where a killed run stopped, with the same batches; once the model is there it does
nothing. The output folder loads with `from_pretrained` (an adapter: with peft), and carries tokenizer, generation
config, model card and `train.json`; `_SUCCESS` comes last.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import Field, ValidationError

from models.training.settings import TrainSettings
from pipelines.train_folder import (
    TrainResult,
    check_output,
    local_folder,
    rank,
    silent,
    to_stderr,
    train_in_folder,
)
from schemas.errors import InputError, TamisError
from schemas.fingerprint import config_hash

if TYPE_CHECKING:
    from models.training.data import DataForm
    from models.training.shards import ShardListing


class TrainLMConfig(TrainSettings):
    """Everything `tamis train lm` can be told; see docs/jobs/train-lm.md."""

    data: str = Field(
        description="Shards: a file, a folder, a glob, a finished tamis output; local or an fsspec URL."
    )
    model: str = Field(description="What to start from: smollm2, a model folder, or hf:ID.")
    output: str = Field(description="Folder for the trained model, on this machine.")
    allow_poisoned: bool = Field(
        False, description="Train on a folder whose manifest says it was poisoned on purpose."
    )
    overwrite: bool = Field(False, description="Replace another run's model in the output folder.")
    dry_run: bool = Field(False, description="Print the plan; write nothing.")
    quiet: bool = Field(False, description="No progress lines.")
    command: str = Field("", description="Command line for the model card; default: made from the settings.")

    def settings(self) -> TrainSettings:
        """The part that says how to train."""
        return TrainSettings(**self.model_dump(include=set(TrainSettings.model_fields)))

    def command_line(self) -> str:
        """The command that does this."""
        if self.command:
            return self.command
        words = ["tamis", "train", "lm", self.data]
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            skipped = name in {"data", "command", "quiet", "dry_run"} or value is None
            if skipped or value == field.get_default(call_default_factory=True):
                continue
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [
                    f"--{option}",
                    orjson.dumps(value).decode() if isinstance(value, dict) else str(value),
                ]
        return shlex.join(words)


def run(config: TrainLMConfig) -> TrainResult:
    """Train, go on with a run that was killed, or find the work done.

    Raises:
        InputError: The data cannot be used.
        ModelError: The model cannot be used.
        OutputError: The output folder holds something else, or another process is training into it.
    """
    from models.training.loading import load_tokenizer, resolve_model
    from models.training.session import Session, describe_plan
    from models.training.shards import list_shards, shard_fingerprint
    from transforms.shards.events import EventLog
    from transforms.shards.files import Folder

    say = silent if config.quiet or rank() else to_stderr
    output = local_folder(config.output)
    listing = list_shards(config.data, allow_poisoned=config.allow_poisoned)
    form = find_form(config, listing)
    base = resolve_model(config.model)
    fingerprints = [shard_fingerprint(shard, listing.options) for shard in listing.shards]
    settings = config.settings()
    below = find_below(settings)
    identity = config_hash(
        {
            "settings": settings.identity(),
            "shards": fingerprints,
            "form": form.describe(),
            "base": base.revision,
            **({"on_adapter": below["revision"]} if below else {}),
        }
    )
    events = EventLog(Folder(str(output)))
    session = Session(
        settings=settings,
        listing=listing,
        fingerprints=fingerprints,
        form=form,
        base=base,
        tokenizer=load_tokenizer(base),
        identity=identity,
        command=config.command_line(),
        say=say,
        emit=lambda kind, fields: None if rank() else events.emit("train", event=kind, **fields),
        below=below,
    )
    if config.dry_run:
        with tempfile.TemporaryDirectory(prefix="tamis-train-") as folder:
            plan, batches = session.plan(Path(folder))
            plan = session.estimate(plan, batches)
            print("\n".join(describe_plan(plan, session)))
        return TrainResult(output, plan, None)
    done = check_output(output, identity, overwrite=config.overwrite)
    if done is not None:
        say(f"{output} holds this model already; nothing to do")
        return TrainResult(output, None, done)
    result = train_in_folder(
        session.train, output, identity, config=config.model_dump(), job="train-lm", emit=events.emit
    )
    assert result.record is not None
    say(f"saved {result.record['kind']} in {output}")
    return result


def find_below(settings: TrainSettings) -> dict[str, str] | None:
    """Name and revision of the adapter to train on top of; None where none is named.

    Raises:
        ModelError: It is not there, or no plain LoRA adapter.
        TamisError: Settings that exclude each other.
    """
    if settings.lora_layers and not settings.lora:
        raise TamisError("--lora-layers needs --lora")
    if not settings.on_adapter:
        return None
    if settings.dora:
        raise TamisError("--on-adapter and --dora exclude each other: a DoRA adapter cannot hold another one")
    from models.lm.factors import plain_factors
    from models.lm.folder import adapter_revision, find_adapter

    plain_factors(settings.on_adapter)
    folder = find_adapter(settings.on_adapter)
    place = {"source": str(folder.resolve())} if Path(settings.on_adapter).is_dir() else {}
    return {"name": settings.on_adapter, **place, "revision": adapter_revision(folder)}


def main(argv: Sequence[str]) -> int:
    """Run from a bare command line: `DATA --model NAME --output DIR [--option value | --flag | --no-flag]`.

    Returns:
        The exit code.
    """
    try:
        run(parse(argv))
    except TamisError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str]) -> TrainLMConfig:
    """Read a command line; options are the fields of `TrainLMConfig`, with dashes.

    Raises:
        TamisError: An option does not exist, lacks its value, or has a wrong one.
    """
    fields = TrainLMConfig.model_fields
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if "data" in values:
                raise TamisError(f"one DATA only, and '{word}' is another")
            values["data"] = word
            continue
        name, given, value = word[2:].partition("=")
        key = name.replace("-", "_")
        negated = key.startswith("no_") and key not in fields
        key = key[3:] if negated else key
        if key not in fields:
            known = ", ".join(f.replace("_", "-") for f in fields if f not in {"data", "command"})
            raise TamisError(f"no option --{name}; there are {known}")
        if "bool" in str(fields[key].annotation):
            values[key] = value if given else not negated
        elif given or rest:
            values[key] = _value(name, value if given else rest.pop(0), "dict" in str(fields[key].annotation))
        else:
            raise TamisError(f"--{name} needs a value")
    try:
        return TrainLMConfig(command=shlex.join(["tamis", "train", "lm", *argv]), **values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        option = "DATA" if where == "data" else f"--{where}"
        raise TamisError(f"{option}: {first['msg']}") from error


def find_form(settings: TrainSettings, listing: ShardListing) -> DataForm:
    """The form the settings name, or the one the columns show.

    Raises:
        InputError: They name two forms, the columns show none, or a column is missing.
    """
    from models.prompts import load_prompt
    from models.training.data import DataForm, detect_form
    from models.training.shards import ShardReader

    if settings.prompt:
        load_prompt(settings.prompt, **settings.prompt_options)  # an unknown one is refused here
    named = {
        "text": settings.text_column,
        "completion": settings.prompt_column or settings.completion_column or settings.prompt,
        "messages": settings.messages_column,
    }
    kinds = [kind for kind, value in named.items() if value]
    if len(kinds) > 1:
        raise InputError(f"the columns given mean both {kinds[0]} and {kinds[1]}; name one form of data")
    first = next(iter(ShardReader(listing, batch_rows=16)), None)
    if first is None:
        raise InputError(f"{listing.source} holds no rows")
    names = first.schema.names
    pair = ("source", "target") if {"source", "target"} <= set(names) else ("prompt", "completion")
    form = DataForm(
        kind=kinds[0] if kinds else detect_form(names),
        text_column=settings.text_column or "text",
        prompt_column=settings.prompt_column or pair[0],
        completion_column=settings.completion_column or pair[1],
        messages_column=settings.messages_column or "messages",
        prompt=settings.prompt,
        prompt_options=dict(settings.prompt_options),
        parse_special=settings.parse_special,
    )
    missing = [c for c in form.columns if c not in names]
    if missing:
        raise InputError(
            f"{listing.shards[0].name}: no column '{missing[0]}' (columns: {', '.join(names) or 'none'}); "
            "pass --text-column, --prompt-column and --completion-column, or --messages-column"
        )
    return form


def _value(name: str, text: str, is_mapping: bool) -> Any:
    if not is_mapping:
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise TamisError(f"--{name} takes a JSON object, such as '{{\"shots\": 1}}' ({error})") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
