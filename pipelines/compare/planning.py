"""Planning: everything that can go wrong is found before a minute of work, and every input gets its fingerprint."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.compare import arms
from pipelines.compare.config import CompareConfig
from pipelines.compare.plan import Facts
from schemas.errors import InputError, TamisError
from schemas.fingerprint import fingerprint

if TYPE_CHECKING:
    from models.protocols import ModelInfo


def find_facts(config: CompareConfig) -> Facts:
    """Look at every input and every model; no weights are loaded.

    Raises:
        InputError: An input is missing, has no such column, or there are no prompts.
        ModelError: A model cannot be had.
        TamisError: The judge is the ranker; an arm cannot be made.
    """
    from pipelines.compare.prompts import given_prompts, held_out_prompts
    from pipelines.evaluation.tables import read_table
    from transforms.shards.inputs import list_input

    names = config.arm_names()
    config.check_names()
    made = [a for a in names if arms.is_made(a) and a not in config.given]
    _check(config, made)
    raw = read_table(config.raw)
    texts = [t for t in raw.texts(config.text_column) if t]
    if not texts:
        raise InputError(f"{config.raw}: column '{config.text_column}' holds no text")
    if made:
        list_input(config.raw)  # the detox job makes them, and reads fewer formats than a training does
    corpora = {"raw": _fingerprint(config.raw)}
    for name, source in config.given.items():
        read_table(source).column(config.text_column)
        corpora[f"given:{name}"] = _fingerprint(source)
    prompts = config.make_prompts
    if config.prompts is not None:
        prompts = len(given_prompts(config.prompts, config.group_column, config.prompt_column))
        corpora["prompts"] = _fingerprint(config.prompts)
    else:
        corpora["held_out"] = _fingerprint(config.held_out)
        corpora["made"] = fingerprint(*(part for p in held_out_prompts(config) for part in astuple(p)))
    neutral = 0
    if config.neutral is not None:
        neutral = sum(len(t) for t in read_table(config.neutral).texts(config.neutral_column) if t)
        corpora["neutral"] = _fingerprint(config.neutral)
    if any(arms.is_contrastive(config.arm_recipe(a)) for a in made):
        if config.toxic.adapter is not None:
            corpora["toxic_adapter"] = _adapter_fingerprint(Path(config.toxic.adapter))
        else:
            corpora["toxic"] = _fingerprint(config.toxic.data or config.raw)
    revisions, verdict = _revisions(config, made)
    return Facts(corpora, revisions, len(raw), sum(map(len, texts)), prompts, neutral, verdict)


def _check(config: CompareConfig, made: list[str]) -> None:
    """What can be told wrong from the settings alone.

    Raises:
        TamisError: It is.
    """
    if "://" in config.output:
        raise TamisError(f"--output {config.output}: models are trained in it, so it must be a local folder")
    if config.prompts is None and config.held_out is None:
        raise InputError(
            "the models need prompts: pass --prompts FILE, or --held-out FILE (toxic rows no arm is trained on)"
        )
    if config.prompts is not None and config.held_out is not None:
        raise InputError("--prompts and --held-out exclude each other: pass one of them")
    if not config.judge:
        raise TamisError("pass --judge NAME: a scorer other than the one that ranks (`tamis models list`)")
    from pipelines import detox

    for arm in made:  # settings that the detox job does not know are found here
        detox.make_config({**config.arm_recipe(arm), "input": config.raw, "output": config.output})


def _revisions(config: CompareConfig, made: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Tags of the models by role, and what was found of the judge."""
    from models import registry
    from models.lineage import lineage_rankers
    from models.scorers.judging import check_judge

    judge = registry.describe("scorer", config.judge, **config.judge_options)
    found = {"judge": judge.tag, "base": registry.describe("lm", config.model).tag}
    recipes = [config.arm_recipe(a) for a in made]
    deciding = [_rankers(r) for r in recipes]
    for arm, infos in zip(made, deciding, strict=True):
        found[f"scorer:{arm}"] = ", ".join(sorted({i.tag for i in infos}))
    found["scorer"] = ", ".join(sorted({i.tag for infos in deciding for i in infos}))
    rankers = [info for infos in deciding for info in infos]
    rankers += lineage_rankers([config.raw, *config.given.values()])
    verdict = check_judge(judge, rankers, config.allow_shared_judge)
    if config.reference != "none":
        found["reference"] = registry.describe("lm", config.reference).tag
    rewriters = {arm: _rewriter(r) for arm, r in zip(made, recipes, strict=True) if _rewrites(r)}
    if rewriters:
        found |= {f"rewriter:{arm}": tag for arm, tag in rewriters.items()}
        found["rewriter"] = ", ".join(sorted(set(rewriters.values())))
    if any(arms.is_contrastive(r) for r in recipes):
        found["toxic"] = _rewriter(config.detox)
    return found, {**verdict.as_dict(), "note": verdict.note}


def _rankers(recipe: dict[str, Any]) -> list[ModelInfo]:
    """The scorers that decide in an arm."""
    from models import registry
    from models.lineage import GATE
    from pipelines.detox import DetoxConfig

    job = DetoxConfig.model_validate({**recipe, "input": "", "output": ""})
    infos = [registry.describe("scorer", job.scorer, **dict(job.scorer_options()))]
    if "lexicon" in job.localize.sources or job.gate.gate == "cascade":
        infos.append(registry.describe("scorer", job.lexicon))
    if job.gate.gate == "cascade" and job.linear != job.scorer:
        linear = registry.describe("scorer", job.linear)
        infos.append(replace(linear, extra={**linear.extra, "role": GATE}))
    return infos


def _rewriter(recipe: dict[str, Any]) -> str:
    """Tag of an arm's language model, its adapter included."""
    from models import registry
    from pipelines.detox import DetoxConfig

    job = DetoxConfig.model_validate({**recipe, "input": "", "output": ""})
    return registry.describe(
        "lm", job.model, **({"adapter": job.adapter_name} if job.adapter_name else {})
    ).tag


def _rewrites(recipe: dict[str, Any]) -> bool:
    ladder = (recipe.get("accept") or {}).get("ladder", ["candidate"])
    return "candidate" in ladder or "span_edit" in ladder


def _fingerprint(source: str) -> str:
    """Hash of every byte of an input's shards, and of their names."""
    from models.training.shards import list_shards, shard_fingerprint

    path = Path(source)
    if path.suffix.lower() in {".csv", ".tsv"} and path.is_file():
        return fingerprint(path.name, path.read_bytes())
    listing = list_shards(source)
    parts = [part for s in listing.shards for part in (s.name, shard_fingerprint(s, listing.options))]
    return fingerprint(*parts)


def _adapter_fingerprint(folder: Path) -> str:
    from models.lm.folder import ADAPTER_WEIGHTS, find_adapter, weight_files

    files = weight_files(find_adapter(folder), ADAPTER_WEIGHTS)
    return fingerprint(*[part for f in files for part in (f.name, f.read_bytes())])
