"""The steps of the detox job: labelled, picklable, each a pure function and the names of the models it takes.

Models are loaded through `models.registry`, which keeps one of each a process; so a step holds names only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from schemas.errors import ModelError
from transforms.detox.accept import accept_rewrites
from transforms.detox.gate import gate_toxicity, label_columns
from transforms.detox.localize import (
    LexiconLocalizer,
    Localizer,
    OcclusionLocalizer,
    localize_toxic_spans,
)
from transforms.detox.options import (
    ACCEPT_DEFAULTS,
    GATE_DEFAULTS,
    LOCALIZE_DEFAULTS,
    REWRITE_DEFAULTS,
    SEGMENT_DEFAULTS,
    AcceptOptions,
    GateOptions,
    LocalizeOptions,
    RewriteOptions,
    SegmentOptions,
)
from transforms.detox.rewrite import rewrite_toxic_segments
from transforms.detox.segment import segment_text
from transforms.detox.socd_spans import SoCDLocalizer
from transforms.detox.tagger_spans import TaggerLocalizer
from transforms.shards.steps import StepContext

# Options of a model, as sorted (name, value) pairs: hashable, so that the registry can tell models apart by them.
ModelOptions = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class SegmentText:
    """Cut texts into segments.

    Attributes:
        options: Unit, language, longest segment.
        label: Name of the step.
    """

    options: SegmentOptions = SEGMENT_DEFAULTS
    label: str = "SegmentText"

    def setup(self, context: StepContext) -> None:
        """Nothing to load."""

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Apply `segment_text`."""
        return segment_text(batch, text_column=context.text_column, options=self.options, count=context.count)


@dataclass(frozen=True)
class GateToxicity:
    """Find the toxic segments by a cascade of scorers.

    Attributes:
        options: Mode, thresholds, labels.
        lexicon: Name of the first cheap stage; None leaves it out.
        linear: Name of the second cheap stage; None leaves it out (it is used in a cascade only).
        classifier: Name of the scorer that decides.
        classifier_options: Its options.
        cache_scores: Remember the classifier's scores in the request cache.
        label: Name of the step.
    """

    options: GateOptions = GATE_DEFAULTS
    lexicon: str | None = "lexicon"
    linear: str | None = "linear"
    classifier: str = "jigsaw-bilstm"
    classifier_options: ModelOptions = ()
    cache_scores: bool = True
    label: str = "GateToxicity"

    def setup(self, context: StepContext) -> None:
        """Load the scorers.

        Raises:
            ModelError: One cannot be had, or lacks a label.
        """
        self._cheap()
        label_columns(_load("scorer", self.classifier, self.classifier_options), self.options.labels)

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Apply `gate_toxicity`."""
        lexicon, linear = self._cheap()
        return gate_toxicity(
            batch,
            text_column=context.text_column,
            classifier=_load("scorer", self.classifier, self.classifier_options),
            lexicon=lexicon,
            linear=linear,
            options=self.options,
            cache=context.cache if self.cache_scores else None,
            count=context.count,
        )

    def _cheap(self) -> tuple[Any, Any]:
        linear = self.linear if self.options.gate == "cascade" else None
        return (
            _load("scorer", self.lexicon) if self.lexicon else None,
            _load("scorer", linear) if linear else None,
        )


@dataclass(frozen=True)
class LocalizeToxicSpans:
    """Find the toxic characters of flagged segments.

    Attributes:
        options: Localisers and their settings.
        gate: The gate's options (its labels, and what it calls toxic).
        lexicon: Name of the lexicon.
        classifier: Name of the scorer that occlusion asks.
        classifier_options: Its options.
        contrast: Name of the language model that localises by contrast with a toxic one (the rewriter's).
        contrast_options: Its options, the toxic model among them; with the rewriter's, weights are shared.
        tagger_options: Options of the tagger that `options` names.
        cache_scores: Remember the classifier's scores in the request cache.
        label: Name of the step.
    """

    options: LocalizeOptions = LOCALIZE_DEFAULTS
    gate: GateOptions = GATE_DEFAULTS
    lexicon: str = "lexicon"
    classifier: str = "jigsaw-bilstm"
    classifier_options: ModelOptions = ()
    contrast: str | None = None
    contrast_options: ModelOptions = ()
    tagger_options: ModelOptions = ()
    cache_scores: bool = (
        False  # a look-up costs what the embedded classifier does, and nothing else asks for these
    )
    label: str = "LocalizeToxicSpans"

    def setup(self, context: StepContext) -> None:
        """Load the models.

        Raises:
            ModelError: One cannot be had.
        """
        self._localizers(context)

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Apply `localize_toxic_spans`."""
        return localize_toxic_spans(
            batch,
            text_column=context.text_column,
            localizers=self._localizers(context),
            count=context.count,
        )

    def _localizers(self, context: StepContext) -> list[Localizer]:
        out: list[Localizer] = []
        if "lexicon" in self.options.sources:
            out.append(LexiconLocalizer(_load("scorer", self.lexicon)))
        if "occlusion" in self.options.sources:
            out.append(
                OcclusionLocalizer(
                    _load("scorer", self.classifier, self.classifier_options),
                    labels=self.gate.labels,
                    min_drop=self.options.min_drop,
                    residual=self.gate.tau,
                    window_words=self.options.window_words,
                    long_words=self.options.long_words,
                    cache=context.cache if self.cache_scores else None,
                )
            )
        if "socd" in self.options.sources:
            if self.contrast is None:
                raise ModelError("localiser socd needs a base and a toxic language model, and none is named")
            model = _load("lm", self.contrast, self.contrast_options)
            out.append(SoCDLocalizer(model, self.options.socd_threshold, context.cache))
        if "tagger" in self.options.sources and self.options.tagger:
            out.append(TaggerLocalizer(_load("tagger", self.options.tagger, self.tagger_options)))
        return out


@dataclass(frozen=True)
class RewriteToxicSegments:
    """Sample candidates for the flagged segments.

    Attributes:
        options: Unit, context, sampling.
        model: Name of the language model.
        model_options: Its options.
        prompt: Name or file of the prompt.
        prompt_options: Variables bound in it (`shots`).
        label: Name of the step.
    """

    options: RewriteOptions = REWRITE_DEFAULTS
    model: str = "smollm2"
    model_options: ModelOptions = ()
    prompt: str = "detox-rewrite-v1"
    prompt_options: ModelOptions = ()
    label: str = "RewriteToxicSegments"

    def setup(self, context: StepContext) -> None:
        """Load the model and the prompt.

        Raises:
            ModelError: The model cannot be had.
        """
        self._prompt()
        _load("lm", self.model, self.model_options)

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Apply `rewrite_toxic_segments`."""
        return rewrite_toxic_segments(
            batch,
            text_column=context.text_column,
            model=_load("lm", self.model, self.model_options),
            prompt=self._prompt(),
            options=self.options,
            seed=context.seed,
            cache=context.cache,
            count=context.count,
            on_progress=context.heartbeat,
            stage=self.label,
        )

    def _prompt(self) -> Any:
        from models.prompts import load_prompt

        return load_prompt(self.prompt, **dict(self.prompt_options))


@dataclass(frozen=True)
class AcceptRewrites:
    """Choose among the candidates, fall back where none will do, and put the texts together.

    Attributes:
        options: Ranking, conditions, ladder.
        gate: The gate's options: its labels, and its threshold.
        segmenting: How the originals were segmented.
        scorer: Name of the ranker (the gate's classifier).
        scorer_options: Its options.
        encoder: Name of the sentence encoder.
        encoder_options: Its options.
        lexicon: Name of the word list whose strong words no replacement may hold; None = none.
        label: Name of the step.
    """

    options: AcceptOptions = ACCEPT_DEFAULTS
    gate: GateOptions = GATE_DEFAULTS
    segmenting: SegmentOptions = SEGMENT_DEFAULTS
    scorer: str = "jigsaw-bilstm"
    scorer_options: ModelOptions = ()
    encoder: str = "minilm"
    encoder_options: ModelOptions = ()
    lexicon: str | None = "lexicon"
    label: str = "AcceptRewrites"

    def setup(self, context: StepContext) -> None:
        """Load the scorer, and the encoder where a rung of the ladder needs it.

        Raises:
            ModelError: One cannot be had.
        """
        _load("scorer", self.scorer, self.scorer_options)
        self._encoder()
        self._lexicon()
        self._fluency()

    def __call__(self, batch: pa.RecordBatch, context: StepContext) -> pa.RecordBatch:
        """Apply `accept_rewrites`."""
        return accept_rewrites(
            batch,
            text_column=context.text_column,
            scorer=_load("scorer", self.scorer, self.scorer_options),
            encoder=self._encoder(),
            lexicon=self._lexicon(),
            fluency=self._fluency(),
            options=self.options,
            gate=self.gate,
            segmenting=self.segmenting,
            cache=context.cache,
            count=context.count,
            stage=self.label,
        )

    def _lexicon(self) -> Any:
        return _load("scorer", self.lexicon) if self.lexicon else None

    def _fluency(self) -> Any:
        if not self.options.needs_fluency:
            return None
        from models.scorers.fluency import load_fluency_scorer

        return load_fluency_scorer()

    def _encoder(self) -> Any:
        if not self.options.needs_encoder:
            return None
        return _load("encoder", self.encoder, self.encoder_options)


def _load(kind: Any, name: str, options: ModelOptions = ()) -> Any:
    from models import registry

    return registry.load(kind, name, **dict(options))
