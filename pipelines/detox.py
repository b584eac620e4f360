"""`tamis detox`: the same corpus back, minus the toxicity, meaning kept, with a record of every change.

HSPD (Shao et al., ACL 2026) as a production job: segment, gate, localise, rewrite, accept. The typed configuration
here is all that decides the result; `python -m pipelines.detox` takes the same options as `tamis detox`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models import prompts, registry
from models.protocols import ModelInfo
from pipelines.run import RunResult, RunSettings, run_job
from schemas.errors import TamisError
from transforms.detox.options import (
    AcceptOptions,
    GateOptions,
    LocalizeOptions,
    RewriteOptions,
    SegmentOptions,
)
from transforms.detox.steps import (
    AcceptRewrites,
    GateToxicity,
    LocalizeToxicSpans,
    RewriteToxicSegments,
    SegmentText,
)
from transforms.shards.engine import Job
from transforms.shards.formats import AssembleOptions, UnitLimits

EMBEDDED_MODEL, EMBEDDED_ADAPTER = "smollm2", "detox"
# Where a run happens, not what comes out of it: kept out of the configuration hash.
_COSMETIC = {
    "input",
    "output",
    "storage_options",
    "max_dead",
    "threads",
    "device",
    "text_column",
    "id_column",
    "seed",
}


class DecodingOptions(BaseModel):
    """How the rewriter decodes: plainly, or steered away from what a toxic model would say (SoCD)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["prompt_only", "logratio", "official", "vanilla_cd"] = Field(
        "prompt_only", description="prompt_only: plain sampling; the others need a toxic model."
    )
    toxic: str | None = Field(None, description="Folder of the toxic model; None = the rewriter's base.")
    toxic_adapter: str | None = Field(None, description="LoRA adapter that makes it toxic, by folder.")
    divergence: Literal["l2", "tvd", "js", "fkl", "rkl"] = Field(
        "l2", description="How the two are compared."
    )
    dynamic_k: bool = Field(True, description="Edit up to floor(alpha * V) tokens a step; false: k_min.")
    k_min: int = Field(10, ge=1, description="Fewest tokens that may be edited at a step.")
    strength: float = Field(1.0, ge=0, description="Multiplies alpha; 1 is the paper.")

    def options(self) -> dict[str, Any]:
        """Options of the language model; none where nothing is steered.

        Raises:
            TamisError: A mode that needs a toxic model has none.
        """
        if self.mode == "prompt_only":
            return {}
        if not (self.toxic or self.toxic_adapter):
            raise TamisError(
                f"decoding.mode {self.mode} needs a toxic model: pass --toxic-adapter FOLDER (make one with "
                "`tamis train lm TOXIC_TEXTS --model smollm2 --lora --output FOLDER`)"
            )
        names = ("mode", "divergence", "dynamic_k", "k_min", "strength")
        settings = tuple(sorted((name, getattr(self, name)) for name in names))
        sides = {"toxic": self.toxic, "toxic_adapter": self.toxic_adapter}
        return {"socd": settings, **{k: v for k, v in sides.items() if v}}


class DetoxConfig(BaseModel):
    """Settings of the detox job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str = Field(description="File, folder, glob, URL, `datasets` folder or hub id.")
    output: str = Field(description="Folder to write to.")
    text_column: str = Field("text", description="Column with the text.")
    id_column: str | None = Field(None, description="Column with row ids; None = `<shard>#<row>`.")
    seed: int = Field(0, ge=0, description="Seed of all sampling.")

    lexicon: str = Field("lexicon", description="`lexicon`, or `lexicon:FILE`.")
    linear: str = Field("linear", description="The cascade's second stage.")
    scorer: str = Field("jigsaw-bilstm", description="Classifier that decides the gate and ranks candidates.")
    scorer_extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the classifier: checkpoint, config, sha256, label, dtype, token_budget.",
    )
    encoder: str = Field("minilm", description="Sentence encoder that measures similarity.")
    model: str = Field(EMBEDDED_MODEL, description="Language model that rewrites.")
    adapter: str | None = Field(
        None,
        description="LoRA adapter by name or folder; `none` = no adapter. The embedded model takes its own by default.",
    )
    prompt: str = Field("detox-rewrite-v1", description="Prompt by name or file.")
    dtype: str = Field("auto", description="Weights' type: auto, float32, bfloat16.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1.")
    threads: int = Field(1, ge=1, description="Torch threads a worker.")
    batch_rows: int = Field(
        1,
        ge=1,
        description="Requests a decoding batch; more than 1 is for accelerators, exact up to floating point.",
    )

    decoding: DecodingOptions = Field(default_factory=DecodingOptions)
    segment: SegmentOptions = Field(default_factory=SegmentOptions)
    gate: GateOptions = Field(default_factory=GateOptions)
    localize: LocalizeOptions = Field(default_factory=LocalizeOptions)
    rewrite: RewriteOptions = Field(default_factory=RewriteOptions)
    accept: AcceptOptions = Field(default_factory=AcceptOptions)

    compression: str | None = Field(None, description="Parquet codec of the output; None = as the input.")
    row_group_rows: int | None = Field(
        None, ge=1, description="Rows a Parquet row group; None = as the input."
    )
    max_dead: int | None = Field(None, ge=0, description="Stop when more rows than this have died.")
    storage_options: dict[str, Any] = Field(default_factory=dict, description="fsspec options.")

    @property
    def adapter_name(self) -> str | None:
        """The adapter in force."""
        if self.adapter is None:
            return EMBEDDED_ADAPTER if self.model == EMBEDDED_MODEL else None
        return None if self.adapter == "none" else self.adapter

    def model_options(self) -> tuple[tuple[str, Any], ...]:
        """Options of the language model, as sorted pairs."""
        steering = self.decoding.options()
        if self.model.startswith("openai:"):
            if steering:
                raise TamisError("contrastive decoding needs the model in this process; pass another --model")
            return ()
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "threads": self.threads}
        if self.batch_rows > 1:
            options["batch_rows"] = self.batch_rows
        if self.adapter_name:
            options["adapter"] = self.adapter_name
        options |= steering
        return tuple(sorted(options.items()))

    def scorer_options(self) -> tuple[tuple[str, Any], ...]:
        """Options of the classifier, as sorted pairs."""
        return tuple(sorted({"threads": self.threads, **self.scorer_extra}.items()))


def load_settings(file: Path | None, given: Mapping[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    """Merge settings: the file's, then the options typed, then `--set PATH=VALUE`.

    Args:
        file: TOML or JSON; None for none.
        given: Dotted path -> value.
        sets: `path=value`; a value that reads as JSON is taken as such, any other is text.

    Raises:
        TamisError: The file cannot be read, or an item of `sets` is not `path=value`.
    """
    settings: dict[str, Any] = {}
    if file is not None:
        try:
            text = file.read_text()
            settings = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
        except (OSError, ValueError) as error:
            raise TamisError(f"cannot read the settings in {file}: {error}") from error
    pairs = list(given.items())
    for item in sets:
        path, sign, value = item.partition("=")
        if not sign:
            raise TamisError(f"--set {item}: write it as path=value, such as gate.tau=0.4")
        try:
            pairs.append((path, json.loads(value)))
        except ValueError:
            pairs.append((path, value))
    for path, value in pairs:
        node = settings
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return settings


def make_config(settings: Mapping[str, Any]) -> DetoxConfig:
    """Validate settings, and say in one line what is wrong with them.

    Raises:
        TamisError: A setting is unknown or out of its range.
    """
    try:
        return DetoxConfig.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise TamisError(f"setting {place}: {first['msg']} (got {first.get('input')!r})") from error


def build_job(config: DetoxConfig) -> Job:
    """The job of a configuration: its steps, and the models' pinned revisions.

    Raises:
        ModelError: A model cannot be had; no row has been touched.
    """
    scorer_options = config.scorer_options()
    infos: list[ModelInfo] = [
        registry.describe("scorer", config.lexicon),
        registry.describe("scorer", config.scorer, **dict(scorer_options)),
    ]
    if config.accept.needs_encoder:
        infos.append(registry.describe("encoder", config.encoder, threads=config.threads))
    rewriting: tuple[RewriteToxicSegments, ...] = ()
    if config.accept.needs_candidates:  # a filter (drop, redact) loads no language model
        model_options = config.model_options()
        infos.append(registry.describe("lm", config.model, **dict(model_options)))
        rewriting = (
            RewriteToxicSegments(
                config.rewrite, model=config.model, model_options=model_options, prompt=config.prompt
            ),
        )
    if config.gate.gate == "cascade":
        infos.insert(1, registry.describe("scorer", config.linear))
    prompt = prompts.load_prompt(config.prompt)
    steps = (
        SegmentText(config.segment),
        GateToxicity(
            config.gate,
            lexicon=config.lexicon,
            linear=config.linear,
            classifier=config.scorer,
            classifier_options=scorer_options,
        ),
        LocalizeToxicSpans(
            config.localize,
            lexicon=config.lexicon,
            classifier=config.scorer,
            classifier_options=scorer_options,
        ),
        *rewriting,
        AcceptRewrites(
            config.accept,
            config.gate,
            config.segment,
            scorer=config.scorer,
            scorer_options=scorer_options,
            lexicon=config.lexicon,
            encoder=config.encoder,
            encoder_options=(("threads", config.threads),),
        ),
    )
    semantic = config.model_dump(mode="json", exclude=_COSMETIC | {"compression", "row_group_rows"})
    return Job(
        name="detox",
        input_url="",
        output_url=config.output,
        text_column=config.text_column,
        id_column=config.id_column,
        steps=steps,
        config={**semantic, "prompt_tag": prompt.tag},
        models=tuple(asdict(i) for i in infos),
        seed=config.seed,
        assemble=AssembleOptions(config.compression, config.row_group_rows),
        max_dead=config.max_dead,
        # A rewritten row costs seconds: small units share the work well and are committed often.
        limits=UnitLimits(rows=16, bytes=1 << 20),
        max_units=1024,
        on_finish="pipelines.report:write_report",
        input_options=config.storage_options,
        output_options=config.storage_options,
    )


def run(config: DetoxConfig, settings: RunSettings) -> RunResult:
    """Run the job, or go on with it where an earlier run stopped."""
    return run_job(build_job(config), config.input, settings)


def print_result(config: DetoxConfig, result: RunResult) -> None:
    """Say in a few lines what came of it and where to look."""
    plan = result.plan
    if result.detail:
        print(f"{result.state}: {result.detail}")
        return
    if result.manifest is None:
        unreadable = sum(1 for s in plan.shards if s.error)
        print(
            f"would read {plan.rows} rows in {len(plan.shards)} shards ({plan.units} units, {result.done} already done"
            + (f", {unreadable} shards unreadable" if unreadable else "")
            + ")"
        )
        return
    t = result.manifest["totals"]
    print(
        f"{result.state}: {t['rows_in']} rows in, {t['rows_kept']} kept ({t['rows_changed']} of them rewritten, "
        f"{t['edits']} edits), {t['rows_dropped']} dropped, {t['rows_dead']} dead"
    )
    print(f"corpus: {config.output}/data")
    print(f"report: {config.output}/report.html")
    if t["rows_dead"]:
        print(
            f"dead rows: tamis inspect {config.output} --table dead; tamis retry {config.output} replays them"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m pipelines.detox`: the same options as `tamis detox`."""
    import sys

    from pipelines.cli import main as cli

    cli(["detox", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    from pipelines.detox import main as imported_main  # classes pickle by their real module, not __main__

    imported_main()
