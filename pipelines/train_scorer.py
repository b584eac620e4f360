"""`tamis train scorer`: train a toxicity classifier on labelled texts.

The same command run again goes on where a killed run stopped, with the same batches; once the model is there it does
nothing. The output folder loads with `from_pretrained`, as scorer `hf:DIR`, and (`detoxify.ckpt`) with Detoxify;
`_SUCCESS` comes last.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from models.training.classifier_settings import ClassifierSettings, EncoderSettings
from pipelines.train_folder import (
    TrainResult,
    check_output,
    local_folder,
    rank,
    silent,
    to_stderr,
    train_in_folder,
)
from schemas.errors import InputError
from schemas.fingerprint import config_hash

if TYPE_CHECKING:
    from models.training.encoder_session import EncoderSession
    from models.training.labelled import LabelledSource
    from models.training.shards import ShardListing


class TrainScorerConfig(ClassifierSettings):
    """Everything `tamis train scorer` can be told; see docs/jobs/train-scorer.md."""

    data: tuple[str, ...] = Field(
        min_length=1,
        description="Labelled sets: PATH, or PATH,key=value,... (text, labels, label, positive, weight).",
    )
    model: str = Field("minilm", description="Encoder to start from: minilm, a model folder, or hf:ID.")
    output: str = Field(description="Folder for the trained model, on this machine.")
    text_column: str = Field("text", description="The texts.")
    labels: tuple[str, ...] = Field((), description="Columns of 0/1 or probabilities.")
    label_column: str = Field("", description="Column of class names.")
    positive: tuple[str, ...] = Field((), description="Class names that mean toxic.")
    training_data: str = Field(
        "", description="Tag of the data; default: names and fingerprints of the sets."
    )
    allow_poisoned: bool = Field(False, description="Train on a folder that was poisoned on purpose.")
    overwrite: bool = Field(False, description="Replace another run's model in the output folder.")
    dry_run: bool = Field(False, description="Print the plan; write nothing.")
    quiet: bool = Field(False, description="No progress lines.")
    command: str = Field("", description="Command line for the model card; default: made from the settings.")

    def sources(self) -> list[LabelledSource]:
        """The labelled sets.

        Raises:
            TamisError: One is described badly.
        """
        from models.training.labelled import LabelledSource

        shared = {
            "text_column": self.text_column,
            "labels": self.labels,
            "label_column": self.label_column,
            "positive": self.positive,
        }
        return [LabelledSource.parse(text, **shared) for text in self.data]


def run(config: TrainScorerConfig) -> TrainResult:
    """Train, go on with a run that was killed, or find the work done.

    Raises:
        TamisError: The sets are described badly.
        InputError: The data cannot be used.
        ModelError: The model cannot be used.
        OutputError: The output folder holds something else, or another process is training into it.
    """
    from models.training.classifier import join_tags, load_fast_tokenizer, resolve_encoder
    from models.training.classifier_session import ClassifierSession
    from models.training.labelled import label_names, training_tag
    from models.training.shards import list_shards, shard_fingerprint

    sources = config.sources()
    label_names(sources)
    listings = [list_shards(s.data, allow_poisoned=config.allow_poisoned) for s in sources]
    fingerprints = [[shard_fingerprint(shard, one.options) for shard in one.shards] for one in listings]
    base = resolve_encoder(config.model)
    settings = ClassifierSettings(**config.model_dump(include=set(ClassifierSettings.model_fields)))
    tags = [training_tag(source.title, found) for source, found in zip(sources, fingerprints, strict=True)]
    training_data = config.training_data or join_tags(base, tags)
    identity = config_hash(
        {
            "job": "train-scorer",
            "settings": settings.identity(),
            "sources": [
                {**s.describe(), "shards": found} for s, found in zip(sources, fingerprints, strict=True)
            ],
            "training_data": training_data,
            "base": base.revision,
        }
    )
    session = ClassifierSession(
        settings=settings,
        base=base,
        tokenizer=load_fast_tokenizer(base),
        identity=identity,
        command=config.command or command_line("scorer", config, settings),
        training_data=training_data,
        data={"sources": describe_sources(sources, listings, fingerprints)},
        say=silent if config.quiet or rank() else to_stderr,
        emit=lambda kind, fields: None,
        sources=sources,
        listings=listings,
    )
    return train_into(session, config, "train-scorer")


def train_into(session: EncoderSession, config: Any, job: str) -> TrainResult:
    """Run a session into the configuration's output folder; `config` has output, dry_run, overwrite, quiet.

    Raises:
        TamisError: As `run`.
    """
    from transforms.shards.events import EventLog
    from transforms.shards.files import Folder

    output, identity = local_folder(config.output), session.identity
    if config.dry_run:
        prepared = session.read()
        plan = session.estimate(prepared)
        print("\n".join(session.describe_plan(prepared, plan)))
        return TrainResult(output, plan, None)
    done = check_output(output, identity, overwrite=config.overwrite)
    if done is not None:
        session.say(f"{output} holds this model already; nothing to do")
        return TrainResult(output, None, done)
    events = EventLog(Folder(str(output)))
    session.emit = lambda kind, fields: None if rank() else events.emit("train", event=kind, **fields)
    result = train_in_folder(
        session.train, output, identity, config=config.model_dump(), job=job, emit=events.emit
    )
    session.say(f"saved {session.kind} in {output}")
    return result


def describe_sources(
    sources: Sequence[Any], listings: Sequence[ShardListing], fingerprints: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """What a record says of the sets: their columns, their shards, and the jobs that wrote them."""
    return [
        {
            **source.describe(),
            "columns": source.columns,
            "shards": [
                {"name": shard.name, "bytes": shard.size, "fingerprint": found}
                for shard, found in zip(listing.shards, prints, strict=True)
            ],
            "lineage": listing.lineage,
        }
        for source, listing, prints in zip(sources, listings, fingerprints, strict=True)
    ]


def command_line(verb: str, config: Any, settings: EncoderSettings) -> str:
    """The command that does what a configuration says."""
    data = config.data if isinstance(config.data, tuple) else (config.data,)
    words = ["tamis", "train", verb, *data]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        skipped = name in {"data", "command", "quiet", "dry_run"}
        if skipped or value == field.get_default(call_default_factory=True):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def make_config(kind: Any, values: dict[str, Any]) -> Any:
    """A configuration of a kind, or one line about the first setting that is no good.

    Raises:
        InputError: There is one.
    """
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]).replace("_", "-")
        raise InputError(f"{'DATA' if where == 'data' else '--' + where}: {first['msg']}") from error
