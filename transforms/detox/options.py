"""The settings of the detox steps: validated, frozen, hashable, each with its meaning and default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.lm.limits import check_sampling
from models.protocols import Sampling
from schemas.errors import ModelError

Probability = Annotated[float, Field(ge=0, le=1)]

Source = Literal["lexicon", "occlusion", "socd", "tagger"]
Rung = Literal["candidate", "span_edit", "redact", "drop_segment", "drop_document", "flag"]
Condition = Literal[
    "toxicity",
    "improvement",
    "similarity",
    "lexicon",
    "disguise",
    "length",
    "numbers",
    "names",
    "urls",
    "negation",
    "language",
    "refusal",
    "copy",
]
CONDITIONS: tuple[Condition, ...] = (
    "toxicity",
    "improvement",
    "similarity",
    "lexicon",
    "disguise",
    "length",
    "numbers",
    "names",
    "urls",
    "negation",
    "language",
    "refusal",
    "copy",
)
# "The same corpus back, minus the toxicity": meaning is given up one step at a time, and a document is lost only
# where nothing of it would remain.
LADDER: tuple[Rung, ...] = ("candidate", "span_edit", "redact", "drop_segment", "drop_document")


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SegmentOptions(_Options):
    """How a text is cut into segments."""

    unit: Literal["sentence", "document"] = Field(
        default="sentence", description="What is gated as one piece: each sentence, or the whole text."
    )
    language: str = Field(default="en", description="ISO code of the language whose sentence rules apply.")
    max_chars: int = Field(
        default=600,
        ge=40,
        description="Longest sentence segment, in characters; longer ones are cut at clause marks, then at "
        "spaces, then hard. Does not apply to unit=document.",
    )


class GateOptions(_Options):
    """Which segments count as toxic."""

    gate: Literal["cascade", "all", "none"] = Field(
        default="cascade",
        description="cascade: only what a cheap stage lets pass reaches the classifier; all: the classifier "
        "scores every segment; none: every segment is scored and flagged, whatever the score (as HSPD assumes; "
        "one that scores below tau is rewritten where a candidate scores lower still, and else kept and flagged).",
    )
    tau: Probability = Field(default=0.5, description="A segment is toxic where its score is at least this.")
    labels: tuple[str, ...] = Field(
        default=(),
        description="The score is the maximum over these labels of the classifier; empty = its first label.",
    )
    lexicon_pass: Probability = Field(
        default=0.1,
        description="Lexicon score from which a segment reaches the classifier; the default is any listed word.",
    )
    linear_pass: Probability = Field(
        default=0.05, description="Score of the linear stage from which a segment reaches the classifier."
    )


class LocalizeOptions(_Options):
    """How toxic character spans are found inside flagged segments."""

    sources: tuple[Source, ...] = Field(
        default=("lexicon", "occlusion"),
        description="Localisers whose spans are united: lexicon (listed words), occlusion (words without which the "
        "classifier's score falls), socd (words a toxic model prefers; needs one), tagger (what a trained tagger marks; "
        "needs `tagger`).",
    )
    tagger: str | None = Field(
        default=None, description="Tagger: its name, hf:FOLDER as `tamis train spans` writes it."
    )
    min_drop: Probability = Field(
        default=0.5,
        description="Occlusion: share of the segment's toxicity a word must carry (the relative fall of the "
        "score when the word is left out) to be a span.",
    )
    window_words: int = Field(
        default=8,
        ge=1,
        description="Occlusion: words left out together in the first pass over a long segment.",
    )
    long_words: int = Field(
        default=40, ge=1, description="Occlusion: segments with more words are first searched by windows."
    )
    socd_threshold: Probability = Field(
        default=0.1,
        description="SoCD: share of a word's odds that steering takes away, from which it is a span.",
    )

    @model_validator(mode="after")
    def _tagger_named(self) -> LocalizeOptions:
        if "tagger" in self.sources and not self.tagger:
            raise ValueError("source tagger needs the tagger's name: localize.tagger=hf:FOLDER")
        return self


class SamplingOptions(_Options):
    """How candidates are sampled (defaults: HSPD's five temperatures, two samples each)."""

    temperatures: tuple[float, ...] = Field(
        default=Sampling.temperatures,
        min_length=1,
        description="One group of candidates for each; 0 = greedy.",
    )
    per_temperature: int = Field(
        default=Sampling.per_temperature, ge=1, description="Candidates for each temperature."
    )
    top_p: float = Field(default=Sampling.top_p, gt=0, le=1, description="Nucleus mass; 1 = off.")
    top_k: int = Field(
        default=Sampling.top_k, ge=0, description="Sample among the k likeliest tokens; 0 = off."
    )
    repetition_penalty: float = Field(
        default=Sampling.repetition_penalty, gt=0, description="Penalty on tokens already present; 1 = off."
    )
    max_new_tokens: int = Field(
        default=Sampling.max_new_tokens,
        ge=1,
        description="Longest candidate, in tokens, whatever the source's length.",
    )

    @model_validator(mode="after")
    def _can_be_sampled(self) -> SamplingOptions:
        """What the models would refuse is refused before any work."""
        try:
            check_sampling(self.sampling())
        except ModelError as error:
            raise ValueError(str(error)) from error
        return self

    def sampling(self) -> Sampling:
        """The same settings as the models take them."""
        return Sampling(
            temperatures=self.temperatures,
            per_temperature=self.per_temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.max_new_tokens,
        )


class RewriteOptions(_Options):
    """What is given to the language model."""

    unit: Literal["sentence", "document"] = Field(
        default="sentence",
        description="Rewrite each flagged segment, or the whole text of a document with a flagged segment "
        "(segment by segment where the whole does not fit the model).",
    )
    context_chars: int = Field(
        default=0,
        ge=0,
        description="Characters of the text before the segment shown to the model (whole words).",
    )
    keep_ends: bool = Field(
        default=True,
        description="Give a candidate its source's closing mark and opening capital where it lost them.",
    )
    growth: float = Field(
        default=2.0,
        ge=1,
        description="A candidate may have this many times the tokens of its source (plus 24), so that a rambling "
        "sample stops early; the next power of two is used, up to max_new_tokens.",
    )
    sampling: SamplingOptions = Field(
        default_factory=SamplingOptions, description="How candidates are sampled."
    )


class AcceptOptions(_Options):
    """What a replacement must satisfy, and what happens where none does."""

    max_toxicity: Probability | None = Field(
        default=None,
        description="A replacement must score below this. Empty = the gate's tau, so that a second run over the "
        "output finds nothing more to do.",
    )
    min_gain: Probability = Field(
        default=0.01,
        description="A replacement must score at least this much below its source: less is the scorer's noise, and no "
        "reason to change a text.",
    )
    # Of 1,500 human rewrites of ParaDetox 6 % lie below 0.45 (MiniLM), of as many mismatched pairs 99.9 % do.
    min_similarity: float = Field(
        default=0.45, ge=-1, le=1, description="Least cosine similarity of the replacement to its source."
    )
    max_listed: Probability = Field(
        default=0.5,
        description="A replacement's lexicon score must be below this: no strong listed word is left.",
    )
    fusion_lambda: Probability = Field(
        default=0.5, description="Rank by (1-lambda) * similarity - lambda * toxicity: 1 = toxicity only."
    )
    # What 0.3 is worth: docs/results/rewrites.md.
    fluency_weight: float = Field(
        default=0.0,
        ge=0,
        description="Added to the rank: this times how much a candidate reads like a whole English sentence, in [0, 1]; 0 = "
        "the paper's ranking.",
    )
    min_length: float = Field(
        default=0.4, ge=0, description="Least length of the replacement / length of the source."
    )
    max_length: float = Field(
        default=1.8, ge=1, description="Greatest length of the replacement / length of the source."
    )
    length_slack: int = Field(
        default=20,
        ge=0,
        description="Characters by which a replacement may differ in length whatever the ratio says.",
    )
    skip: tuple[Condition, ...] = Field(
        default=(), description=f"Conditions not to apply, of: {', '.join(CONDITIONS)}."
    )
    ladder: tuple[Rung, ...] = Field(
        default=LADDER,
        min_length=1,
        description="What is tried in turn: the next best candidate, a minimal edit of the toxic span, its "
        "redaction, dropping the segment (where text remains), dropping the document, keeping it flagged. "
        "A ladder that ends without a result keeps the segment and flags it.",
    )
    redaction: str = Field(default="[redacted]", description="What stands in the place of a redacted span.")
    span_edit_candidates: int = Field(
        default=3,
        ge=0,
        description="Best candidates whose changes to the toxic span are tried as minimal edits.",
    )
    recheck: bool = Field(
        default=True,
        description="Segment and score every changed text once more; a change that fails goes down the ladder.",
    )

    @field_validator("skip")
    @classmethod
    def _in_order(cls, skip: tuple[Condition, ...]) -> tuple[Condition, ...]:
        """One order for one set, so that the configuration's hash does not depend on how it was written."""
        return tuple(c for c in CONDITIONS if c in skip)

    @property
    def toxicity_limit(self) -> float:
        """`max_toxicity`, or the gate's default where neither was given."""
        return GATE_DEFAULTS.tau if self.max_toxicity is None else self.max_toxicity

    @property
    def needs_fluency(self) -> bool:
        """Whether candidates are ranked by fluency too."""
        return self.fluency_weight > 0 and self.needs_candidates

    @property
    def needs_encoder(self) -> bool:
        """Whether a rung compares a replacement with its source."""
        return not {"candidate", "span_edit"}.isdisjoint(self.ladder)

    @property
    def needs_candidates(self) -> bool:
        """Whether a rung takes anything from sampled candidates; where none does, no language model is needed."""
        return "candidate" in self.ladder or ("span_edit" in self.ladder and self.span_edit_candidates > 0)

    def under(self, gate: GateOptions) -> AcceptOptions:
        """The same options with the gate's threshold filled in."""
        return self if self.max_toxicity is not None else self.model_copy(update={"max_toxicity": gate.tau})


# What the pure functions use where they are given no options.
SEGMENT_DEFAULTS = SegmentOptions()
GATE_DEFAULTS = GateOptions()
LOCALIZE_DEFAULTS = LocalizeOptions()
REWRITE_DEFAULTS = RewriteOptions()
ACCEPT_DEFAULTS = AcceptOptions()
