"""One fine-tuning of an encoder, from examples to the saved folder; resumes what a killed run left.

    FOLDER/_tamis/checkpoints/   whole checkpoints, until the model is saved
    FOLDER/...                   the model: `from_pretrained` loads it
    FOLDER/train.json, README.md what was done; the model card
    FOLDER/_SUCCESS              written last

Examples are tokenised anew in every process: labelled sets are small, and the same examples give the same batches.
Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import math
import platform
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import transformers

from models.training.classifier_settings import EncoderSettings
from models.training.collate import BatchPlan
from models.training.loading import BaseModel, parameter_counts
from models.training.planned import PlannedTrainer, Progress, checkpoints, clock, remove_partial
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
from schemas.errors import ModelError

WORK, RECORD, SUCCESS = "_tamis", "train.json", "_SUCCESS"
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncoderPlan:
    """What a run will do.

    Attributes:
        examples: Examples of an epoch, repeated ones as often as they count.
        held_out: Examples held out.
        tokens: Tokens of one epoch, without padding.
        steps: Optimiser steps of the run.
        steps_per_epoch: Of one epoch.
        warmup: Steps of warm-up.
        fill: Share of the batches' area that is not padding.
        seconds: Estimated time of the run; None where not measured.
    """

    examples: int
    held_out: int
    tokens: int
    steps: int
    steps_per_epoch: int
    warmup: int
    fill: float
    seconds: float | None = None


@dataclass(frozen=True)
class Prepared:
    """The data of a run, as batches are made of them.

    Attributes:
        examples: What the session read.
        lengths: Tokens of each example.
        train: Numbers of the examples of an epoch.
        held_out: Numbers of those held out.
        counts: What reading counted.
    """

    examples: Any
    lengths: IntArray
    train: IntArray
    held_out: IntArray
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class EncoderSession(ABC):
    """A run's parts; nothing is written before `train`. Subclasses say what is learned.

    Attributes:
        settings: How to train.
        base: What to start from.
        tokenizer: Its tokenizer.
        identity: Hash of everything the model depends on.
        command: For the model card.
        training_data: Tag of the data.
        data: What the record says of the data.
        say: Called with each line for people.
        emit: Called with (kind, fields) for each event.
    """

    settings: EncoderSettings
    base: BaseModel
    tokenizer: Any
    identity: str
    command: str
    training_data: str
    data: dict[str, Any]
    say: Callable[[str], None]
    emit: Callable[[str, dict[str, Any]], None]

    kind = ""  # as train.json calls it

    @abstractmethod
    def read(self) -> Prepared:
        """Read and tokenise the examples."""

    @abstractmethod
    def make_model(self) -> Any:
        """The model to train, its head drawn from torch's generator."""

    @abstractmethod
    def make_trainer(self, model: Any, args: Any, prepared: Prepared, **options: Any) -> PlannedTrainer:
        """The trainer of the model."""

    @abstractmethod
    def finish(self, model: Any, prepared: Prepared, folder: Path, output: Path) -> dict[str, Any]:
        """Fit what is fitted after training, save into `folder` (to be moved to `output`), and return the figures."""

    @abstractmethod
    def describe(self, prepared: Prepared) -> list[str]:
        """Lines of the plan about the data."""

    @abstractmethod
    def card(self, record: dict[str, Any]) -> str:
        """The model card of a record."""

    def plan(self, prepared: Prepared) -> tuple[EncoderPlan, BatchPlan, BatchPlan | None]:
        """Plan the batches: rows of like length together."""
        settings = self.settings
        shape = (settings.batch_size, settings.max_length)
        train = BatchPlan(prepared.lengths, prepared.train, *shape, seed=settings.seed)
        held_out = BatchPlan(prepared.lengths, prepared.held_out, *shape) if len(prepared.held_out) else None
        batches = train.batches(0)
        sizes = [[row[0].stop for row in batch] for batch in batches]
        tokens = sum(map(sum, sizes))
        per_epoch = math.ceil(len(batches) / (settings.accumulate * processes()))
        steps = settings.max_steps or max(1, math.ceil(settings.epochs * per_epoch))
        plan = EncoderPlan(
            examples=len(prepared.train),
            held_out=len(prepared.held_out),
            tokens=tokens,
            steps=steps,
            steps_per_epoch=per_epoch,
            warmup=warmup_steps(settings.warmup, steps),
            fill=tokens / sum(max(batch) * len(batch) for batch in sizes),
        )
        return plan, train, held_out

    def estimate(self, prepared: Prepared) -> EncoderPlan:
        """The plan with the seconds it will take: a few batches are run forward and backward, and timed."""
        set_threads(self.settings.threads)
        transformers.set_seed(self.settings.seed)
        plan, train, held_out = self.plan(prepared)
        planned = train.batches(0)
        sample = [planned[len(planned) * i // 4] for i in (1, 1, 2, 3)]  # the first one warms up
        tokens, seconds = 0, 0.0
        with tempfile.TemporaryDirectory(prefix="tamis-train-") as folder:
            trainer = self._trainer(prepared, plan, train, held_out, Path(folder), None)
            model = trainer.model
            assert model is not None
            trainer._move_model_to_device(model, trainer.args.device)
            for i, batch in enumerate(sample):
                inputs = trainer._prepare_inputs(trainer.collator(batch))
                began = time.monotonic()
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(model, inputs)
                loss.backward()
                if i:
                    tokens += trainer.count_tokens(inputs)  # waits for an accelerator
                    seconds += time.monotonic() - began
        return replace(plan, seconds=plan.tokens / plan.steps_per_epoch * plan.steps * seconds / tokens)

    def train(self, output: Path) -> tuple[EncoderPlan, dict[str, Any], int]:
        """Train, from the last whole checkpoint in `output` if there is one, and save.

        Returns:
            The plan, what `train.json` holds, and the step the run went on from (0 = it began anew).

        Raises:
            TamisError: The data or the model cannot be used; nothing of the model has been written then.
        """
        started = time.monotonic()
        threads = set_threads(self.settings.threads)
        prepared = self.read()
        plan, train, held_out = self.plan(prepared)
        for line in self.describe_plan(prepared, plan):
            self.say(line)
        folder = output / WORK / "checkpoints"
        remove_partial(folder)
        last = checkpoints(folder)[-1:]
        resumed = int(last[0].name.rpartition("-")[2]) if last else 0
        transformers.set_seed(self.settings.seed)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would tear our own lines apart
        progress = Progress(self.emit, self.say)
        trainer = self._trainer(prepared, plan, train, held_out, folder, progress)
        progress.trainer = trainer
        if last:
            trainer.tokens_seen = orjson.loads((last[0] / "tokens.json").read_bytes())["tokens_seen"]
            self.say(f"going on from step {resumed}")
        tokens_before, began = trainer.tokens_seen, time.monotonic()
        with plain_errors(output):
            if resumed < plan.steps:
                trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
            else:  # killed between the last step and the saved model: the Trainer would take one step more
                trainer.take_up(last[0])
        seconds = time.monotonic() - began
        results = {
            "train_loss": round(mean_loss(trainer), 6),
            "eval_loss": last_evaluation(trainer)["eval_loss"] if held_out is not None else None,
            "tokens_seen": trainer.tokens_seen,
            "tokens_per_second": round((trainer.tokens_seen - tokens_before) / max(seconds, 1e-9), 1),
            "resumed_from": resumed,
        }
        with plain_errors(output):
            record = self._publish(output, trainer, prepared, plan, results, threads, started)
        return plan, record, resumed

    def describe_plan(self, prepared: Prepared, plan: EncoderPlan) -> list[str]:
        """The plan in a few lines."""
        settings = self.settings
        rows = settings.batch_size * settings.accumulate * processes()
        epochs = plan.steps / plan.steps_per_epoch
        lines = [
            *self.describe(prepared),
            f"tokens    {plan.tokens:,} an epoch, batches {plan.fill:.0%} filled",
            f"steps     {plan.steps:,} of {rows} texts ({epochs:.2f} epochs), learning rate {settings.learning_rate:g} "
            f"{settings.schedule}",
        ]
        if plan.seconds is not None:
            rate = plan.tokens * epochs / plan.seconds
            lines.append(f"time      about {clock(plan.seconds)} at {rate:,.0f} tokens/s")
        return lines

    def _trainer(
        self,
        prepared: Prepared,
        plan: EncoderPlan,
        train: BatchPlan,
        held_out: BatchPlan | None,
        folder: Path,
        progress: Progress | None,
    ) -> PlannedTrainer:
        model = self.make_model()
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit and self.settings.max_length > limit:
            raise ModelError(
                f"--max-length {self.settings.max_length} is more than {self.base.name} can see ({limit})"
            )
        arguments = training_arguments(
            self.settings, folder, steps=plan.steps, warmup=plan.warmup, evaluates=held_out is not None
        )
        return self.make_trainer(
            model,
            arguments,
            prepared,
            train_plan=train,
            eval_plan=held_out,
            keep=self.settings.keep_checkpoints,
            callbacks=[progress] if progress else None,
        )

    def _publish(
        self,
        output: Path,
        trainer: PlannedTrainer,
        prepared: Prepared,
        plan: EncoderPlan,
        results: dict[str, Any],
        threads: int,
        started: float,
    ) -> dict[str, Any]:
        """Save beside the checkpoints, move into place file by file, `_SUCCESS` last; then clear up."""
        if not trainer.is_world_process_zero():
            return {}
        staging = output / WORK / "final"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainable, total = parameter_counts(model)
        settings = self.settings
        figures = self.finish(model, prepared, staging, output)
        packages = versions()
        record = {
            "title": output.resolve().name,
            "kind": self.kind,
            "tamis_version": packages.get("tamis", ""),
            "command": self.command,
            "config_hash": self.identity,
            "training_data": self.training_data,
            "model": {
                "name": self.base.name,
                **self.base.place,
                "revision": self.base.revision,
                "licence": self.base.licence,
                "trainable": trainable,
                "parameters": total,
            },
            "data": {**self.data, "counts": dict(prepared.counts), "held_out": plan.held_out},
            "run": {
                "steps": plan.steps,
                "epochs": plan.steps / plan.steps_per_epoch,
                "rows_per_step": settings.batch_size
                * settings.accumulate
                * trainer.accelerator.num_processes,
                "warmup_steps": plan.warmup,
                "threads": threads,
                "device": str(trainer.args.device),
                "settings": settings.model_dump(exclude={"threads", "device"}),
            },
            "results": {**results, **figures, "seconds": round(time.monotonic() - started, 1)},
            "environment": {"python": platform.python_version(), "packages": packages},
        }
        (staging / RECORD).write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))
        (staging / "README.md").write_text(self.card(record), "utf-8")
        move_files(staging, output)
        (output / SUCCESS).write_text(f"{self.identity}\n")
        for name in ("final", "checkpoints"):
            shutil.rmtree(output / WORK / name, ignore_errors=True)
        return record
