"""`tamis embed`: a vector beside every row, an index over them, and nothing else changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from models import registry
from models.encoder_folder import POOLINGS, EncoderSettings, find_folder, read_settings
from models.protocols import ModelInfo
from pipelines.run import RunResult, RunSettings, locked, run_job
from schemas.errors import ModelError, TamisError
from transforms.embed.steps import EmbedOptions, EmbedText
from transforms.embed.text import TextTemplate
from transforms.shards.engine import CACHE, Job
from transforms.shards.files import Folder
from transforms.shards.formats import UnitLimits

# Some ten seconds of a small model on one core: what progress is shown by, and what workers share out.
_LIMITS = UnitLimits(rows=1024, bytes=2 << 20)
_MAX_UNITS = 100_000


class IndexConfig(BaseModel):
    """Settings of the index; see `transforms.embed.faiss_parts.IndexSpec`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str = Field(description="flat, ivf, hnsw, or a FAISS factory string.")
    metric: Literal["auto", "cosine", "dot", "l2"] = "auto"
    codec: Literal["float32", "float16", "int8"] = "float32"
    lists: int | None = Field(
        None, ge=1, description="IVF lists; by default four times the root of the rows."
    )
    neighbours: int = Field(32, ge=2, description="HNSW links a vector.")
    construction: int = Field(200, ge=1, description="HNSW breadth while building.")
    probe: int | None = Field(None, ge=1, description="IVF lists, or HNSW breadth, a search looks at.")
    recall: float = Field(0.95, gt=0, le=1, description="Recall that probe is chosen for.")
    at: int = Field(10, ge=1, description="Cut-off of that recall.")
    queries: int = Field(200, ge=0, description="Vectors the recall is measured with; 0 measures nothing.")
    part_mb: int = Field(256, ge=1, description="Megabytes of vectors a part, which is what building holds.")
    train_mb: int = Field(512, ge=1, description="Megabytes of vectors trained on, at most.")


class EmbedConfig(BaseModel):
    """Settings of the embed job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str = Field(description="File, folder, glob, URL, `datasets` folder or hub id.")
    output: str = Field(description="Folder to write to.")
    encoder: str = Field("minilm", description="Encoder: minilm, a model folder, hf:ID.")
    text: str | None = Field(None, description="Text made of columns: '{title} {text}'.")
    text_column: str = "text"
    id_column: str | None = None
    kind: Literal["document", "query"] = Field("document", description="Which of the model's prompts to use.")
    prompt_name: str | None = Field(None, description="Prompt of the model, by name.")
    prefix: str | None = Field(None, description="Text before every text, instead of the model's prompt.")
    pooling: str | None = Field(None, description="Instead of the model's own.")
    normalize: bool | None = Field(None, description="Unit length; None as the model says.")
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many numbers of each vector (Matryoshka)."
    )
    long: Literal["truncate", "mean"] = Field("truncate", description="What is done with over-long texts.")
    store: Literal["float32", "float16", "int8"] = Field("float32", description="Type of the stored numbers.")
    attribute: str = Field("embedding", description="Name of the attribute the vectors go to.")
    dtype: str = Field("float32", description="What the model computes in.")
    index: IndexConfig | None = None
    device: str = "auto"
    threads: int = 1
    token_budget: int | None = Field(None, ge=1, description="Padded tokens a batch.")
    checkpoint: bool = Field(
        True, description="Keep vectors of a unit at work that took long, until the job is done."
    )
    seed: int = 0
    storage_options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("encoder")
    @classmethod
    def _named(cls, name: str) -> str:
        return (
            f"hf:{name}" if not name.startswith("hf:") and (os.sep in name or Path(name).is_dir()) else name
        )

    @property
    def template(self) -> TextTemplate:
        """How the text is made."""
        return TextTemplate(self.text if self.text is not None else "{" + self.text_column + "}")

    @property
    def encoder_options(self) -> dict[str, Any]:
        """Options the encoder is loaded with."""
        options: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "threads": self.threads}
        if self.token_budget is not None:
            options["token_budget"] = self.token_budget
        if self.pooling is not None:
            options["pooling"] = self.pooling
        return options


def build_job(config: EmbedConfig) -> Job:
    """The job of a configuration.

    Raises:
        ModelError: The encoder cannot be had, or lacks the prompt that was asked for.
        TamisError: The text template names no column.
    """
    if config.pooling is not None and config.pooling not in POOLINGS:
        raise ModelError(f"no pooling '{config.pooling}'; choose one of: {', '.join(POOLINGS)}")
    template = config.template
    column = config.text_column if config.text_column in template.columns else template.columns[-1]
    info, settings = describe(config)
    prompt = settings.prompt(config.kind, config.prompt_name, config.prefix)
    options = EmbedOptions(
        prompt=prompt,
        kind=config.kind,
        long=config.long,
        normalize=config.normalize,
        dimensions=config.dimensions,
        store=config.store,
    )
    decides = ("encoder", "pooling", "kind", "normalize", "dimensions", "long", "store", "attribute", "dtype")
    step = EmbedText(
        encoder=config.encoder,
        options=tuple(sorted(config.encoder_options.items())),
        embed=options,
        text=template.template,
        attribute=config.attribute,
        # On an object store a note a row would cost more than the row.
        remember=config.checkpoint and Folder(config.output, **config.storage_options).is_local,
    )
    return Job(
        name="embed",
        input_url="",
        output_url=config.output,
        text_column=column,
        id_column=config.id_column,
        extra_columns=tuple(c for c in template.columns if c != column),
        steps=(step,),
        config={name: getattr(config, name) for name in decides}
        | {"prompt": prompt, "text": template.template},
        models=(asdict(info),),
        seed=config.seed,
        on_finish="pipelines.report:write_report",
        input_options=config.storage_options,
        output_options=config.storage_options,
        limits=_LIMITS,
        max_units=_MAX_UNITS,
    )


def describe(config: EmbedConfig) -> tuple[ModelInfo, EncoderSettings]:
    """The encoder as the manifest records it, and how it wants to be used; no weights are loaded.

    Raises:
        ModelError: It cannot be had.
    """
    info = registry.describe("encoder", config.encoder, **config.encoder_options)
    settings = read_settings(find_folder(config.encoder))
    extra = {
        "pooling": config.pooling or settings.pooling,
        "normalizes": settings.normalizes,
        "similarity": settings.similarity,
        "dimension": settings.dimension,
        "prompts": dict(settings.prompts),
    }
    return replace(
        info, extra={**info.extra, **{k: v for k, v in extra.items() if v not in (0, {}, "")}}
    ), settings


def run(config: EmbedConfig, settings: RunSettings) -> RunResult:
    """Embed, then index where that was asked for.

    Raises:
        TamisError: Anything the user can mend; nothing has been lost.
    """
    if config.index is not None:
        check_index(config.index)
    job = build_job(config)
    result = run_job(job, config.input, settings)
    if result.manifest is None:
        later = (
            f"; when it has finished, run: tamis index {config.output} --kind {config.index.kind}"
            if config.index
            else ""
        )
        return replace(result, detail=result.detail + later) if result.detail else result
    output = Folder(config.output, **config.storage_options)
    output.remove(CACHE)  # only what is not finished needs it
    if config.index is None:
        if "index" not in result.manifest:
            output.remove("index")  # of rows that are no longer the same
        return result
    notify: Callable[[str], None] = lambda line: None  # noqa: E731
    if settings.progress != "quiet":
        notify = lambda line: print(f"index: {line}", file=sys.stderr)  # noqa: E731
    entry = index_output(
        config.output, config.index, threads=config.threads, options=config.storage_options, notify=notify
    )
    return replace(result, manifest={**result.manifest, "index": entry})


def check_index(index: IndexConfig) -> None:
    """Say before hours of embedding that an index cannot be made.

    Raises:
        ModelError: FAISS is not installed.
        TamisError: The kind is not known.
    """
    from transforms.embed.faiss_parts import new_index

    new_index(_spec(index, 1), 1_000_000, 64 * 8, "dot")


def index_output(
    url: str,
    index: IndexConfig,
    *,
    attribute: str | None = None,
    threads: int = 1,
    options: Mapping[str, Any] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Build an index over a finished output, and show it in the output's report.

    Raises:
        TamisError: The output has no embeddings, or the index cannot be made.
    """
    from pipelines.report import write_report
    from transforms.embed.build import build_index

    with locked(Folder(url, **(options or {}))):
        entry = build_index(
            url,
            _spec(index, threads),
            metric=index.metric,
            attribute=attribute,
            options=options,
            notify=notify,
        )
        write_report(url, options=options)
    return entry


def _spec(index: IndexConfig, threads: int) -> Any:
    from transforms.embed.faiss_parts import IndexSpec

    return IndexSpec(**index.model_dump(exclude={"metric"}), threads=threads)


def make_index_config(kind: str, pairs: Mapping[str, Any]) -> IndexConfig:
    """Settings of an index from a kind and KEY=VALUE pairs.

    Raises:
        TamisError: There is no such setting, or its value is wrong.
    """
    from pydantic import ValidationError

    try:
        return IndexConfig(kind=kind, **pairs)
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(n for n in IndexConfig.model_fields if n != "kind")
        where = ".".join(map(str, first["loc"]))
        raise TamisError(f"index setting {where}: {first['msg']} (settings: {known})") from error


def print_result(config: EmbedConfig, result: RunResult) -> None:
    """Say what came of it."""
    if result.detail:
        print(f"{result.state}: {result.detail}")
        return
    if result.manifest is None:
        print(
            f"{result.plan.rows} rows in {len(result.plan.shards)} shards, {result.done} units already done"
        )
        for note in result.notes:
            print(note)
        return
    totals, counters = result.manifest["totals"], result.manifest["counters"]
    notes = [
        f"{counters[f'embed.{key}']} {said}"
        for key, said in (
            ("truncated", "cut at the model's limit"),
            ("mean", "longer than the model's limit and averaged over windows"),
            ("empty", "empty, without a vector"),
            ("null", "without a vector, for the model gave none"),
        )
        if counters.get(f"embed.{key}")
    ]
    print(f"{result.state}: {totals['rows_kept']} rows embedded, {totals['rows_dead']} dead")
    for note in notes:
        print(f"  {note}")
    for note in result.notes:
        print(note)
    print(f"vectors: {config.output}/attributes/{config.attribute}")
    if "index" in result.manifest:
        print(describe_index(config.output, result.manifest["index"]))
    print(f"report: {config.output}/report.html")


def describe_index(url: str, entry: Mapping[str, Any]) -> str:
    """One line about an index."""
    recall = entry.get("recall")
    measured = f", recall@{recall['at']} {recall['value']:.3f}" if recall else ""
    probe = f", probe {entry['probe']}" if entry.get("probe") else ""
    return f"index: {url}/{entry['folder']} ({entry['factory']}, {entry['vectors']} vectors{measured}{probe})"
