"""Planning: everything that can go wrong is found before a minute of work, and every input gets its fingerprint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.compare import arms
from pipelines.compare.config import CompareConfig
from pipelines.compare.plan import Facts
from schemas.errors import InputError, TamisError
from schemas.fingerprint import fingerprint

if TYPE_CHECKING:
    from models.protocols import ModelInfo
    from pipelines.detox import DetoxConfig


def find_facts(config: CompareConfig) -> Facts:
    """Look at every input and every model; no weights are loaded.

    Raises:
        InputError: An input is missing, has no such column, or there are not enough prompts.
        ModelError: A model cannot be had.
        TamisError: The judge is the ranker; an arm cannot be made.
    """
    from pipelines.compare.prompts import find_prompts, prompts_fingerprint
    from pipelines.evaluation.tables import read_table

    names = config.arm_names()
    made = [a for a in names if arms.is_made(a) and a not in config.given]
    _check(config, made)
    _check_cleanable(config.raw, made)
    raw = read_table(config.raw)
    texts = [t for t in raw.texts(config.text_column) if t]
    if not texts:
        raise InputError(f"{config.raw}: column '{config.text_column}' holds no text")
    corpora = {"raw": _fingerprint(config.raw)}
    for name, source in config.given.items():
        read_table(source).texts(config.text_column)
        corpora[f"given:{name}"] = _fingerprint(source)
    prompts = find_prompts(config)
    if config.prompts is not None:
        corpora["prompts"] = _fingerprint(config.prompts)
    elif config.held_out is not None:
        corpora["held_out"] = _fingerprint(config.held_out)
        corpora["made_prompts"] = prompts_fingerprint(prompts)
    neutral = 0
    if config.neutral is not None:
        neutral = sum(len(t) for t in read_table(config.neutral).texts(config.neutral_column) if t)
        corpora["neutral"] = _fingerprint(config.neutral)
    if any(arms.is_contrastive(config.arm_recipe(a)) for a in made):
        if config.toxic.adapter is not None:
            corpora["toxic_adapter"] = _adapter_fingerprint(Path(config.toxic.adapter))
        else:
            if config.toxic.data is not None:
                _check_trainable(config.toxic.data, config.text_column)
            corpora["toxic"] = _fingerprint(config.toxic.data or config.raw)
    revisions, verdict = _revisions(config, made)
    return Facts(corpora, revisions, len(raw), sum(map(len, texts)), len(prompts), neutral, verdict)


def _check(config: CompareConfig, made: list[str]) -> None:
    """What can be told wrong from the settings alone.

    Raises:
        TamisError: It is.
    """
    _check_names(config)
    if "://" in config.output:
        raise TamisError(f"--output {config.output}: models are trained in it, so it must be a local folder")
    _check_apart(config)
    if config.prompts is None and config.held_out is None:
        raise InputError(
            "the models need prompts: pass --prompts FILE, or --held-out FILE (toxic rows no arm is trained on)"
        )
    if config.prompts is not None and config.held_out is not None:
        raise InputError("--prompts and --held-out exclude each other: pass one of them")
    if not config.judge:
        raise TamisError("pass --judge NAME: a scorer other than the one that ranks (`tamis models list`)")
    from pipelines import detox

    places = {"input": config.raw, "output": config.output}
    shared = detox.make_config({**config.detox, **places})
    for arm in made:  # settings that the detox job does not know are found here
        job = detox.make_config({**config.arm_recipe(arm), **places})
        if arms.is_contrastive(config.arm_recipe(arm)):
            _check_toxic(config, arm, job, shared)


def _check_apart(config: CompareConfig) -> None:
    """Refuse an output within an input: what is written would be read as a part of it, by the next stage already.

    Raises:
        TamisError: It lies there, where shards are looked for.
    """
    output = Path(config.output).resolve()
    for source in (
        config.raw, *config.given.values(), config.toxic.data, config.held_out, config.prompts, config.neutral
    ):  # fmt: skip
        folder = Path(source or "").resolve()
        # Of an output of tamis only what its manifest names is read.
        if not source or not output.is_relative_to(folder) or (folder / "manifest.json").exists():
            continue
        if not any(part.startswith((".", "_")) for part in output.relative_to(folder).parts):
            raise TamisError(
                f"--output {config.output} lies in {source}, which is read; choose a folder outside it"
            )


def _check_toxic(config: CompareConfig, arm: str, job: DetoxConfig, shared: DetoxConfig) -> None:
    """Refuse a contrastive arm that the toxic model of all of them does not fit.

    Raises:
        TamisError: It names one of its own, or rewrites with another model than that is made of.
    """
    if job.decoding.toxic or job.decoding.toxic_adapter not in (None, config.toxic.adapter):
        raise TamisError(
            f"the arm {arm} names a toxic model, but the contrastive arms share one: pass --toxic-adapter instead of "
            "decoding.toxic_adapter and decoding.toxic"
        )
    # On top of the rewriter's adapter it lies only in some of the layers; else the base is all that counts.
    adapters = {job.adapter_name, shared.adapter_name} if config.toxic.layers else set()
    if config.toxic.adapter is None and (job.model != shared.model or len(adapters) > 1):
        raise TamisError(
            f"the arm {arm} rewrites with another model than the toxic one is made of ({shared.model}), which the "
            "contrastive arms share: pass --set model=NAME for all of them, or --toxic-adapter"
        )


def _check_names(config: CompareConfig) -> None:
    """Refuse names of arms that are not in the comparison; a default may name one that is not made this time.

    Raises:
        TamisError: There is such a name.
    """
    names = config.arm_names()
    shown = tuple(n for n in names if n not in (arms.RAW, arms.BASE))
    for option, told, known in (
        ("main", config.main, names),
        ("focus", (config.focus,), shown),
        ("baseline", (config.baseline,), names),
    ):
        if getattr(config, option) == CompareConfig.model_fields[option].default:
            continue
        unknown = [n for n in told if n not in known]
        if unknown:
            raise TamisError(
                f"--{option} {unknown[0]}: there is no such arm; there are {', '.join(known) or 'none'}"
            )


def _check_cleanable(raw: str, made: list[str]) -> None:
    """Refuse a raw corpus that can be trained on, but that the detox job does not read.

    Raises:
        InputError: It is one, and there are arms to make of it.
    """
    if made and _is_table(raw) and Path(raw).exists():
        raise InputError(
            f"{raw}: the arm {made[0]} is made by `tamis detox`, which reads Parquet, JSONL and Arrow; store the corpus as "
            "one of these, or make no arms of it (--make raw)"
        )


def _check_trainable(source: str, column: str) -> None:
    """Look at the first rows of what is trained on.

    Raises:
        InputError: There are none, or they have no such column.
    """
    from models.training.shards import ShardReader, list_shards

    if next(iter(ShardReader(list_shards(source), [column], batch_rows=1)), None) is None:
        raise InputError(f"{source} holds no rows")


def _is_table(source: str) -> bool:
    return Path(source).suffix.lower() in {".csv", ".tsv"}


def _revisions(config: CompareConfig, made: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Tags of the models by role, and what was found of the judge."""
    from models import registry
    from models.lineage import lineage_rankers
    from models.scorers.judging import check_judge

    judge = registry.describe("scorer", config.judge, **config.judge_options)
    found = {"judge": judge.tag, "base": registry.describe("lm", config.model).tag}
    rankers: list[ModelInfo] = []
    rewriters: dict[str, str] = {}
    for arm in made:
        recipe = config.arm_recipe(arm)
        own = {i.tag: i for i in _rankers(recipe)}
        found[f"scorer:{arm}"] = ", ".join(sorted(own))
        rankers += own.values()
        if _rewrites(recipe):
            rewriters[f"rewriter:{arm}"] = _rewriter(recipe)
    found["scorer"] = ", ".join(sorted({i.tag for i in rankers}))
    rankers += lineage_rankers([config.raw, *config.given.values()])
    verdict = check_judge(judge, rankers, config.allow_shared_judge)
    if config.reference != "none":
        found["reference"] = registry.describe("lm", config.reference).tag
    if rewriters:
        found |= rewriters
        found["rewriter"] = ", ".join(sorted(set(rewriters.values())))
    if config.toxic.adapter is None and any(arms.is_contrastive(config.arm_recipe(a)) for a in made):
        found["rewriter:"] = _rewriter(config.detox)
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
    if _is_table(source) and path.is_file():
        return fingerprint(path.name, path.read_bytes())
    listing = list_shards(source)
    parts = [part for s in listing.shards for part in (s.name, shard_fingerprint(s, listing.options))]
    return fingerprint(*parts)


def _adapter_fingerprint(folder: Path) -> str:
    from models.lm.folder import ADAPTER_WEIGHTS, find_adapter, weight_files

    files = weight_files(find_adapter(folder), ADAPTER_WEIGHTS)
    return fingerprint(*[part for f in files for part in (f.name, f.read_bytes())])
