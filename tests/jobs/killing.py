"""Trainings in processes of their own that are killed in the middle, for the tests of going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_SECONDS = 240
# Slow steps down, so that the kill meets the middle of the run and not its end.
_PROGRAM = """
import importlib, sys, time
from models.training.planned import PlannedTrainer
step = PlannedTrainer.training_step
PlannedTrainer.training_step = lambda *a, **k: (time.sleep(0.15), step(*a, **k))[1]
job = importlib.import_module(sys.argv[1])
job.run(getattr(job, sys.argv[2]).model_validate_json(sys.argv[3]))
"""


def kill_after(path: Path, settings: Any) -> None:
    """Run a training's configuration, and kill it as soon as a file is there."""
    kind = type(settings)
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, kind.__module__, kind.__name__, settings.model_dump_json()],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    deadline = time.monotonic() + _SECONDS
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
