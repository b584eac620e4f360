"""The folder a training run writes to: whose it is, kept from a second process, cleared for another run."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from schemas.errors import ModelError, OutputError, TamisError

_PATIENCE = 120  # seconds
WORK, PLAN, RECORD, SUCCESS = "_tamis", "_tamis/train.json", "train.json", "_SUCCESS"


@dataclass(frozen=True)
class TrainResult:
    """What came of a training run.

    Attributes:
        output: The folder.
        plan: What was planned; None where nothing was left to do.
        record: What `train.json` holds; None after a dry run.
        resumed_from: Step the run went on from; 0 = it began anew.
    """

    output: Path
    plan: Any
    record: dict[str, Any] | None
    resumed_from: int = 0


def train_in_folder(
    train: Callable[[Path], tuple[Any, dict[str, Any], int]],
    output: Path,
    identity: str,
    *,
    config: Mapping[str, Any],
    job: str,
    emit: Callable[..., None],
) -> TrainResult:
    """Make the folder this run's own, train into it (or go on there), and record start and end.

    Args:
        train: Trains into a folder; returns plan, record and the step it went on from.
        output: The folder, free for this run (`check_output`).
        identity: Hash of settings, data and base model.
        config: For the record of the plan.
        job: Name of the job in the events.
        emit: `EventLog.emit`.

    Raises:
        OutputError: Another process is training into the folder.
    """
    fresh = not output.exists()
    try:
        with locked(output):
            if rank():
                wait_for_plan(output, identity)
            else:
                if (read_record(output / PLAN) or {}).get("config_hash") != identity:
                    clear(output)
                write_record(output / PLAN, {"config_hash": identity, "config": dict(config)})
                emit("run", state="started", job=job, config_hash=identity)
            try:
                plan, record, resumed = train(output)
            except TamisError as error:
                if not rank() and _nothing_made(output, error):
                    raise _RefusedError from error
                raise
            if not rank():
                figures = {
                    k: v for k, v in (record.get("results") or {}).items() if isinstance(v, int | float)
                }
                emit("run", state="finished", job=job, **figures)
    except _RefusedError as refused:
        # Nothing was made that a later run could use: a right call finds the folder free.
        (output / PLAN).unlink(missing_ok=True)
        if fresh:
            shutil.rmtree(output, ignore_errors=True)
        assert refused.__cause__ is not None
        raise refused.__cause__ from refused.__cause__.__cause__
    return TrainResult(output, plan, record, resumed)


class _RefusedError(Exception):
    """A run ended before it made anything."""


def _nothing_made(output: Path, error: TamisError) -> bool:
    """Whether a folder holds no more than a run's lock, plan and events: no checkpoint, no vector, no model.

    Tokens of a run whose model was refused serve nobody either: with another model or other settings it is another run.
    """
    others = [p for p in output.iterdir() if p.name != WORK]
    plain = {"lock", "events", Path(PLAN).name} | ({"tokens"} if isinstance(error, ModelError) else set())
    return not others and {p.name for p in (output / WORK).iterdir()} <= plain


def local_folder(output: str) -> Path:
    """The folder a model is trained into.

    Raises:
        OutputError: It is a URL.
    """
    if "://" in output:
        raise OutputError(
            f"--output {output}: training writes to a local folder; copy the model up afterwards"
        )
    return Path(output)


def check_output(output: Path, identity: str, *, overwrite: bool) -> dict[str, Any] | None:
    """Whether a run may write to a folder: None if so, the record of the finished run if it is this very one.

    Raises:
        OutputError: It holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not output.is_dir():
        raise OutputError(f"{output} is a file; pass a folder")
    started = read_record(output / PLAN)
    if started is None:
        if [p.name for p in output.iterdir()] == [WORK]:
            return None  # killed before its plan was written
        raise OutputError(f"{output} holds something else than a training run; choose another --output")
    if started.get("config_hash") == identity:
        return (read_record(output / RECORD) or {}) if (output / SUCCESS).exists() else None
    if not overwrite:
        what = "a model" if (output / SUCCESS).exists() else "an unfinished run"
        raise OutputError(
            f"{output} holds {what} with other settings, data or base model; choose another --output or pass --overwrite"
        )
    return None


def clear(output: Path) -> None:
    """Remove another run's model and leftovers; the caller holds the lock, which stays."""
    for path in [*output.iterdir(), *(output / WORK).iterdir()]:
        if path.name in {WORK, "lock"}:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep a second process out of the folder. The lock dies with the process that holds it."""
    from filelock import FileLock, Timeout

    try:
        (output / WORK).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {output} ({error.strerror}); choose another --output") from error
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the processes of one distributed run share the folder
        yield
        return
    try:
        with FileLock(output / WORK / "lock", timeout=0):
            yield
    except Timeout as error:
        raise OutputError(
            f"another process is training into {output}; wait, or choose another --output"
        ) from error


def rank() -> int:
    """Which process of a distributed run (torchrun, accelerate launch) this is; 0 is the one that writes."""
    return int(os.environ.get("RANK", "0"))


def wait_for_plan(output: Path, identity: str) -> None:
    """Wait until process 0 has readied the folder."""
    deadline = time.monotonic() + _PATIENCE
    while (read_record(output / PLAN) or {}).get("config_hash") != identity:
        if time.monotonic() > deadline:
            raise OutputError(f"{output}: process 0 did not ready it; is the folder shared by all processes?")
        time.sleep(0.1)


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none."""
    try:
        record = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return record if isinstance(record, dict) else None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))
    temporary.replace(path)


def to_stderr(line: str) -> None:
    """Print a line for people."""
    print(line, file=sys.stderr, flush=True)


def silent(line: str) -> None:
    """Print nothing."""
