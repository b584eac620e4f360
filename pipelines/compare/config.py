"""What `tamis compare` can be told, and what of it decides each stage."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipelines.compare import arms
from schemas.errors import TamisError

# Where and how fast a comparison runs, not what comes out of it.
RUNNING = ("workers", "device", "stages", "only", "dry_run", "overwrite", "quiet", "keep_models", "command")

# What is a file name, and a label of `tamis eval toxicity`; hidden names and those with `_` are passed over as input.
_NAME = re.compile(r"(?![._])[\w.-]+")


class Training(BaseModel):
    """How the small model is trained on each corpus; the same for every arm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(
        30_000, ge=1, description="Training tokens of every arm, however many epochs that makes."
    )
    lora: bool = Field(True, description="Train a LoRA adapter; false: all weights.")
    lora_r: int = Field(16, ge=1, description="Rank.")
    lora_alpha: int = Field(32, ge=1, description="Scale.")
    learning_rate: float | None = Field(None, gt=0, description="Peak; default 6e-4 with LoRA, 5e-5 in full.")
    batch_size: int = Field(1, ge=1, description="Rows of `max_length` tokens a step.")
    max_length: int = Field(
        512, ge=8, description="Tokens of a row; documents are packed into rows, each seen by itself."
    )
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="What it multiplies in.")

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        return self.learning_rate or (6e-4 if self.lora else 5e-5)


class ToxicTraining(BaseModel):
    """How the toxic model of the contrastive arms is trained (a LoRA of the rewriter's base)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str | None = Field(None, description="Toxic texts; default the raw corpus, as in the paper.")
    adapter: str | None = Field(None, description="A toxic adapter made before; then none is trained.")
    tokens: int = Field(120_000, ge=1, description="Training tokens.")
    layers: int = Field(
        0,
        ge=0,
        description="In how many of the last layers the adapter lies, on top of the rewriter's, so that those below are "
        "computed once; 0: in all layers, on the plain base.",
    )
    lora_r: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    learning_rate: float = Field(6e-4, gt=0)


class CompareConfig(BaseModel):
    """Settings of a comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    raw: str = Field(description="The corpus as it came: file, folder or glob.")
    output: str = Field(description="Folder to write to, on this machine.")
    text_column: str = Field("text", description="Column with the text.")
    id_column: str | None = Field(None, description="Column with row ids.")
    given: dict[str, str] = Field(default_factory=dict, description="Arms made before: name -> folder.")
    make: tuple[str, ...] = Field(("all",), description="Arms to make; all, ablations, or names.")
    recipes: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Detox settings of single arms, laid over their own; a new name makes a new arm.",
    )
    detox: dict[str, Any] = Field(default_factory=dict, description="Detox settings of all rewriting arms.")
    scorer: str = Field(
        "jigsaw-bilstm", description="Classifier that filters, gates and ranks in the arms made here."
    )
    scorer_options: dict[str, Any] = Field(default_factory=dict, description="Its options.")
    lexicon: str = Field("lexicon", description="Word list of the lexicon arm.")
    tau: float = Field(
        0.5, ge=0, le=1, description="A sentence that scores this much is toxic (drop-documents)."
    )
    sentence_tau: float = Field(0.4, ge=0, le=1, description="The same for drop-sentences; Dolma's is 0.4.")
    mask: str = Field("[redacted]", description="What stands for a listed word (lexicon-mask).")
    toxic: ToxicTraining = Field(default_factory=ToxicTraining)

    model: str = Field("smollm2", description="The small model trained on every corpus.")
    train: Training = Field(default_factory=Training)
    seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="Training seeds of the main arms.")
    other_seeds: tuple[int, ...] | None = Field(
        None, min_length=1, description="Training seeds of the other arms; default the same."
    )
    main: tuple[str, ...] = Field(arms.MAIN, description="Arms worked on first.")

    prompts: str | None = Field(None, description="Prompts, one a row.")
    held_out: str | None = Field(None, description="Toxic rows kept out of training, to make prompts of.")
    held_out_column: str = Field("text", description="Their column of text.")
    group_column: str | None = Field(None, description="Their column that names a group.")
    make_prompts: int = Field(200, ge=1, description="Prompts to make of them.")
    prompt_words: int = Field(8, ge=1, description="Words of a prompt.")
    judge: str = Field("", description="Scorer that judges the models; never the ranker.")
    judge_options: dict[str, Any] = Field(default_factory=dict, description="Its options.")
    allow_shared_judge: bool = Field(
        False, description="Judge with the ranker all the same; the page says so."
    )
    samples: int = Field(25, ge=1, description="Continuations of a prompt.")
    new_tokens: int = Field(20, ge=1, description="Tokens of a continuation.")
    sample_seed: int = Field(0, ge=0, description="Seed of the sampling; the training seed is added to it.")
    reference: str = Field(
        "smollm2", description="Model that measures the fluency of continuations; none = do not."
    )
    toxicity: dict[str, Any] = Field(
        default_factory=dict, description="More settings of `tamis eval toxicity`."
    )
    neutral: str | None = Field(None, description="Held-out neutral text, for perplexity.")
    neutral_column: str = Field("text", description="Its column.")
    utility: dict[str, Any] = Field(
        default_factory=dict, description="More settings of `tamis eval utility`."
    )
    focus: str | None = Field(
        None, description="Arm the page compares with every other; default the SoCD one."
    )
    baseline: str = Field("drop-documents", description="Arm that neutral perplexity is compared with.")

    workers: int = Field(
        1,
        ge=0,
        description="Stages side by side, each in a process with one torch thread; 0 = in this process.",
    )
    device: str = Field("auto", description="auto, cpu, cuda.")
    stages: tuple[str, ...] = Field(
        (), description="Kinds of stages to run: prompts, toxic, corpus, facts, train, toxicity, utility."
    )
    only: tuple[str, ...] = Field((), description="Arms to work on.")
    keep_models: bool = Field(
        True, description="Keep the trained models; false: remove each once it is evaluated."
    )
    dry_run: bool = False
    overwrite: bool = Field(False, description="Do stages again whose settings have changed.")
    quiet: bool = False
    command: str = Field("", description="The command that does this, for the page.")

    @field_validator("seeds", "other_seeds")
    @classmethod
    def _are_seeds(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if seeds is not None and len(set(seeds)) != len(seeds):
            raise ValueError("a seed twice is no evidence more")
        if seeds is not None and min(seeds) < 0:
            raise ValueError("a seed is 0 or more")
        return seeds

    def arm_names(self) -> tuple[str, ...]:
        """All arms, in the order they are worked on: the main ones, then the given, then the rest.

        Raises:
            TamisError: An arm does not exist, has a name that cannot be one, or has a recipe though it is not made here.
        """
        made = [
            n for n in arms.expand([m for m in self.make if m not in self.recipes]) if n not in self.given
        ]
        made = list(dict.fromkeys([arms.RAW, *made, *(n for n in self.recipes if n not in self.given)]))
        for name in (*self.given, *made):
            if not _NAME.fullmatch(name):
                raise TamisError(
                    f"{name!r} is no name for an arm; use letters, digits, -, _ and . (not first)"
                    + (f": --arm NAME={self.given[name]}" if name in self.given else "")
                )
        unmade = [n for n in self.recipes if n in self.given or n in (arms.RAW, arms.BASE)]
        if unmade:
            why = "was made before" if unmade[0] in self.given else "is not made by a recipe"
            raise TamisError(f"--recipe {unmade[0]}:...: this arm {why}; choose another name")
        taken = [n for n in (arms.RAW, arms.BASE) if n in self.given]
        if taken:
            raise TamisError(f"--arm {taken[0]}=...: this name means something else; choose another")
        first = [n for n in self.main if n in made or n in self.given]
        return tuple(dict.fromkeys([*first, *self.given, *made]))

    def is_main(self, arm: str) -> bool:
        """Whether an arm is among those worked on first, with all seeds."""
        return arm in self.main

    def arm_seeds(self, arm: str) -> tuple[int, ...]:
        """Training seeds of an arm; of the untrained model those it is sampled with."""
        if arm == arms.BASE:
            return (self.other_seeds or self.seeds)[:1]
        return self.seeds if self.is_main(arm) or self.other_seeds is None else self.other_seeds

    def arm_recipe(self, arm: str) -> dict[str, Any]:
        """Detox settings of an arm made here, without places.

        Raises:
            TamisError: There is no such arm.
        """
        own = self.recipes.get(arm, {})
        shared = arms.merge({"gate": {"tau": self.tau}}, self.detox)
        if arm in arms.NAMES:
            base = arms.recipe(
                arm, tau=self.tau, sentence_tau=self.sentence_tau, mask=self.mask, shared=shared
            )
        else:
            base = shared
        settings = arms.merge(base, own)
        for name, value in (
            ("scorer", self.scorer),
            ("scorer_extra", self.scorer_options),
            ("lexicon", self.lexicon),
            ("text_column", self.text_column),
            ("id_column", self.id_column),
        ):
            settings.setdefault(name, value)
        return settings
