"""The typed configuration of `tamis detox`: all that decides the result, and a few settings that do not."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipelines.settings import validated
from schemas.errors import TamisError
from transforms.detox.options import (
    AcceptOptions,
    GateOptions,
    LocalizeOptions,
    RewriteOptions,
    SegmentOptions,
)

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
    "compression",
    "row_group_rows",
}


class ToxicTrainingOptions(BaseModel):
    """How a toxic model is trained where contrastive decoding is asked for and none is given.

    HSPD fine-tunes for 1.3 epochs on the toxic texts of the very corpus (all weights, learning rate 2e-5). The defaults
    here are a LoRA adapter on the rewriter's base, which costs its own size in memory, and about one epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    full: bool = Field(False, description="Train all weights instead of an adapter.")
    texts: int = Field(
        10_000, ge=1, description="Most texts to train on; of more, those with the smallest content hash."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the texts, as far as the steps allow.")
    min_steps: int = Field(40, ge=1, description="Fewest steps, however few texts.")
    max_steps: int = Field(400, ge=1, description="Most steps, however many texts.")
    batch_size: int = Field(1, ge=1, description="Rows of `max_length` tokens a step.")
    max_length: int = Field(
        512, ge=8, description="Tokens of a row; texts are packed, and none sees another."
    )
    layers: int = Field(
        0,
        ge=0,
        description="In how many of the last layers the adapter lies, on top of the rewriter's, so that those below are "
        "computed once; 0: in all layers, on the plain base.",
    )
    lora_r: int = Field(8, ge=1, description="Rank of the adapter.")
    lora_alpha: int = Field(16, ge=1, description="Its scale: the update is multiplied by alpha / r.")
    learning_rate: float | None = Field(
        None, gt=0, description="Peak; default 6e-4, or 2e-5 for all weights."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the hardware multiplies it."
    )
    threads: int = Field(0, ge=0, description="Torch threads; 0: all cores.")

    @property
    def rate(self) -> float:
        """The peak learning rate in force."""
        return self.learning_rate or (2e-5 if self.full else 6e-4)

    def steps(self, tokens: int) -> int:
        """Steps to take over so many tokens."""
        wanted = -(-round(self.epochs * tokens) // (self.batch_size * self.max_length))
        return max(self.min_steps, min(self.max_steps, wanted))


class DecodingOptions(BaseModel):
    """How the rewriter decodes: plainly, or steered away from what a toxic model would say (SoCD)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["prompt_only", "logratio", "official", "vanilla_cd"] = Field(
        "prompt_only",
        description="prompt_only: plain sampling; the others need a toxic model: one given, or one trained.",
    )
    toxic: str | None = Field(None, description="Folder of the toxic model; None = the rewriter's base.")
    toxic_adapter: str | None = Field(None, description="LoRA adapter that makes it toxic, by folder.")
    divergence: Literal["l2", "tvd", "js", "fkl", "rkl"] = Field(
        "l2", description="How the two are compared."
    )
    dynamic_k: bool = Field(True, description="Edit up to floor(alpha * V) tokens a step; false: k_min.")
    k_min: int = Field(10, ge=1, description="Fewest tokens that may be edited at a step.")
    strength: float = Field(1.0, ge=0, description="Multiplies alpha; 1 is the paper.")
    train: ToxicTrainingOptions = Field(
        default_factory=ToxicTrainingOptions,
        description="How a toxic model is trained on what the gate flags, where none is given.",
    )
    compare_modes: int = Field(
        0,
        ge=0,
        description="Passages whose rewriting in every mode is shown in the report; changes no output.",
    )

    @property
    def has_toxic(self) -> bool:
        """Whether a toxic model is given."""
        return bool(self.toxic or self.toxic_adapter)

    @property
    def trains(self) -> bool:
        """Whether a toxic model has to be trained before the job can run."""
        return self.mode != "prompt_only" and not self.has_toxic

    def options(self, mode: str | None = None) -> dict[str, Any]:
        """Options of the language model in a mode, by default the one set.

        Raises:
            TamisError: There is no toxic model.
        """
        mode = mode or self.mode
        if not self.has_toxic:
            raise TamisError(
                f"decoding.mode {mode} needs a toxic model: pass --toxic-adapter FOLDER (make one with "
                "`tamis train lm TOXIC_TEXTS --model smollm2 --lora --output FOLDER`), or let `tamis detox` train one"
            )
        names = ("divergence", "dynamic_k", "k_min", "strength")
        settings = tuple(sorted([("mode", mode), *((name, getattr(self, name)) for name in names)]))
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

    @property
    def trains(self) -> bool:
        """Whether a toxic model has to be trained before the job can run."""
        return self.decoding.trains and self.contrasts

    @property
    def contrasts(self) -> bool:
        """Whether two models are held, to decode or to localise."""
        decodes = self.decoding.mode != "prompt_only" and self.accept.needs_candidates
        return "socd" in self.localize.sources or decodes

    def with_toxic(self, folder: str, *, full: bool) -> DetoxConfig:
        """The same job with this toxic model: a whole one, or an adapter."""
        side = {"toxic" if full else "toxic_adapter": folder}
        return self.model_copy(update={"decoding": self.decoding.model_copy(update=side)})

    def without_contrast(self) -> DetoxConfig:
        """The same job with no toxic model: what can be checked and planned before there is one."""
        sources = tuple(s for s in self.localize.sources if s != "socd")
        return self.model_copy(
            update={
                "decoding": DecodingOptions(),
                "localize": self.localize.model_copy(update={"sources": sources}),
            }
        )

    def check_toxic(self) -> None:
        """Refuse settings that need a toxic model where there is none and none can be trained, before any work.

        Raises:
            TamisError: They do.
        """
        if self.model.startswith("openai:") and (
            self.trains or self.contrasts or self.decoding.compare_modes
        ):
            raise TamisError("contrastive decoding needs the model in this process; pass another --model")
        if self.decoding.has_toxic and not (self.contrasts or self.decoding.compare_modes):
            why = (
                "with --decoding prompt_only"
                if self.accept.needs_candidates
                else "with a ladder that takes no candidates"
            )
            raise TamisError(f"the toxic model does nothing {why}: pass --decoding logratio, or leave it out")
        if self.decoding.has_toxic or self.trains:
            return
        if "socd" in self.localize.sources:
            self.contrast_options()
        if self.decoding.compare_modes:
            raise TamisError(
                "--compare-modes needs a toxic model: pass --toxic-adapter FOLDER, or --decoding logratio to have one "
                "trained on this corpus"
            )

    def model_options(self, mode: str | None = None) -> tuple[tuple[str, Any], ...]:
        """Options of the language model that rewrites, as sorted pairs.

        Args:
            mode: A decoding mode instead of the one set; the weights are then shared with it.

        Raises:
            TamisError: A toxic model is needed and not there, or the model runs elsewhere.
        """
        if self.model.startswith("openai:"):
            self.check_toxic()
            return ()
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "threads": self.threads}
        if self.batch_rows > 1:
            options["batch_rows"] = self.batch_rows
        if self.adapter_name:
            options["adapter"] = self.adapter_name
        if self.contrasts or mode is not None:
            options |= self.decoding.options(mode)
        return tuple(sorted(options.items()))

    def contrast_options(self) -> tuple[tuple[str, Any], ...]:
        """Options of the two models that localise, as sorted pairs; they share the rewriter's weights.

        Raises:
            TamisError: There is no toxic model.
        """
        if not self.decoding.has_toxic:
            raise TamisError(
                "--localize socd needs a toxic model: pass --toxic-adapter FOLDER, or --decoding logratio to have one "
                "trained on this corpus"
            )
        return self.model_options("logratio")

    def semantic(self) -> dict[str, Any]:
        """What decides the result, as JSON: what two runs must have in common to be one."""
        settings = self.model_dump(mode="json", exclude=_COSMETIC)
        del settings["decoding"]["compare_modes"]
        train = settings["decoding"].pop("train")
        if self.trains:
            del train["threads"]
            if train["layers"] == 0:  # as all were before there was a choice: these keep their hash
                del train["layers"]
            settings["decoding"]["train"] = train
        return settings

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
        if not isinstance(settings, dict):
            raise TamisError(f"cannot read the settings in {file}: it holds no table of settings")
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
            if not isinstance(node, dict):
                raise TamisError(
                    f"{path}: '{parent}' is {node!r} in the settings, and no table of its own settings"
                )
        node[leaf] = value
    return settings


def make_config(settings: Mapping[str, Any]) -> DetoxConfig:
    """Validate settings, and say in one line what is wrong with them.

    Raises:
        TamisError: A setting is unknown or out of its range.
    """
    return validated(DetoxConfig, settings)
