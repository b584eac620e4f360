"""What each stage does, in a process of its own: memory returns when it ends, and a kill costs one stage's progress.

    python -m pipelines.compare.work OUT STAGE

reads the settings in OUT/compare.json. Its standard input is a pipe the comparison holds: when that ends, however it
ends, the stage goes with it; it resumes where its job's own checkpoints allow.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.compare import arms
from pipelines.compare.config import CompareConfig
from pipelines.compare.evaluations import corpus_of
from pipelines.compare.plan import Stage
from pipelines.compare.receipts import Receipt, add_seconds, load_plan, seconds_before, write_receipt
from schemas.errors import InputError, TamisError

_SAVE_SECONDS = 5.0
Done = tuple[int, dict[str, Any]]  # tokens, facts


def run_stage(config: CompareConfig, stage: Stage) -> Receipt:
    """Do a stage, and write its receipt.

    Raises:
        TamisError: It cannot be done; nothing that was done before is lost.
    """
    output = Path(config.output)
    before = seconds_before(output, stage)
    clock = _Clock(output, stage, before)
    try:
        tokens, facts = _WORK[stage.kind](config, stage)
    finally:
        seconds = clock.stop()
    receipt = Receipt(stage.name, stage.key, round(seconds, 1), tokens, stage.pace, facts)
    write_receipt(output, receipt)
    return receipt


class _Clock:
    """Counts the seconds of a stage, and keeps them on disk, so that a killed attempt counts too."""

    def __init__(self, output: Path, stage: Stage, before: float) -> None:
        self._begun, self._before = time.monotonic(), before
        self._over = threading.Event()
        self._keep = lambda: add_seconds(output, stage, self.seconds())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begun

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return self.seconds()

    def _run(self) -> None:
        while not self._over.wait(_SAVE_SECONDS):
            self._keep()
        self._keep()


def _prompts(config: CompareConfig, stage: Stage) -> Done:
    from pipelines.compare.prompts import find_prompts, write_prompts

    prompts = find_prompts(config)
    write_prompts(Path(config.output) / stage.folder / "prompts.parquet", prompts)
    made = config.prompts is None
    return 0, {"prompts": len(prompts), "made": made, **({"words": config.prompt_words} if made else {})}


def _toxic(config: CompareConfig, stage: Stage) -> Done:
    from pipelines.detox import DetoxConfig
    from pipelines.toxic_model import placing

    toxic = config.toxic
    rewriter = DetoxConfig.model_validate({**config.detox, "input": config.raw, "output": config.output})
    record = _train(
        config,
        data=toxic.data or config.raw,
        model=rewriter.model,
        folder=stage.folder,
        tokens=toxic.tokens,
        lora=True,
        lora_r=toxic.lora_r,
        lora_alpha=toxic.lora_alpha,
        learning_rate=toxic.learning_rate,
        batch_size=1,
        seed=0,
        **placing(rewriter.adapter_name, toxic.layers),
    )
    return _trained(record)


def _model(config: CompareConfig, stage: Stage) -> Done:
    train = config.train
    record = _train(
        config,
        data=corpus_of(config, stage.arm),
        model=config.model,
        folder=stage.folder,
        tokens=train.tokens,
        lora=train.lora,
        lora_r=train.lora_r,
        lora_alpha=train.lora_alpha,
        learning_rate=train.rate,
        batch_size=train.batch_size,
        max_length=train.max_length,
        precision=train.precision,
        seed=stage.seed or 0,
    )
    return _trained(record)


def _train(config: CompareConfig, *, folder: str, tokens: int, **settings: Any) -> dict[str, Any]:
    from pipelines.train_lm import TrainLMConfig, run

    # Everything is trained on: what the models are measured with is held out beforehand.
    shared = {"eval_fraction": 0.0, "save_steps": 25, "keep_checkpoints": 1, "log_steps": 5, "threads": 1}
    options = {"precision": "bfloat16", "save_dtype": "bfloat16", **shared, **settings}
    if options["learning_rate"] is None:
        del options["learning_rate"]
    result = run(
        TrainLMConfig(
            output=str(Path(config.output) / folder),
            text_column=config.text_column,
            max_tokens=tokens,
            device="auto" if config.device == "auto" else "cuda" if "cuda" in config.device else "cpu",
            **options,
        )
    )
    assert result.record is not None
    return result.record


def _trained(record: dict[str, Any]) -> Done:
    results, run = record["results"], record["run"]
    facts = {
        "steps": run["steps"],
        "epochs": run["epochs"],
        "loss": results["train_loss"],
        "learning_rate": run["learning_rate"],
        "device": run["device"],
        "rows": record["data"]["counts"].get("examples", 0),
        "corpus_tokens": record["data"]["counts"].get("tokens", 0),
        "base": record["model"]["name"],
        "base_revision": record["model"]["revision"],
    }
    return int(results["tokens_seen"]), facts


def _corpus(config: CompareConfig, stage: Stage) -> Done:
    if stage.arm == arms.RAW or stage.arm in config.given:
        return 0, _manifest_facts(Path(corpus_of(config, stage.arm)))
    from pipelines import detox
    from pipelines.run import RunSettings

    recipe = config.arm_recipe(stage.arm)
    if arms.is_contrastive(recipe):
        adapter = config.toxic.adapter or str(Path(config.output) / "toxic")
        recipe = arms.merge(recipe, {"decoding": {"toxic_adapter": adapter}})
    target = Path(config.output) / stage.folder
    places = {"input": config.raw, "output": str(target), "threads": 1}
    places |= {} if config.device == "auto" else {"device": config.device}
    job = detox.make_config({**recipe, **places})
    result = detox.run(job, RunSettings(progress="plain", overwrite=True))
    if result.manifest is None:
        raise TamisError(f"the arm {stage.arm} ended {result.state}: {result.detail}")
    facts = _manifest_facts(target)
    return int(facts.get("tokens_out", 0)), facts


def _manifest_facts(folder: Path) -> dict[str, Any]:
    """What a tamis output's manifest says of an arm; nothing of a plain folder."""
    from pipelines.compare.receipts import read_json
    from pipelines.report.costs import token_counts

    manifest = read_json(folder / "manifest.json") if folder.is_dir() else None
    if manifest is None:
        return {}
    counters = manifest.get("counters", {})
    actions = ("rewrite", "span_edit", "redact", "drop_segment", "drop_document", "flag")
    work = sum(v for k, v in counters.items() if k.endswith(".ms")) / 1000
    return {
        "totals": manifest.get("totals", {}),
        "actions": {a: n for a in actions if (n := counters.get(f"accept.{a}", 0))},
        "tokens_out": token_counts(counters)["tokens_out"],
        "worker_seconds": round(work, 1),
        "config_hash": manifest.get("config_hash", ""),
        "models": [f"{m['name']}@{m['revision']}" for m in manifest.get("models", [])],
        "decoding": (manifest.get("config") or {}).get("decoding", {}).get("mode", ""),
    }


def _facts(config: CompareConfig, stage: Stage) -> Done:
    """Rows, words and tokens of an arm's corpus, and how toxic the judge finds it."""
    import numpy as np

    from models import registry
    from pipelines.compare.prompts import begun_by, content_hash
    from pipelines.evaluation.tables import read_table

    texts = [t or "" for t in read_table(corpus_of(config, stage.arm)).texts(config.text_column)]
    facts: dict[str, Any] = {"rows": len(texts), "characters": sum(map(len, texts))}
    scorer = registry.load("scorer", config.judge, **config.judge_options)
    scores = scorer.score(texts)[:, 0] if texts else np.zeros(0)
    facts |= {"judge_mean": float(scores.mean()), "judge_share": float((scores > 0.5).mean())}
    prompts = read_table(str(Path(config.output) / "prompts" / "prompts.parquet"))
    sources = set(prompts.texts("source"))
    facts["prompt_rows"] = len(sources & {content_hash(t) for t in texts})
    facts["begun_prompts"] = begun_by(texts, [p for p in prompts.texts("prompt") if p])
    if facts["prompt_rows"] and config.prompts is None:
        raise InputError(
            f"{facts['prompt_rows']} rows the prompts were made of stand in the corpus of {stage.arm}: they are not held out"
        )
    return 0, facts


def _toxicity(config: CompareConfig, stage: Stage) -> Done:
    from pipelines.compare.evaluations import measure_toxicity

    return measure_toxicity(config, stage)


def _utility(config: CompareConfig, stage: Stage) -> Done:
    from pipelines.compare.evaluations import measure_utility

    return measure_utility(config, stage)


_WORK = {
    "prompts": _prompts,
    "toxic": _toxic,
    "corpus": _corpus,
    "facts": _facts,
    "train": _model,
    "toxicity": _toxicity,
    "utility": _utility,
}


def _die_with_comparison() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)  # no clean-up on purpose: what is committed is whole


def main(argv: Sequence[str] | None = None) -> int:
    """Do one stage; the exit code is the error's, and the last line on stderr says what is wrong."""
    output, name = sys.argv[1:] if argv is None else argv
    threading.Thread(target=_die_with_comparison, daemon=True).start()
    try:
        config, stages = load_plan(Path(output))
        run_stage(config, next(s for s in stages if s.name == name))
    except TamisError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    # Classes pickle by their real module, not __main__.
    from pipelines.compare.work import main as imported_main

    sys.exit(imported_main())
