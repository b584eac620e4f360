"""The ground all trainers stand on: planned batches, checkpoints that survive a kill, progress as lines and events.

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import abc
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch.utils.data import DataLoader, Dataset, Sampler

from schemas.errors import FatalStepError

COMPLETE = "COMPLETE"  # written last into a checkpoint: one without it was cut off by a kill


class Plan(Protocol):
    """What plans the batches of any epoch (`models.training.collate.BatchPlan`)."""

    @property
    def batch_size(self) -> int:
        """Rows per batch."""
        ...

    def batches(self, epoch: int, *, shuffle: bool = True) -> list[list[Any]]:
        """The batches of an epoch, in order; the same in every process and every run."""
        ...


class PlannedTrainer(transformers.Trainer, abc.ABC):
    """`transformers.Trainer` on planned batches, with a loss that is a sum over items divided by their number.

    A subclass says what the items are (tokens, labels): `summed_loss`, `count_items`, `count_tokens`.

    Args:
        model: The model to train.
        args: Trainer arguments; `output_dir` holds the checkpoints.
        collator: Makes tensors of rows.
        train_plan: The batches to train on.
        eval_plan: The batches to evaluate on; None where nothing is held out.
        keep: Checkpoints kept.
    """

    def __init__(
        self,
        model: Any,
        args: transformers.TrainingArguments,
        *,
        collator: Any,
        train_plan: Plan,
        eval_plan: Plan | None = None,
        keep: int = 2,
        callbacks: list[transformers.TrainerCallback] | None = None,
    ) -> None:
        self.collator, self.train_plan, self.eval_plan, self.keep = collator, train_plan, eval_plan, keep
        rows = _Rows()
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=rows,
            eval_dataset=rows if eval_plan is not None else None,
            callbacks=callbacks,
        )
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(transformers.trainer_callback.ProgressCallback)
        # We compute the loss, and scale it for accumulation: have the Trainer count the step's items for us.
        self.model_accepts_loss_kwargs = True
        self.tokens_seen = 0
        self.unit = "tokens"  # what `count_tokens` counts, for people

    @abc.abstractmethod
    def summed_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Loss summed over a batch's items, their number, and the model's outputs."""
        ...

    @abc.abstractmethod
    def count_items(self, batch: dict[str, Any]) -> torch.Tensor:
        """Number of a batch's items."""
        ...

    @abc.abstractmethod
    def count_tokens(self, batch: dict[str, Any]) -> int:
        """Number of a batch's tokens, padding left out."""
        ...

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of the plan, epoch by epoch."""
        loader: DataLoader[Any] = self.accelerator.prepare(
            self._loader(PlannedBatches(self.train_plan, shuffle=True))
        )
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's part of the held-out batches, in a fixed order."""
        assert self.eval_plan is not None
        # Dealt out here: accelerate would repeat some, to give every process equally many.
        batches = self.eval_plan.batches(0, shuffle=False)
        return self._loader(batches[self.accelerator.process_index :: self.accelerator.num_processes])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss over the items of the whole step."""
        total, count, outputs = self.summed_loss(model, inputs)
        if num_items_in_batch is None:
            loss = total / count.clamp(min=1)
        else:
            loss = total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
            loss = loss * self.accelerator.num_processes  # gradients are averaged over devices afterwards
        if model.training:
            self.tokens_seen += self.count_tokens(inputs) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Mean loss over the held-out items, every one counting alike, and what `describe_loss` adds."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        # Making a loader draws from torch's generator: put it back, so that evaluating changes no training run.
        state = torch.get_rng_state()
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                with self.accelerator.autocast():
                    total, count, _ = self.summed_loss(model, self._prepare_inputs(batch))
                sums += torch.tensor([float(total), float(count)], dtype=torch.float64)
        torch.set_rng_state(state)
        if was_training:
            model.train()
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        loss = float(sums[0] / max(float(sums[1]), 1.0))
        figures = {"loss": loss, **self.describe_loss(loss, float(sums[1]))}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def describe_loss(self, loss: float, items: float) -> dict[str, float]:
        """Further figures that follow from a held-out loss."""
        return {}

    def live_figures(self) -> dict[str, float]:
        """Further figures of the steps since they were last asked for; they go into every progress line."""
        return {}

    def take_up(self, checkpoint: Path) -> None:
        """Load the weights and the state of a checkpoint, and train no further."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Items of one step: all its forward passes, on all devices."""
        count = torch.stack([self.count_items(batch) for batch in batch_samples]).sum()
        if self.accelerator.num_processes > 1:
            count = self.accelerator.gather(count.to(device)).sum()
        return count.to(device)

    def _loader(self, batches: Any) -> DataLoader[Any]:
        return DataLoader(
            _Rows(),
            batch_sampler=batches,
            collate_fn=self.collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            (folder / "tokens.json").write_text(json.dumps({"tokens_seen": self.tokens_seen}))
            _flush(folder)
            (folder / COMPLETE).write_text(f"{self.state.global_step}\n")
            for old in checkpoints(Path(str(self.args.output_dir)))[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


class PlannedBatches(Sampler[list[Any]]):
    """The batches of a plan as a batch sampler; `set_epoch` chooses the epoch."""

    def __init__(self, plan: Plan, *, shuffle: bool) -> None:
        self.plan, self.shuffle = plan, shuffle
        self.batch_size = plan.batch_size
        self.drop_last = False
        self.epoch = 0
        self._planned: tuple[int, list[list[Any]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Plan this epoch from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self._batches())

    def _batches(self) -> list[list[Any]]:
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, self.plan.batches(self.epoch, shuffle=self.shuffle))
        return self._planned[1]


class _Rows(Dataset[Any]):
    """Stands for the rows of a plan: an index IS a row, and the collator does the work."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: Any) -> Any:
        return row


class Progress(transformers.TrainerCallback):
    """Tells what happens: one plain line on stderr, and one event a line in a file.

    Args:
        emit: Called with (kind, fields) for each event.
        total_steps: Steps of the whole run.
        line: Called with each line for people.
    """

    def __init__(
        self,
        emit: Callable[[str, dict[str, Any]], None],
        line: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._emit, self._line = emit, line
        self.trainer: PlannedTrainer | None = None
        self._started = time.monotonic()
        self._first_step = self._first_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started, self._first_step = time.monotonic(), state.global_step
        self._first_tokens = self.trainer.tokens_seen if self.trainer else 0
        self._emit("start", {"step": state.global_step, "of": state.max_steps})

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Report a training loss."""
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(float(logs["loss"])):
            raise FatalStepError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower --learning-rate, or train in float32"
            )
        seconds = max(time.monotonic() - self._started, 1e-9)
        tokens = self.trainer.tokens_seen if self.trainer else 0
        rate = (tokens - self._first_tokens) / seconds
        done = state.global_step - self._first_step
        eta = (state.max_steps - state.global_step) * seconds / done if done else 0.0
        fields = {
            "step": state.global_step,
            "of": state.max_steps,
            "epoch": round(float(logs.get("epoch", 0.0)), 4),
            "loss": round(float(logs["loss"]), 6),
            "lr": float(logs.get("learning_rate", 0.0)),
            "grad_norm": round(float(logs.get("grad_norm", 0.0)), 4),
            "tokens": tokens,
            "tokens_per_second": round(rate, 1),
            "eta_seconds": round(eta, 1),
        }
        live = self.trainer.live_figures() if self.trainer else {}
        self._emit("step", {**fields, **{name: round(value, 6) for name, value in live.items()}})
        shown = "".join(f"{name.replace('_', ' ')} {value:.3g}  " for name, value in live.items())
        self._line(
            f"step {state.global_step}/{state.max_steps}  loss {fields['loss']:.4f}  {shown}lr {fields['lr']:.2e}  "
            f"{rate:,.0f} {self.trainer.unit if self.trainer else 'tokens'}/s  {clock(eta)} left"
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report an evaluation."""
        metrics: dict[str, float] = kwargs.get("metrics") or {}
        loss, perplexity = metrics.get("eval_loss", math.nan), metrics.get("eval_perplexity")
        fields = {"step": state.global_step, "loss": round(loss, 6)}
        line = f"step {state.global_step}/{state.max_steps}  held-out loss {loss:.4f}"
        if perplexity is not None:
            fields["perplexity"] = round(perplexity, 4)
            line += f"  perplexity {perplexity:.2f}"
        self._emit("eval", fields)
        self._line(line)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a checkpoint."""
        self._emit("checkpoint", {"step": state.global_step})


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first; those a kill cut short are passed over."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def remove_partial(folder: Path) -> None:
    """Remove checkpoints that were cut short."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)


def clock(seconds: float) -> str:
    """`75` -> `1:15`, `3700` -> `1:01:40`."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _flush(folder: Path) -> None:
    """Bring a checkpoint's files to the disk before it is called complete."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
