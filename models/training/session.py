"""One training run, from tokens to the saved folder; resumes what a killed run left.

    FOLDER/_tamis/tokens/        tokenised examples, until the model is saved
    FOLDER/_tamis/checkpoints/   whole checkpoints, until the model is saved
    FOLDER/...                   the model: `from_pretrained` loads it (an adapter: peft)
    FOLDER/train.json, README.md what was done; the model card
    FOLDER/_SUCCESS              written last

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import transformers

from models.lm.factors import stack_adapters
from models.training.card import model_card
from models.training.collate import BatchPlan, Collator
from models.training.data import DataForm, ExampleEncoder
from models.training.loading import (
    BaseModel,
    LoraSettings,
    add_lora,
    check_vocabulary,
    load_model,
    parameter_counts,
    save_trained,
)
from models.training.running import (
    last_evaluation,
    mean_loss,
    move_files,
    plain_errors,
    processes,
    set_threads,
    training_arguments,
    versions,
    warmup_steps,
)
from models.training.settings import TrainSettings
from models.training.shards import ShardListing, ShardReader
from models.training.tokens import TokenStore, build_store
from models.training.trainer import CausalTrainer, Progress, check_isolation, checkpoints, remove_partial
from schemas.errors import InputError, ModelError, TamisError

WORK = "_tamis"
RECORD, SUCCESS = "train.json", "_SUCCESS"
Emit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class TrainPlan:
    """What a run will do.

    Attributes:
        examples: Examples to train on.
        held_out: Examples evaluated on.
        tokens: Tokens of one epoch, as the rows hold them, without padding.
        loss_tokens: Tokens of the data that carry the loss.
        rows: Rows of one epoch.
        steps: Optimiser steps of the run.
        steps_per_epoch: Of one epoch.
        warmup: Steps of warm-up.
        packing: `off`, `isolated` or `concat`.
        prefix: Tokens of the prompt shared in a row; 0 = not shared.
        fill: Share of the batches' area that is not padding.
        counts: What encoding counted.
        seconds: Estimated time of the run; None where not measured.
    """

    examples: int
    held_out: int
    tokens: int
    loss_tokens: int
    rows: int
    steps: int
    steps_per_epoch: int
    warmup: int
    packing: str
    prefix: int
    fill: float
    counts: dict[str, int]
    seconds: float | None = None


@dataclass(frozen=True)
class Batches:
    """The data of a run: the tokens, and how they are batched."""

    store: TokenStore
    train: BatchPlan
    held_out: BatchPlan | None


@dataclass(frozen=True)
class Session:
    """A run's parts; nothing is written before `train`.

    Attributes:
        settings: How to train.
        listing: The shards.
        fingerprints: One per shard.
        form: How rows are read.
        base: What to start from.
        tokenizer: Its tokenizer.
        identity: Hash of everything the model depends on.
        command: For the model card.
        say: Called with each line for people.
        emit: Called with (kind, fields) for each event.
        below: Name and revision of the adapter the model has while it is trained; None where it has none.
    """

    settings: TrainSettings
    listing: ShardListing
    fingerprints: list[str]
    form: DataForm
    base: BaseModel
    tokenizer: Any
    identity: str
    command: str
    say: Callable[[str], None]
    emit: Emit
    below: dict[str, str] | None = None

    def plan(self, folder: Path) -> tuple[TrainPlan, Batches]:
        """Tokenise into `folder` (what has not been), and plan the batches.

        Raises:
            InputError: A shard cannot be read, or there is nothing to train on.
            TamisError: Settings that exclude each other.
        """
        settings = self.settings
        store = build_store(
            ShardReader(self.listing, self.form.columns),
            ExampleEncoder(self.tokenizer, self.form, settings.max_length),
            folder,
            fingerprints=self.fingerprints,
            key={"base": self.base.revision, "form": self.form.describe(), "max_length": settings.max_length},
            eval_fraction=settings.eval_fraction,
            notify=self.say,
        )
        packing, prefix = choose_packing(settings, self.form, store)
        shape = (settings.batch_size, settings.max_length, packing, prefix, settings.seed)
        train = BatchPlan(store.lengths, store.train, *shape)
        chosen = store.held_out[: settings.eval_limit]
        held_out = BatchPlan(store.lengths, chosen, *shape) if len(chosen) else None
        batches = train.batches(0)
        sizes = [[prefix + sum(p.stop - p.start for p in row) for row in batch] for batch in batches]
        tokens = sum(map(sum, sizes))
        per_epoch = math.ceil(len(batches) / (settings.accumulate * processes()))
        by_tokens = round(settings.max_tokens / tokens * per_epoch)
        by_epochs = math.ceil(settings.epochs * per_epoch)
        steps = settings.max_steps or max(1, by_tokens if settings.max_tokens else by_epochs)
        plan = TrainPlan(
            examples=len(store.train),
            held_out=len(chosen),
            tokens=tokens,
            loss_tokens=store.counts["loss_tokens"],
            rows=sum(map(len, batches)),
            steps=steps,
            steps_per_epoch=per_epoch,
            warmup=warmup_steps(settings.warmup, steps),
            packing=packing,
            prefix=prefix,
            fill=tokens / sum(max(batch) * len(batch) for batch in sizes),
            counts=dict(store.counts),
        )
        return plan, Batches(store, train, held_out)

    def estimate(self, plan: TrainPlan, batches: Batches) -> TrainPlan:
        """The plan with the seconds it will take: two batches are run forward and backward, and timed."""
        set_threads(self.settings.threads)
        planned = batches.train.batches(0)
        sample = [planned[len(planned) // 3], planned[2 * len(planned) // 3]]
        rates = []
        with tempfile.TemporaryDirectory(prefix="tamis-train-") as folder:
            trainer = self._trainer(plan, batches, Path(folder), None)
            model = trainer.model
            assert model is not None
            trainer._move_model_to_device(model, trainer.args.device)
            for batch in [sample[0], *sample]:  # the first one warms up
                inputs = trainer._prepare_inputs(trainer.collator(batch))
                began = time.monotonic()
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(model, inputs)
                loss.backward()
                tokens = int((inputs["segments"] >= 0).sum())  # waits for an accelerator
                rates.append(tokens / (time.monotonic() - began))
        rate = sum(rates[1:]) / len(rates[1:])
        return replace(plan, seconds=plan.tokens / plan.steps_per_epoch * plan.steps / rate)

    def train(self, output: Path) -> tuple[TrainPlan, dict[str, Any], int]:
        """Train, from the last whole checkpoint in `output` if there is one, and save.

        Returns:
            The plan, what `train.json` holds, and the step the run went on from (0 = it began anew).

        Raises:
            TamisError: The data or the model cannot be used; nothing of the model has been written then.
        """
        started = time.monotonic()
        threads = set_threads(self.settings.threads)
        plan, batches = self.plan(output / WORK / "tokens")
        for line in describe_plan(plan, self):
            self.say(line)
        folder = output / WORK / "checkpoints"
        remove_partial(folder)
        last = checkpoints(folder)[-1:]
        resumed = int(last[0].name.rpartition("-")[2]) if last else 0
        transformers.set_seed(self.settings.seed)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would tear our own lines apart
        progress = Progress(self.emit, self.say)
        trainer = self._trainer(plan, batches, folder, progress)
        before = self._loss_before(trainer, output / WORK / "before.json", resumed)
        if last:
            trainer.tokens_seen = orjson.loads((last[0] / "tokens.json").read_bytes())["tokens_seen"]
            self.say(f"going on from step {resumed}")
        tokens_before, clock = trainer.tokens_seen, time.monotonic()
        with plain_errors(output):
            if resumed < plan.steps:
                trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
            else:  # killed between the last step and the saved model: the Trainer would take one step more
                trainer.take_up(last[0])
        seconds = time.monotonic() - clock
        after = last_evaluation(trainer) if batches.held_out is not None else {}
        results = {
            "train_loss": round(mean_loss(trainer), 6),
            "eval_loss_before": before,
            "eval_loss": after.get("eval_loss"),
            "eval_perplexity": after.get("eval_perplexity"),
            "tokens_seen": trainer.tokens_seen,
            "tokens_per_second": round((trainer.tokens_seen - tokens_before) / max(seconds, 1e-9), 1),
            "seconds": round(time.monotonic() - started, 1),
            "resumed_from": resumed,
        }
        record = self._record(output, plan, trainer, results, threads)
        with plain_errors(output):
            self._publish(output, trainer, record)
        return plan, record, resumed

    def _model(self) -> Any:
        settings = self.settings
        model = load_model(self.base, attention=settings.attention, adapter=settings.on_adapter)
        check_vocabulary(model, self.tokenizer, self.base.name)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit and settings.max_length > limit:
            raise ModelError(
                f"--max-length {settings.max_length} is more than {self.base.name} can see ({limit})"
            )
        if not settings.lora:
            return model
        targets = settings.lora_targets
        return add_lora(
            model,
            LoraSettings(
                r=settings.lora_r,
                alpha=settings.lora_alpha,
                dropout=settings.lora_dropout,
                targets=targets if targets == "all-linear" else tuple(t.strip() for t in targets.split(",")),
                dora=settings.dora,
                layers=settings.lora_layers,
            ),
        )

    def _trainer(
        self, plan: TrainPlan, batches: Batches, folder: Path, progress: Progress | None
    ) -> CausalTrainer:
        model = self._model()
        if plan.packing == "isolated":
            check_isolation(model, self.settings.max_length)
        pad = self.tokenizer.pad_token_id
        collator = Collator(
            batches.store, self.tokenizer.eos_token_id if pad is None else pad, plan.packing, plan.prefix
        )
        trainer = CausalTrainer(
            model,
            training_arguments(
                self.settings,
                folder,
                steps=plan.steps,
                warmup=plan.warmup,
                evaluates=batches.held_out is not None,
            ),
            collator=collator,
            train_plan=batches.train,
            eval_plan=batches.held_out,
            keep=self.settings.keep_checkpoints,
            callbacks=[progress] if progress else None,
        )
        if progress:
            progress.trainer = trainer
        return trainer

    def _loss_before(self, trainer: CausalTrainer, kept: Path, resumed: int) -> float | None:
        """Held-out loss of the base model: measured before the first step, kept over a resume."""
        if trainer.eval_plan is None:
            return None
        if kept.exists():
            return float(orjson.loads(kept.read_bytes())["eval_loss"])
        if resumed:
            return None  # the weights are no longer the base model's
        metrics = trainer.evaluate()
        kept.write_bytes(orjson.dumps(metrics))
        return metrics["eval_loss"]

    def _record(
        self, output: Path, plan: TrainPlan, trainer: CausalTrainer, results: dict[str, Any], threads: int
    ) -> dict[str, Any]:
        settings = self.settings
        trainable, total = parameter_counts(trainer.model)
        packages = versions()
        shards = zip(self.listing.shards, self.fingerprints, strict=True)
        lora = {name[5:]: value for name, value in settings.model_dump().items() if name.startswith("lora_")}
        return {
            "title": output.resolve().name,
            "kind": "adapter" if settings.lora else "full",
            "tamis_version": packages.get("tamis", ""),
            "command": self.command,
            "config_hash": self.identity,
            "model": {
                "name": self.base.name,
                **self.base.place,
                "revision": self.base.revision,
                "licence": self.base.licence,
                "trainable": trainable,
                "parameters": total,
                **({"on_adapter": self.below} if self.below else {}),
            },
            "lora": {**lora, "dora": settings.dora} if settings.lora else None,
            "data": {
                "source": self.listing.source,
                "form": self.form.describe(),
                "lineage": self.listing.lineage,
                "shards": [{"name": s.name, "bytes": s.size, "fingerprint": f} for s, f in shards],
                "counts": plan.counts,
                "held_out": plan.held_out,
            },
            "run": {
                "steps": plan.steps,
                "epochs": plan.steps / plan.steps_per_epoch,
                "rows_per_step": settings.batch_size
                * settings.accumulate
                * trainer.accelerator.num_processes,
                "max_length": settings.max_length,
                "packing": plan.packing,
                "shared_prefix": plan.prefix,
                "learning_rate": settings.rate,
                "schedule": settings.schedule,
                "warmup_steps": plan.warmup,
                "precision": settings.precision,
                "seed": settings.seed,
                "threads": threads,
                "device": str(trainer.args.device),
            },
            "results": results,
            "environment": {"python": platform.python_version(), "packages": packages},
        }

    def _publish(self, output: Path, trainer: CausalTrainer, record: dict[str, Any]) -> None:
        """Save beside the checkpoints, move into place file by file, `_SUCCESS` last; then clear up."""
        if not trainer.is_world_process_zero():
            return
        staging = output / WORK / "final"
        shutil.rmtree(staging, ignore_errors=True)
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_trained(model, self.tokenizer, staging, dtype=self.settings.save_dtype)
        if self.settings.lora and self.settings.on_adapter:
            stack_adapters(self.settings.on_adapter, staging)
        (staging / RECORD).write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))
        (staging / "README.md").write_text(model_card(record), "utf-8")
        move_files(staging, output)
        (output / SUCCESS).write_text(f"{self.identity}\n")
        for name in ("final", "checkpoints", "tokens"):
            shutil.rmtree(output / WORK / name, ignore_errors=True)


def choose_packing(settings: TrainSettings, form: DataForm, store: TokenStore) -> tuple[str, int]:
    """How rows are filled, and how many tokens of the prompt they share.

    Sharing pays where the prompt's fixed part is a fair share of an example: it is then computed once a row. Without
    it, rows of like length waste little, and a block mask costs more than it saves (docs/jobs/train-lm.md has the
    measurement).

    Raises:
        InputError: Sharing was asked for, but the examples do not begin alike.
        TamisError: Sharing was asked for with another packing than `isolated`.
    """
    pays = len(store.prefix) >= 0.25 * float(store.lengths.mean())
    packing = settings.packing
    if packing == "auto":
        shares = settings.share_prefix or (pays and settings.share_prefix is None)
        packing = "isolated" if form.kind == "text" or shares else "off"
    if settings.share_prefix and packing != "isolated":
        raise TamisError("--share-prefix needs --packing isolated")
    if settings.share_prefix and not store.prefix:
        raise InputError("--share-prefix: the examples do not begin with the same tokens")
    wanted = pays if settings.share_prefix is None else settings.share_prefix
    return packing, len(store.prefix) if packing == "isolated" and wanted else 0


def describe_plan(plan: TrainPlan, session: Session) -> list[str]:
    """The plan in three or four lines."""
    counts, settings = plan.counts, session.settings
    left_out = f"{counts.get('empty', 0):,} empty, {counts.get('too_long', 0):,} too long"
    shared = f", {plan.prefix} prompt tokens shared per row" if plan.prefix else ""
    method = (
        ("DoRA" if settings.dora else "LoRA") + f" r {settings.lora_r}" if settings.lora else "all weights"
    )
    epochs = plan.steps / plan.steps_per_epoch
    lines = [
        f"data      {counts.get('rows', 0):,} rows in {len(session.listing.shards)} shards -> {plan.examples:,} "
        f"examples, {plan.held_out:,} evaluated on; left out: {left_out}",
        f"tokens    {plan.tokens:,} an epoch in {plan.rows:,} rows ({plan.packing}{shared}), {plan.fill:.0%} filled; "
        f"{plan.loss_tokens:,} carry the loss",
        f"steps     {plan.steps:,} of {settings.batch_size * settings.accumulate * processes()} rows ({epochs:.2f} "
        f"epochs), {method}, learning rate {settings.rate:g} {settings.schedule}",
    ]
    if plan.seconds is not None:
        from models.training.trainer import clock

        rate = plan.tokens * epochs / plan.seconds
        lines.append(f"time      about {clock(plan.seconds)} at {rate:,.0f} tokens/s")
    return lines
