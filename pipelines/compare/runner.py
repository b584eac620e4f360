"""Running a comparison: plan, refuse or go on, stages side by side in processes of their own, one page at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipelines.compare.config import CompareConfig
from pipelines.compare.plan import RATES, Stage, build_stages, seconds, wanted
from pipelines.compare.planning import find_facts
from pipelines.compare.receipts import (
    CONFIG,
    LOGS,
    SUCCESS,
    Receipt,
    begin_stage,
    changed_stages,
    done_stages,
    read_json,
    read_receipts,
    write_json,
    write_receipt,
)
from schemas.errors import OutputError, TamisError

_TICK = 0.2
_TELL_SECONDS = 60.0
_GRACE_SECONDS = 5.0
_PAGES = {"report.html", "README.md", "results.json", "results.md", "arms.parquet"}


@dataclass(frozen=True)
class CompareResult:
    """What came of a comparison.

    Attributes:
        output: The folder.
        stages: What was planned.
        done: Names of the stages that are done.
        failed: Name -> what is wrong.
        results: What `results.json` holds; None after a dry run, or before the first model has been evaluated.
        complete: Every arm and seed has been evaluated.
    """

    output: Path
    stages: list[Stage]
    done: set[str]
    failed: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] | None = None
    complete: bool = False


def run(config: CompareConfig) -> CompareResult:
    """Run a comparison, or go on with it where an earlier run stopped.

    Raises:
        TamisError: It cannot begin. What goes wrong in a stage ends that stage and those that build on it only.
    """
    output = Path(config.output)
    config = config.model_copy(update={"output": str(output.absolute())})
    output = Path(config.output)
    facts = find_facts(config)
    stages = build_stages(config, facts)
    chosen = wanted(stages, config)
    receipts = read_receipts(output)
    done = done_stages(stages, receipts)
    if config.dry_run:
        print("\n".join(describe(chosen, done, receipts, config.workers)))
        return CompareResult(output, chosen, done)
    _check_owner(output)
    say = _silent if config.quiet else _to_stderr
    with _locked(output):
        changed = changed_stages(output, stages, receipts)
        if changed and not config.overwrite:
            names = ", ".join(s.name for s in changed[:4]) + (", ..." if len(changed) > 4 else "")
            raise OutputError(
                f"{output} holds {len(changed)} stages made with other settings or inputs ({names}); pass --overwrite "
                "to do these again, or choose another --output"
            )
        (output / SUCCESS).unlink(missing_ok=True)
        save_plan(output, config, stages, facts.verdict)
        waiting = [s for s in chosen if s.name not in done]
        say(
            f"{len(chosen)} stages, {len(chosen) - len(waiting)} done already; {_time_left(waiting, receipts, config.workers)}"
        )
        if config.workers == 0:
            failed = _run_here(config, waiting, done, say)
        else:
            crew = _Crew(output, config, say)
            try:
                failed = crew.run(stages, waiting, done)
            finally:
                crew.end()
        return conclude(config, stages, chosen, failed, say)


def conclude(
    config: CompareConfig,
    stages: Sequence[Stage],
    chosen: Sequence[Stage],
    failed: Mapping[str, str],
    say: Any,
) -> CompareResult:
    """Gather what is there, write the page, and mark the folder whole if it is."""
    from pipelines.compare.page import write_pages
    from pipelines.compare.results import gather

    output = Path(config.output)
    receipts = read_receipts(output)
    done = done_stages(stages, receipts)
    complete = not failed and all(s.name in done for s in stages)
    results = None
    if any(s.kind == "toxicity" and s.name in done for s in stages):
        results = gather(config, [s for s in stages if s.name in done], stages, receipts, dict(failed))
        write_pages(output, results)
        say(f"report: {output}/report.html")
    if complete:
        (output / SUCCESS).write_bytes(b"")
    return CompareResult(output, list(chosen), done, dict(failed), results, complete)


def save_plan(
    output: Path, config: CompareConfig, stages: Sequence[Stage], verdict: Mapping[str, Any]
) -> None:
    """Keep the settings and the stages, for the processes that do them and for whoever looks later."""
    record = {
        "config": config.model_dump(mode="json"),
        "stages": [dataclasses.asdict(s) for s in stages],
        "judge": dict(verdict),
    }
    write_json(output / CONFIG, record)


def load_plan(output: Path) -> tuple[CompareConfig, list[Stage]]:
    """What `save_plan` kept.

    Raises:
        OutputError: There is no comparison in the folder.
    """
    record = read_json(output / CONFIG)
    if record is None:
        raise OutputError(f"{output} holds no comparison")
    stages = [Stage(**{**s, "needs": tuple(s["needs"]), "rank": tuple(s["rank"])}) for s in record["stages"]]
    return CompareConfig.model_validate(record["config"]), stages


def describe(
    stages: Sequence[Stage], done: set[str], receipts: Mapping[str, Receipt], workers: int
) -> list[str]:
    """The plan, a line a stage, with what each costs."""
    rates = measured_rates(receipts)
    width = max(len(s.name) for s in stages)
    lines = []
    for stage in stages:
        if stage.name in done:
            cost = f"done in {clock(receipts[stage.name].seconds)}"
        elif stage.tokens:
            most = "at most " if stage.pace in {"plain", "steered"} else "about "
            cost = f"{most}{stage.tokens:,} tokens, {clock(seconds(stage, rates))}"
        else:
            cost = "seconds"
        lines.append(f"{stage.name:<{width}}  {cost}")
    left = [s for s in stages if s.name not in done]
    lines.append(f"{len(stages)} stages, {len(left)} to do; {_time_left(left, receipts, workers)}")
    return lines


def measured_rates(receipts: Mapping[str, Receipt]) -> dict[str, float]:
    """Tokens a second by pace: what was measured here, else what is usual."""
    rates = dict(RATES)
    for pace in RATES:
        own = [r for r in receipts.values() if r.pace == pace and r.tokens and r.seconds]
        if own:
            rates[pace] = sum(r.tokens for r in own) / sum(r.seconds for r in own)
    return rates


def clock(value: float) -> str:
    """A time span for people."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )


def _time_left(stages: Sequence[Stage], receipts: Mapping[str, Receipt], workers: int) -> str:
    rates = measured_rates(receipts)
    spans = [seconds(s, rates) for s in stages]
    least, workers = max(spans, default=0.0), max(1, workers)
    return f"about {clock(max(sum(spans) / workers, least))} on {workers} core{'s' if workers > 1 else ''}"


def _run_here(config: CompareConfig, waiting: Sequence[Stage], done: set[str], say: Any) -> dict[str, str]:
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
        registry.forget()
    return failed


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


class _Crew:
    """Runs stages side by side: the foremost that has all it needs goes first."""

    def __init__(self, output: Path, config: CompareConfig, say: Any) -> None:
        self.output, self.config, self.say = output, config, say
        self.running: list[_Running] = []
        self.failed: dict[str, str] = {}

    def run(self, stages: Sequence[Stage], waiting: list[Stage], done: set[str]) -> dict[str, str]:
        """Do all that can be done.

        Returns:
            Stages that failed, and why.
        """
        waiting, done = list(waiting), set(done)
        total = len(waiting)
        with _terminable():
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
                            f"({total - len(left)}/{total}; {_time_left(left, receipts, self.config.workers)} left)"
                        )
                        self._clean(stages, done, receipts)
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

    def _clean(self, stages: Sequence[Stage], done: set[str], receipts: dict[str, Receipt]) -> None:
        """Remove models that have been evaluated, where they are not to be kept."""
        if self.config.keep_models:
            return
        for stage in stages:
            users = [s.name for s in stages if stage.name in s.needs]
            receipt = receipts.get(stage.name)
            if stage.kind == "train" and receipt and not receipt.removed and users and set(users) <= done:
                write_receipt(self.output, dataclasses.replace(receipt, removed=True))
                shutil.rmtree(self.output / stage.folder, ignore_errors=True)

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


def _check_owner(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"--output {output} is a file; pass a folder")
    inside = {p.name for p in output.iterdir()}
    if inside - {"_tamis"} and not (output / CONFIG).exists():
        raise OutputError(f"{output} holds something else than a comparison; choose another --output")


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep a second comparison out of the folder; the lock dies with the process that holds it."""
    from filelock import FileLock, Timeout

    try:
        (output / "_tamis").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {output} ({error.strerror}); choose another --output") from error
    try:
        with FileLock(output / "_tamis" / "lock", timeout=0):
            yield
    except Timeout as error:
        raise OutputError(f"another comparison is at work in {output}") from error


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Make a polite kill end like Ctrl-C: what is done stays, and no stage outlives the run."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    pass
