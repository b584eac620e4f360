"""Doing the stages: side by side in processes of their own, or one after another in this one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.compare.config import CompareConfig
from pipelines.compare.costs import clock, time_left
from pipelines.compare.plan import Stage
from pipelines.compare.receipts import LOGS, Receipt, begin_stage, read_receipts, write_receipt
from pipelines.run import terminable
from schemas.errors import TamisError

_TICK = 0.2
_TELL_SECONDS = 60.0
_GRACE_SECONDS = 5.0


def run_here(
    config: CompareConfig,
    stages: Sequence[Stage],
    waiting: Sequence[Stage],
    done: set[str],
    say: Callable[[str], None],
) -> dict[str, str]:
    """Do the stages in this process, one after another; for tests, and to look into one with a debugger."""
    from models import registry
    from pipelines.compare.work import run_stage

    failed: dict[str, str] = {}
    for stage in _in_order(waiting, done):
        broken = [n for n in stage.needs if n in failed]
        if broken:
            failed[stage.name] = f"needs {broken[0]}"
            continue
        say(f"start  {stage.name}")
        begin_stage(Path(config.output), stage)
        try:
            run_stage(config, stage)
        except TamisError as error:
            failed[stage.name] = str(error)
            say(f"failed {stage.name}: {error}")
        else:
            done = done | {stage.name}
            remove_evaluated(config, stages, done, read_receipts(Path(config.output)))
        registry.forget()
    return failed


def remove_evaluated(
    config: CompareConfig, stages: Sequence[Stage], done: set[str], receipts: Mapping[str, Receipt]
) -> None:
    """Remove models that have been evaluated, where they are not to be kept."""
    if config.keep_models:
        return
    output = Path(config.output)
    for stage in stages:
        users = [s.name for s in stages if stage.name in s.needs]
        receipt = receipts.get(stage.name)
        if stage.kind == "train" and receipt and not receipt.removed and users and set(users) <= done:
            write_receipt(output, dataclasses.replace(receipt, removed=True))
            shutil.rmtree(output / stage.folder, ignore_errors=True)


def _in_order(waiting: Sequence[Stage], done: set[str]) -> list[Stage]:
    """The stages so that each comes after all it needs, foremost first."""
    known, rest, ordered = set(done), list(waiting), []
    while rest:
        stage = next(s for s in rest if set(s.needs) <= known)
        rest.remove(stage)
        known.add(stage.name)
        ordered.append(stage)
    return ordered


@dataclass
class _Running:
    stage: Stage
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    began: float
    told: float


class Crew:
    """Runs stages side by side, each in a process: the foremost that has all it needs goes first.

    Args:
        config: The settings.
        say: Called with lines for people.
        show: Called with the failures so far whenever a model has been evaluated.
    """

    def __init__(
        self, config: CompareConfig, say: Callable[[str], None], show: Callable[[dict[str, str]], object]
    ) -> None:
        self.output, self.config, self.say, self.show = Path(config.output), config, say, show
        self.running: list[_Running] = []
        self.failed: dict[str, str] = {}

    def run(self, stages: Sequence[Stage], waiting: list[Stage], done: set[str]) -> dict[str, str]:
        """Do all that can be done.

        Returns:
            Stages that failed, and why.
        """
        waiting, done = list(waiting), set(done)
        total = len(waiting)
        with terminable():
            while waiting or self.running:
                for stage in [s for s in waiting if set(s.needs) & self.failed.keys()]:
                    waiting.remove(stage)
                    self.failed[stage.name] = f"needs {next(n for n in stage.needs if n in self.failed)}"
                ready = [s for s in waiting if set(s.needs) <= done]
                for stage in ready[: self.config.workers - len(self.running)]:
                    waiting.remove(stage)
                    self._start(stage)
                if not self.running:
                    break
                time.sleep(_TICK)
                for job in list(self.running):
                    if job.process.poll() is None:
                        self._tell(job)
                        continue
                    self.running.remove(job)
                    job.log.close()
                    if self._finish(job):
                        done.add(job.stage.name)
                        left = waiting + [j.stage for j in self.running]
                        receipts = read_receipts(self.output)
                        self.say(
                            f"done   {job.stage.name} in {clock(receipts[job.stage.name].seconds)} "
                            f"({total - len(left)}/{total}; {time_left(left, receipts, self.config.workers)} left)"
                        )
                        remove_evaluated(self.config, stages, done, receipts)
                        if job.stage.kind in {"toxicity", "utility"} and left:
                            self._show()
        return self.failed

    def _start(self, stage: Stage) -> None:
        begin_stage(self.output, stage)
        path = self.output / LOGS / f"{stage.name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
        env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path]))
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.compare.work", str(self.output), stage.name],
            env=env,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        now = time.monotonic()
        self.running.append(_Running(stage, process, log, now, now))
        self.say(f"start  {stage.name}")

    def _tell(self, job: _Running) -> None:
        now = time.monotonic()
        if now - job.told >= _TELL_SECONDS:
            job.told = now
            self.say(f"       {job.stage.name}: {last_line(self.output / LOGS / f'{job.stage.name}.log')}")

    def _finish(self, job: _Running) -> bool:
        code = job.process.returncode
        receipt = read_receipts(self.output).get(job.stage.name)
        if code == 0 and receipt is not None and receipt.key == job.stage.key:
            return True
        log = self.output / LOGS / f"{job.stage.name}.log"
        said = last_line(log).removeprefix("error: ")
        killed = " (most likely memory ran out: use fewer --workers)" if code == -signal.SIGKILL else ""
        why = (
            said if code and code > 0 else f"killed by signal {-code}{killed}" if code else "left no receipt"
        )
        self.failed[job.stage.name] = why
        self.say(f"failed {job.stage.name}: {why} (all of it: {log})")
        return False

    def _show(self) -> None:
        """Show what is known so far: a long run is worth looking at, and not worth losing over a page."""
        try:
            self.show(self.failed)
        except Exception as error:
            self.say(f"       the page could not be written yet: {type(error).__name__}: {error}")

    def end(self) -> None:
        """End what still runs: a stage goes when its pipe closes."""
        for job in self.running:
            with contextlib.suppress(OSError):
                assert job.process.stdin is not None
                job.process.stdin.close()
        for job in self.running:
            try:
                job.process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            job.log.close()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip()[:300] if lines else ""
