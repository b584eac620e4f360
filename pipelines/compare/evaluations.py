"""The two evaluations of a trained model, and how their results are read back: by prompt, and by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipelines.compare import arms
from pipelines.compare.config import CompareConfig
from pipelines.compare.plan import Stage
from pipelines.compare.receipts import read_json

Array = npt.NDArray[np.float64]
_ORDERS = (1, 2, 3)


@dataclass(frozen=True)
class PromptFigures:
    """What a model said, by prompt; figures of several sampling seeds are averaged.

    Attributes:
        ids: n prompts' ids.
        top: (n,) highest score among a prompt's continuations.
        toxic: (n,) whether any is over the threshold (a share, with several sampling seeds).
        distinct: (n, 3) distinct n-grams by word.
        perplexity: (n,) mean over continuations under the reference model; NaN where none was measured.
        rate: (n,) share of the continuations over the threshold.
        device: What it ran on.
    """

    ids: tuple[str, ...]
    top: Array
    toxic: Array
    distinct: Array
    perplexity: Array
    rate: Array
    device: str = ""

    def keep(self, ids: Sequence[str]) -> PromptFigures:
        """The prompts named, in that order."""
        place = {id_: i for i, id_ in enumerate(self.ids)}
        rows = np.array([place[i] for i in ids], np.int64)
        parts = (
            self.top[rows],
            self.toxic[rows],
            self.distinct[rows],
            self.perplexity[rows],
            self.rate[rows],
        )
        return PromptFigures(tuple(ids), *parts, self.device)


@dataclass(frozen=True)
class NeutralLosses:
    """What a model makes of the neutral text, by document.

    Attributes:
        nats: (n,) summed losses.
        tokens: (n,) tokens.
        sizes: (n,) UTF-8 bytes.
    """

    nats: Array
    tokens: Array
    sizes: Array


def measure_toxicity(config: CompareConfig, stage: Stage) -> tuple[int, dict[str, Any]]:
    """Sample and judge what a trained model says.

    Returns:
        Tokens written, and the figures in short.
    """
    from pipelines.eval_toxicity import make_config, run
    from pipelines.run import RunSettings

    output = Path(config.output)
    prompts = output / "prompts" / "prompts.parquet"
    settings: dict[str, Any] = {
        "models": [subject(config, stage)],
        "prompts": str(prompts),
        "prompt_column": "prompt",
        "output": str(output / stage.folder),
        "samples": config.samples,
        "new_tokens": config.new_tokens,
        "seeds": [config.sample_seed + (stage.seed or 0)],
        "judge": config.judge,
        "judge_options": config.judge_options,
        "allow_shared_judge": config.allow_shared_judge,
        "reference": config.reference,
        "device": config.device,
        "threads": 1,
    }
    if "group" in pq.read_schema(prompts).names:
        settings["group_column"] = "group"
    done = run(make_config({**settings, **config.toxicity}), RunSettings(progress="plain", overwrite=True))
    figures = next(iter(done.figures.values()))["all"]
    facts = {name: figures[name]["mean"] for name in ("tp", "emt")}
    written = config.samples * config.new_tokens * len(done.record["config"]["seeds"]) * figures["prompts"]
    return written, facts


def measure_utility(config: CompareConfig, stage: Stage) -> tuple[int, dict[str, Any]]:
    """Perplexity of the neutral text under a trained model.

    Returns:
        Tokens read, and the figure.
    """
    from pipelines.eval_utility import UtilityEvalConfig, run

    name, adapter = model_of(config, stage)
    settings: dict[str, Any] = {
        "output": str(Path(config.output) / stage.folder),
        "text": config.neutral,
        "text_column": config.neutral_column,
        "models": {"model": f"{name},adapter={adapter}" if adapter else name},
        "device": config.device,
        "threads": 1,
        "progress": "plain",
    }
    done = run(UtilityEvalConfig.model_validate({**settings, **config.utility}))
    found = done.record["perplexity"]["model"]
    return int(found["tokens"]), {"perplexity": found["perplexity"]["mean"]}


def corpus_of(config: CompareConfig, arm: str) -> str:
    """Where an arm's corpus is read from."""
    if arm == arms.RAW:
        return config.raw
    return config.given.get(arm) or str(Path(config.output) / "arms" / arm)


def model_of(config: CompareConfig, stage: Stage) -> tuple[str, str | None]:
    """The model a stage evaluates: name or folder, and adapter."""
    if stage.arm == arms.BASE:
        return config.model, None
    folder = str(Path(config.output) / "models" / f"{stage.arm}-{stage.seed}")
    return (config.model, folder) if config.train.lora else (folder, None)


def subject(config: CompareConfig, stage: Stage) -> str:
    """The same, as `tamis eval toxicity` takes it."""
    name, adapter = model_of(config, stage)
    return f"{stage.arm}={name}+{adapter}" if adapter else f"{stage.arm}={name}"


def read_toxicity(folder: Path) -> PromptFigures:
    """Figures by prompt of a finished `tamis eval toxicity`."""
    record = read_json(folder / "results.json") or {}
    told = record.get("config") or {}
    cap, threshold = float(told.get("max_perplexity", 1e4)), float(told.get("threshold", 0.5))
    columns = [
        "id",
        "seed",
        "any_toxic",
        "max_toxicity",
        "toxicity",
        "perplexity",
        *(f"dist{n}" for n in _ORDERS),
    ]
    rows = pq.read_table(folder / "continuations.parquet", columns=columns).to_pylist()
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_id.setdefault(row["id"], []).append(row)

    def mean(values: Sequence[float | None]) -> float:
        known = [v for v in values if v is not None and v < cap]
        return float(np.mean(known)) if known else float("nan")

    groups = list(by_id.values())
    return PromptFigures(
        tuple(by_id),
        np.array([np.mean([r["max_toxicity"] for r in g]) for g in groups], np.float64),
        np.array([np.mean([r["any_toxic"] for r in g]) for g in groups], np.float64),
        np.array([[np.mean([r[f"dist{n}"] for r in g]) for n in _ORDERS] for g in groups], np.float64),
        np.array([mean([p for r in g for p in r["perplexity"] or ()]) for g in groups], np.float64),
        np.array([np.mean([x > threshold for r in g for x in r["toxicity"]]) for g in groups], np.float64),
        str(record.get("device", "")),
    )


def read_utility(folder: Path) -> NeutralLosses:
    """Losses by document of a finished `tamis eval utility`."""
    table = pq.read_table(folder / "documents.parquet")
    names = ("model.nats", "model.tokens", "bytes")
    return NeutralLosses(*(table.column(n).to_numpy().astype(np.float64) for n in names))
