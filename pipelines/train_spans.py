"""`tamis train spans`: train a tagger that says which characters of a text are toxic.

The same command run again goes on where a killed run stopped; once the model is there it does nothing. The output folder
is a Hugging Face token classifier, and the detox job's localiser `tagger`; `_SUCCESS` comes last.
"""

from __future__ import annotations

from pydantic import Field

from models.training.classifier_settings import TaggerSettings
from pipelines.train_folder import TrainResult, rank, silent, to_stderr
from pipelines.train_scorer import command_line, describe_sources, train_into
from schemas.fingerprint import config_hash


class TrainSpansConfig(TaggerSettings):
    """Everything `tamis train spans` can be told; see docs/jobs/train-spans.md."""

    data: str = Field(description="Texts with spans: file, folder, glob or URL.")
    model: str = Field("minilm", description="Encoder to start from: minilm, a model folder, or hf:ID.")
    output: str = Field(description="Folder for the trained model, on this machine.")
    text_column: str = Field("text", description="The texts.")
    spans_column: str = Field(
        "spans", description="Character offsets, or [start, end) pairs, as a list or its JSON text."
    )
    training_data: str = Field("", description="Tag of the data; default: its name and fingerprint.")
    allow_poisoned: bool = Field(False, description="Train on a folder that was poisoned on purpose.")
    overwrite: bool = Field(False, description="Replace another run's model in the output folder.")
    dry_run: bool = Field(False, description="Print the plan; write nothing.")
    quiet: bool = Field(False, description="No progress lines.")
    command: str = Field("", description="Command line for the model card; default: made from the settings.")


def run(config: TrainSpansConfig) -> TrainResult:
    """Train, go on with a run that was killed, or find the work done.

    Raises:
        InputError: The data cannot be used.
        ModelError: The model cannot be used.
        OutputError: The output folder holds something else, or another process is training into it.
    """
    from models.training.classifier import join_tags, load_fast_tokenizer, resolve_encoder
    from models.training.labelled import training_tag
    from models.training.shards import list_shards, shard_fingerprint
    from models.training.spans import SpanSource
    from models.training.tagger_session import TaggerSession

    source = SpanSource(config.data, config.text_column, config.spans_column)
    listing = list_shards(config.data, allow_poisoned=config.allow_poisoned)
    fingerprints = [shard_fingerprint(shard, listing.options) for shard in listing.shards]
    base = resolve_encoder(config.model)
    settings = TaggerSettings(**config.model_dump(include=set(TaggerSettings.model_fields)))
    training_data = config.training_data or join_tags(base, [training_tag(source.title, fingerprints)])
    identity = config_hash(
        {
            "job": "train-spans",
            "settings": settings.identity(),
            "source": {**source.describe(), "shards": fingerprints},
            "training_data": training_data,
            "base": base.revision,
        }
    )
    session = TaggerSession(
        settings=settings,
        base=base,
        tokenizer=load_fast_tokenizer(base),
        identity=identity,
        command=config.command or command_line("spans", config, settings),
        training_data=training_data,
        data={"sources": describe_sources([source], [listing], [fingerprints])},
        say=silent if config.quiet or rank() else to_stderr,
        emit=lambda kind, fields: None,
        source=source,
        listing=listing,
    )
    return train_into(session, config, "train-spans")
