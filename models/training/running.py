"""What every training run needs around its trainer: arguments, threads, plain errors, figures of the log.

Import this module late: it needs torch and transformers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from models.training.classifier_settings import EncoderSettings
from models.training.planned import PlannedTrainer
from models.training.settings import TrainSettings
from schemas.errors import FatalStepError, ModelError

_DISK_FULL = 1 << 20  # bytes left
_PACKAGES = ("tamis", "torch", "transformers", "peft", "accelerate", "tokenizers")


def training_arguments(
    settings: TrainSettings | EncoderSettings, folder: Path, *, steps: int, warmup: int, evaluates: bool
) -> transformers.TrainingArguments:
    """What `transformers.Trainer` is told.

    Args:
        settings: Of the run.
        folder: Where checkpoints go.
        steps: Optimiser steps of the run.
        warmup: Steps of warm-up.
        evaluates: Whether there are held-out examples.
    """
    evaluates = evaluates and settings.eval_steps > 0
    rate = settings.rate if isinstance(settings, TrainSettings) else settings.learning_rate
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        "warmup_steps": warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision == "bfloat16",
        "use_cpu": settings.device == "cpu" or not torch.cuda.is_available(),
        "seed": settings.seed,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": settings.eval_steps if evaluates else None,
        "logging_steps": settings.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "ddp_find_unused_parameters": False,
    }
    if getattr(settings, "gradient_checkpointing", False):
        names = ("activation_checkpointing", "gradient_checkpointing")  # transformers 5.2x and before
        known = transformers.TrainingArguments.__dataclass_fields__
        options[next(name for name in names if name in known)] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about options that are not set here
        arguments = transformers.TrainingArguments(**options)
    if arguments.n_gpu > 1:
        # Several devices in one process would have torch split rows among them: one process a device instead.
        arguments._n_gpu = 1
    return arguments


def warmup_steps(share: float, steps: int) -> int:
    """Steps of warm-up: a share of the steps, and not all of them, for the first one's learning rate is 0."""
    return min(math.ceil(share * steps), steps - 1)


def mean_loss(trainer: PlannedTrainer) -> float:
    """Mean training loss of the whole run, from its log: a resumed process saw only the last part."""
    total, last = 0.0, 0.0
    for entry in trainer.state.log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / last if last else math.nan


def last_evaluation(trainer: PlannedTrainer) -> dict[str, float]:
    """Figures of the trained model on what was held out; not computed twice where the last step evaluated."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return entry
    return trainer.evaluate()


@contextlib.contextmanager
def plain_errors(output: Path) -> Iterator[None]:
    """Say in one line what is wrong when memory or the disk runs out, however deep it is raised."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            "out of device memory; lower --batch-size or --max-length, raise --accumulate, or pass --gradient-checkpointing"
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors wrap a full disk in errors of their own
        if shutil.disk_usage(output).free < _DISK_FULL:
            raise FatalStepError(
                f"the disk of {output} is full; make room, and run the same command again"
            ) from error
        raise


def move_files(staging: Path, output: Path) -> None:
    """Move what was saved into the output folder, one by one, for everyone to read; folders move whole."""
    for path in sorted(staging.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in sorted(staging.iterdir()):
        if path.is_dir():
            shutil.rmtree(output / path.name, ignore_errors=True)  # of a run killed while it moved
        path.replace(output / path.name)


def set_threads(wanted: int) -> int:
    """Give torch so many threads (0: all cores this process may use), and say how many."""
    count = wanted or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def versions() -> dict[str, str]:
    """Versions of the packages a model depends on, those that are installed."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
