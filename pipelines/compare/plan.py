"""The stages of a comparison: what depends on what, in which order, under which key, at what cost.

A stage's key is a hash of its settings and of the keys of what it builds on, down to the bytes of the corpora and the
revisions of the models. A stage whose receipt bears its key is done, whatever else has changed; so is one that bears the
key an earlier tamis gave the same work.

    OUT/compare.json            the settings
    OUT/stages/NAME.json        receipts
    OUT/prompts/                prompts.parquet
    OUT/toxic/                  the toxic adapter
    OUT/arms/ARM/               the corpus, an output of `tamis detox`
    OUT/models/ARM-SEED/        the model
    OUT/toxicity/ARM-SEED/      an output of `tamis eval toxicity`
    OUT/utility/ARM-SEED/       an output of `tamis eval utility`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.compare import arms
from pipelines.compare.config import CompareConfig
from schemas.errors import TamisError
from schemas.fingerprint import config_hash

KINDS = ("prompts", "toxic", "corpus", "facts", "train", "toxicity", "utility")
STAGES = "stages"
# Tokens a second of one core where nothing has been measured yet (the embedded 135M model in bfloat16).
RATES = {
    "toxic": 120.0,
    "train": 100.0,
    "toxicity": 300.0,
    "utility": 600.0,
    "plain": 170.0,
    "steered": 100.0,
}
_CHARS_PER_TOKEN = 4.2
_START_SECONDS = 10.0  # of a process: libraries and models
_CANDIDATE_LENGTH = 0.9  # tokens of a candidate over those of its source


@dataclass(frozen=True)
class Stage:
    """One unit of work, with a receipt of its own.

    Attributes:
        name: `KIND[-ARM[-SEED]]`.
        kind: One of `KINDS`.
        key: Hash of all that decides its result.
        needs: Names of the stages it builds on.
        arm: Whose it is; empty for shared ones.
        seed: Training seed, where there is one.
        rank: The lower, the sooner.
        tokens: What it will train on, write or read, about; 0 = next to nothing.
        pace: Key in `RATES`.
        former: The key an earlier tamis gave the same work; empty where it is the same one.
    """

    name: str
    kind: str
    key: str
    needs: tuple[str, ...] = ()
    arm: str = ""
    seed: int | None = None
    rank: tuple[int, ...] = (0,)
    tokens: int = 0
    pace: str = ""
    former: str = ""

    def bears(self, key: str | None) -> bool:
        """Whether a key, as a receipt holds it, stands for this work."""
        return bool(key) and key in (self.key, self.former)

    @property
    def folder(self) -> str:
        """Where its result lies, relative to the output (of `facts`: in its receipt alone)."""
        if self.kind in {"prompts", "toxic"}:
            return self.kind
        if self.kind == "corpus":
            return f"arms/{self.arm}"
        return f"{'models' if self.kind == 'train' else self.kind}/{self.arm}-{self.seed}"

    @property
    def receipt(self) -> str:
        """Its receipt, relative to the output."""
        return f"{STAGES}/{self.name}.json"


@dataclass(frozen=True)
class Facts:
    """What planning found out about the inputs and the models.

    Attributes:
        corpora: Fingerprint of each input by its role (`raw`, `given:NAME`, `held_out`, `prompts`, `neutral`, `toxic`), and
            of the prompts made (`made_prompts`).
        revisions: Tag of each model by its role (`judge`, `base`, `reference`; `scorer:ARM` and `rewriter:ARM` are an arm's
            own, `rewriter:` is the one all arms share, `scorer` and `rewriter` are those of all arms).
        rows: Rows of the raw corpus.
        characters: Characters of its text.
        prompts: Number of prompts.
        neutral_characters: Characters of the neutral text.
        verdict: Whether the judge is independent of the rankers (`models.scorers.judging.Verdict`).
    """

    corpora: Mapping[str, str]
    revisions: Mapping[str, str]
    rows: int = 0
    characters: int = 0
    prompts: int = 0
    neutral_characters: int = 0
    verdict: Mapping[str, Any] = field(default_factory=dict)


def build_stages(config: CompareConfig, facts: Facts) -> list[Stage]:
    """All stages of a comparison, first things first.

    Raises:
        TamisError: An arm cannot be made of what was given.
    """
    return _Builder(config, facts).build()


class _Builder:
    def __init__(self, config: CompareConfig, facts: Facts) -> None:
        self.config, self.facts = config, facts
        self.stages: list[Stage] = []
        self.raw_tokens = int(facts.characters / _CHARS_PER_TOKEN)

    def build(self) -> list[Stage]:
        config = self.config
        names = config.arm_names()
        if config.only:
            unknown = [a for a in config.only if a not in names]
            if unknown:
                raise TamisError(f"--arms {unknown[0]}: there is no such arm; there are {', '.join(names)}")
        self._prompts()
        if any(self._needs_toxic(a) for a in names):
            self._toxic()
        runs = [(a, s) for a in names for s in config.arm_seeds(a)]
        # The main arms with every seed first, by seed; then the others, by seed.
        places = {run: self._rank(names, *run) for run in runs}
        for arm in names:
            rank = min(places[run] for run in runs if run[0] == arm)
            if arm != arms.BASE:
                self._corpus(arm, rank)
            for seed in config.arm_seeds(arm):
                self._model(arm, seed, places[arm, seed])
        first = {a: min(s.rank for s in self.stages if s.arm == a) for a in names}
        toxic = [s for s in self.stages if s.kind == "toxic"]
        for stage in toxic:  # as early as the first corpus that waits for it
            rank = min(first[a] for a in names if self._needs_toxic(a))
            self.stages[self.stages.index(stage)] = replace(stage, rank=(*rank[:-1], -1))
        return sorted(self.stages, key=lambda s: s.rank)

    def _rank(self, names: Sequence[str], arm: str, seed: int) -> tuple[int, ...]:
        seeds = self.config.arm_seeds(arm)
        return (0 if self.config.is_main(arm) else 1, seeds.index(seed), names.index(arm))

    def _prompts(self) -> None:
        c, f = self.config, self.facts
        former: dict[str, Any] | None = None
        if c.prompts is not None:
            parts: dict[str, Any] = {"file": f.corpora["prompts"]}
            # It came later: prompts without groups are those they were.
            parts |= {"group": c.group_column} if c.group_column is not None else {}
        else:
            whole = {r: k for r, k in f.corpora.items() if r == "raw" or r.startswith("given:")}
            parts = {
                "held_out": f.corpora["held_out"],
                "columns": [c.held_out_column, c.group_column],
                "count": c.make_prompts,
                "words": c.prompt_words,
                "made": f.corpora["made_prompts"],
            }
            # A corpus more changes them only if a prompt's row stands in it; once each was part of the key.
            former = {k: v for k, v in parts.items() if k != "made"} | {"corpora": whole}
        self._add("prompts", parts, former=former, rank=(-1,))

    def _toxic(self) -> None:
        c, f = self.config, self.facts
        if c.toxic.adapter is not None:
            return
        parts = {
            "data": f.corpora["toxic"],
            "base": f.revisions["rewriter:"],
            "text_column": c.text_column,
            # A setting that came later counts only where it is used: what was trained before it is found again.
            "settings": c.toxic.model_dump(
                exclude={"data", "adapter", *(() if c.toxic.layers else ("layers",))}
            ),
        }
        # The rewriters of all arms once stood here: that was this work only if its own was among them.
        all_arms = f.revisions.get("rewriter", "")
        former = {**parts, "base": all_arms} if parts["base"] in all_arms.split(", ") else None
        self._add("toxic", parts, former=former, tokens=c.toxic.tokens, pace="toxic")

    def _needs_toxic(self, arm: str) -> bool:
        c = self.config
        return arms.is_made(arm) and arm not in c.given and arms.is_contrastive(c.arm_recipe(arm))

    def _corpus(self, arm: str, rank: tuple[int, ...]) -> None:
        c, f = self.config, self.facts
        parts: dict[str, Any] = {"text_column": c.text_column, "raw": f.corpora["raw"]}
        former: dict[str, Any] = {}
        needs: tuple[str, ...] = ()
        tokens, pace = 0, ""
        if arm in c.given:
            parts["given"] = f.corpora[f"given:{arm}"]
        elif arm != arms.RAW:
            recipe = c.arm_recipe(arm)
            parts["recipe"] = recipe
            # Its own models alone: those of another arm decide nothing here. They once were part of the key.
            roles = ("scorer", "rewriter")
            parts["revisions"] = {r: tag for r in roles if (tag := f.revisions.get(f"{r}:{arm}"))}
            former["revisions"] = {r: f.revisions[r] for r in roles if r in f.revisions}
            tokens, pace = self._decoding(recipe)
            if self._needs_toxic(arm):
                if c.toxic.adapter is None:
                    needs = ("toxic",)
                else:
                    parts["toxic"] = f.corpora["toxic_adapter"]
        self._add(
            "corpus", parts, former={**parts, **former}, needs=needs, arm=arm, rank=(*rank, 0), tokens=tokens, pace=pace
        )  # fmt: skip
        parts = {"judge": f.revisions["judge"], "options": c.judge_options, "base": f.revisions["base"]}
        self._add("facts", parts, needs=("prompts", f"corpus-{arm}"), arm=arm, rank=(*rank, 4))

    def _decoding(self, recipe: Mapping[str, Any]) -> tuple[int, str]:
        """Tokens a rewriting arm will write at most, and at which pace; nothing for a filter."""
        ladder = (recipe.get("accept") or {}).get("ladder", ["candidate"])
        if "candidate" not in ladder and "span_edit" not in ladder:
            return 0, ""
        sampling = (recipe.get("rewrite") or {}).get("sampling") or {}
        count = len(sampling.get("temperatures", range(5))) * int(sampling.get("per_temperature", 2))
        steered = arms.is_contrastive(recipe)
        return int(self.raw_tokens * count * _CANDIDATE_LENGTH), "steered" if steered else "plain"

    def _model(self, arm: str, seed: int, rank: tuple[int, ...]) -> None:
        c, f = self.config, self.facts
        train: tuple[str, ...] = ()
        parts: dict[str, Any] = {"base": f.revisions["base"]}
        if arm != arms.BASE:
            train = (f"train-{arm}-{seed}",)
            parts |= {"settings": c.train.model_dump(), "seed": seed}
            self._add(
                "train", parts, needs=(f"corpus-{arm}",), arm=arm, seed=seed, rank=(*rank, 1), tokens=c.train.tokens,
                pace="train",
            )  # fmt: skip
        parts = {
            "base": f.revisions["base"],
            "judge": f.revisions["judge"],
            "reference": f.revisions.get("reference", ""),
            "options": c.judge_options,
            "samples": c.samples,
            "new_tokens": c.new_tokens,
            "seed": c.sample_seed + seed,
            "more": c.toxicity,
        }
        self._add(
            "toxicity", parts, needs=("prompts", *train), arm=arm, seed=seed, rank=(*rank, 2),
            tokens=f.prompts * c.samples * c.new_tokens, pace="toxicity",
        )  # fmt: skip
        if c.neutral is not None:
            parts = {
                "base": f.revisions["base"],
                "neutral": f.corpora["neutral"],
                "column": c.neutral_column,
                "more": c.utility,
            }
            self._add(
                "utility", parts, needs=train, arm=arm, seed=seed, rank=(*rank, 3),
                tokens=int(f.neutral_characters / _CHARS_PER_TOKEN), pace="utility",
            )  # fmt: skip

    def _add(
        self, kind: str, parts: Mapping[str, Any], *, former: Mapping[str, Any] | None = None,
        needs: tuple[str, ...] = (), arm: str = "", seed: int | None = None, rank: tuple[int, ...] = (0,),
        tokens: int = 0, pace: str = "",
    ) -> None:  # fmt: skip
        name = "-".join([kind, *([arm] if arm else []), *([str(seed)] if seed is not None else [])])
        below = [s for s in self.stages if s.name in needs]
        key = config_hash({"kind": kind, "parts": dict(parts), "needs": {s.name: s.key for s in below}})
        # What was done under former keys was done on top of such: they are made of each other all the way down.
        old = {s.name: s.former or s.key for s in below}
        before = config_hash({"kind": kind, "parts": dict(parts if former is None else former), "needs": old})
        self.stages.append(
            Stage(name, kind, key, needs, arm, seed, rank, tokens, pace, before if before != key else "")
        )


def wanted(stages: Sequence[Stage], config: CompareConfig) -> list[Stage]:
    """The stages `--stages` and `--arms` ask for, with all they build on.

    Raises:
        TamisError: There is no such kind of stage, or none of it here.
    """
    kinds = config.stages or KINDS
    unknown = [k for k in kinds if k not in KINDS]
    if unknown:
        raise TamisError(f"--stages {unknown[0]}: there are {', '.join(KINDS)}")
    none = [k for k in config.stages if not any(s.kind == k for s in stages)]
    if none:
        why = " (pass --neutral FILE)" if none[0] == "utility" else ""
        there = ", ".join(k for k in KINDS if any(s.kind == k for s in stages))
        raise TamisError(f"--stages {none[0]}: this comparison has none{why}; there are {there}")
    by_name = {s.name: s for s in stages}
    chosen: set[str] = set()
    # What is shared comes with what needs it, or when it is asked for by name.
    rest = [
        s.name
        for s in stages
        if s.kind in kinds and (s.arm in (config.only or [s.arm]) if s.arm else s.kind in config.stages)
    ]
    while rest:
        name = rest.pop()
        if name not in chosen:
            chosen.add(name)
            rest += by_name[name].needs
    if not chosen:
        raise TamisError(
            f"--arms {','.join(config.only)}: no stage of {','.join(kinds)} is theirs; ask for other --stages"
        )
    return [s for s in stages if s.name in chosen]


def seconds(stage: Stage, rates: Mapping[str, float] = RATES) -> float:
    """How long a stage takes one core, about."""
    return _START_SECONDS + (stage.tokens / rates[stage.pace] if stage.tokens else 0.0)
