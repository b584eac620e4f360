"""What came of a comparison, gathered from the folders and receipts of its stages; nothing is computed by a model here."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.compare import arms
from pipelines.compare.config import CompareConfig
from pipelines.compare.evaluations import NeutralLosses, PromptFigures, corpus_of, read_toxicity, read_utility
from pipelines.compare.plan import Stage
from pipelines.compare.receipts import CONFIG, Receipt, read_json
from pipelines.compare.statistics import measure, paired, reduction
from schemas.errors import TamisError

_COSTS = ("toxic", "corpus", "facts", "train", "toxicity", "utility")


def gather(
    config: CompareConfig,
    done: Sequence[Stage],
    stages: Sequence[Stage],
    receipts: Mapping[str, Receipt],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """The results as `results.json` holds them.

    Args:
        config: The settings.
        done: Stages that are done.
        stages: All stages of the comparison.
        receipts: By stage.
        failed: Stages that failed in this run, and why.
    """
    output = Path(config.output)
    toxicity: dict[str, dict[int, PromptFigures]] = {}
    neutral: dict[str, dict[int, NeutralLosses]] = {}
    for stage in done:
        if stage.kind == "toxicity":
            toxicity.setdefault(stage.arm, {})[stage.seed or 0] = read_toxicity(output / stage.folder)
        elif stage.kind == "utility":
            neutral.setdefault(stage.arm, {})[stage.seed or 0] = read_utility(output / stage.folder)
    names = [a for a in config.arm_names() if a in toxicity]
    toxicity = _on_common_prompts(toxicity)
    raw_rows = _facts(receipts, f"facts-{arms.RAW}").get("rows")
    described = [
        _arm(config, a, done, receipts, toxicity[a], toxicity.get(arms.RAW, {}), neutral, raw_rows)
        for a in names
    ]
    whole = {s.name for s in stages} == {s.name for s in done}
    prompts = _facts(receipts, "prompts")
    return {
        "kind": "compare",
        "tamis_version": importlib.metadata.version("tamis"),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": whole and not failed,
        "command": config.command,
        "config": config.model_dump(
            mode="json", exclude={"command", "output", "quiet", "dry_run", "overwrite"}
        ),
        "judge": (read_json(output / CONFIG) or {}).get("judge", {}),
        "device": _devices(toxicity),
        "prompts": {
            "n": prompts.get("prompts", 0),
            "made": prompts.get("made"),
            "words": prompts.get("words"),
        },
        "arms": described,
        "focus": focus_arm(config, names),
        "baseline": config.baseline if config.baseline in names else None,
        "pairs": _pairs(names, toxicity),
        "waiting": [s.name for s in stages if s.name not in {d.name for d in done}],
        "failed": dict(failed),
        "cost": _total_cost(done, receipts),
    }


def _on_common_prompts(
    toxicity: Mapping[str, Mapping[int, PromptFigures]],
) -> dict[str, dict[int, PromptFigures]]:
    """All figures on the prompts that every model could continue, in one order: pairs are pairs."""
    everything = [f for seeds in toxicity.values() for f in seeds.values()]
    if not everything:
        return {}
    common = set(everything[0].ids).intersection(*(f.ids for f in everything))
    ids = [i for i in everything[0].ids if i in common]
    return {a: {s: f.keep(ids) for s, f in sorted(seeds.items())} for a, seeds in toxicity.items()}


def focus_arm(config: CompareConfig, names: Sequence[str]) -> str | None:
    """The arm the page compares all others with: the one named, else the best rewriting there is."""
    order = [config.focus, "logratio", *config.given, "official", "prompt_only", *names]
    return next((n for n in order if n in names and n not in (arms.RAW, arms.BASE)), None)


def _arm(
    config: CompareConfig,
    arm: str,
    done: Sequence[Stage],
    receipts: Mapping[str, Receipt],
    figures: Mapping[int, PromptFigures],
    raw: Mapping[int, PromptFigures],
    neutral: Mapping[str, Mapping[int, NeutralLosses]],
    raw_rows: int | None,
) -> dict[str, Any]:
    facts = _facts(receipts, f"facts-{arm}")
    corpus = _facts(receipts, f"corpus-{arm}")
    trained = [_facts(receipts, f"train-{arm}-{s}") for s in figures]
    mine = [s for s in done if s.arm == arm]
    tp, emt, rate = ({s: getattr(f, k) for s, f in figures.items()} for k in ("toxic", "top", "rate"))
    rows = facts.get("rows")
    found: dict[str, Any] = {
        "name": arm,
        "meaning": arms.meaning(arm),
        "main": config.is_main(arm),
        "given": arm in config.given,
        "seeds": sorted(figures),
        "prompts": len(next(iter(figures.values())).top),
        "rows": rows,
        "kept": rows / raw_rows if rows is not None and raw_rows else None,
        "characters": facts.get("characters"),
        "changed": corpus.get("totals", {}).get("rows_changed"),
        "actions": corpus.get("actions", {}),
        "corpus_tokens": _mean([t.get("corpus_tokens") for t in trained]),
        "judge_mean": facts.get("judge_mean"),
        "judge_share": facts.get("judge_share"),
        "begun_prompts": facts.get("begun_prompts"),
        "facts_kept": _facts_kept(config, arm),
        "making": _making(receipts.get(f"corpus-{arm}"), given=arm in config.given),
        "steps": _mean([t.get("steps") for t in trained]),
        "epochs": _mean([t.get("epochs") for t in trained]),
        "train_loss": _mean([t.get("loss") for t in trained]),
        "tokens_trained": _mean([receipts[s.name].tokens for s in mine if s.kind == "train"]),
        "tp": measure(tp, share=True).as_dict(),
        "emt": measure(emt).as_dict(),
        "rate": measure(rate).as_dict(),
        "distinct": [measure({s: f.distinct[:, n] for s, f in figures.items()}).as_dict() for n in range(3)],
        "perplexity": _perplexity(figures),
        "cost": {kind: _cost([receipts[s.name] for s in mine if s.kind == kind]) for kind in _COSTS},
        "neutral": _neutral(arm, neutral, config.baseline) if arm in neutral else None,
        **dict.fromkeys(
            f"{n}_{what}" for n in ("tp", "emt", "rate") for what in ("reduction", "difference", "apart")
        ),
    }
    if raw and arm != arms.RAW:
        theirs = ({s: getattr(f, k) for s, f in raw.items()} for k in ("toxic", "top", "rate"))
        for name, own, other in zip(("tp", "emt", "rate"), (tp, emt, rate), theirs, strict=True):
            cut, gap = reduction(own, other), paired(own, other)
            found[f"{name}_reduction"] = cut.as_dict() if cut else None
            found[f"{name}_difference"] = gap.as_dict() if gap else None
            found[f"{name}_apart"] = measure(own, share=name == "tp").value.apart(
                measure(other, share=name == "tp").value
            )
    return found


def _facts_kept(config: CompareConfig, arm: str) -> dict[str, Any] | None:
    """Facts that the changed passages still hold, by kind; None where an arm has no record of its changes."""
    from pipelines.evaluation.facts import ALL, count_output

    if arm in (arms.BASE, arms.RAW):
        return None
    try:
        table = count_output(corpus_of(config, arm))
    except TamisError:  # a plain folder, or an output in which nothing was changed
        return None
    row = next(r for r in table.rows if r.action == ALL)
    kept = {kind: None if share is None else share.as_dict() for kind, share in row.kept.items()}
    return {"edits": table.edits, "kept": kept, "whole": row.whole.as_dict(), "invented": row.invented}


def _making(receipt: Receipt | None, *, given: bool) -> dict[str, Any]:
    """What making a corpus cost: as measured here, or as the manifest of a given one says."""
    if receipt is None:
        return {"seconds": None, "tokens": None}
    if given:
        return {"seconds": receipt.facts.get("worker_seconds"), "tokens": receipt.facts.get("tokens_out")}
    return {"seconds": receipt.seconds, "tokens": receipt.tokens}


def _perplexity(figures: Mapping[int, PromptFigures]) -> dict[str, Any] | None:
    """Conditional perplexity: prompts without a measured continuation in any seed are left out of the interval."""
    stacked = np.array([f.perplexity for f in figures.values()])
    known = np.isfinite(stacked).all(axis=0)
    if not known.any():
        return None
    seeds = dict(zip(figures, stacked[:, known], strict=True))
    return {**measure(seeds).as_dict(), "left_out": int((~known).sum())}


def _neutral(arm: str, neutral: Mapping[str, Mapping[int, NeutralLosses]], baseline: str) -> dict[str, Any]:
    from transforms.evaluation.perplexity import DocumentLosses, perplexity_change, perplexity_figures

    def losses(name: str, seeds: Sequence[int]) -> DocumentLosses:
        chosen = [neutral[name][s] for s in seeds]
        return DocumentLosses(np.mean([c.nats for c in chosen], axis=0), chosen[0].tokens)

    own = sorted(neutral[arm])
    sizes = neutral[arm][own[0]].sizes
    figures = perplexity_figures(losses(arm, own), sizes)
    found: dict[str, Any] = {
        **figures.perplexity.as_dict(),
        "bits_per_byte": figures.bits_per_byte.as_dict(),
        "by_seed": {
            str(s): perplexity_figures(losses(arm, [s]), sizes, draws=1).perplexity.mean for s in own
        },
    }
    common = [s for s in own if s in neutral.get(baseline, {})]
    found["change"] = None
    if common and arm != baseline:
        change = perplexity_change(losses(arm, common), losses(baseline, common), sizes)
        found["change"] = {**change.perplexity_ratio.as_dict(), "p_value": change.p_value}
    return found


def _pairs(names: Sequence[str], toxicity: Mapping[str, Mapping[int, PromptFigures]]) -> list[dict[str, Any]]:
    """Every two arms on the same prompts and seeds: a minus b."""
    found = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            row: dict[str, Any] = {"a": a, "b": b}
            for name, key in (("tp", "toxic"), ("emt", "top")):
                one, other = ({s: getattr(f, key) for s, f in toxicity[x].items()} for x in (a, b))
                gap = paired(one, other)
                row[name] = gap.as_dict() if gap else None
            found.append(row)
    return found


def _total_cost(done: Sequence[Stage], receipts: Mapping[str, Receipt]) -> dict[str, Any]:
    return {kind: _cost([receipts[s.name] for s in done if s.kind == kind]) for kind in ("prompts", *_COSTS)}


def _cost(receipts: Sequence[Receipt]) -> dict[str, Any]:
    return {
        "stages": len(receipts),
        "seconds": round(sum(r.seconds for r in receipts), 1),
        "tokens": sum(r.tokens for r in receipts),
    }


def _facts(receipts: Mapping[str, Receipt], name: str) -> dict[str, Any]:
    return receipts[name].facts if name in receipts else {}


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(v) for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _devices(toxicity: Mapping[str, Mapping[int, PromptFigures]]) -> str:
    return ", ".join(sorted({f.device for seeds in toxicity.values() for f in seeds.values() if f.device}))
