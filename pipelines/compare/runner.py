"""Running a comparison: plan, refuse or go on, stages side by side in processes of their own, one page at the end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.compare.config import CompareConfig
from pipelines.compare.costs import describe, time_left
from pipelines.compare.crew import Crew, run_here
from pipelines.compare.plan import Stage, build_stages, wanted
from pipelines.compare.planning import find_facts
from pipelines.compare.receipts import (
    CONFIG,
    SUCCESS,
    Receipt,
    changed_stages,
    done_stages,
    read_receipts,
    renew_keys,
    save_plan,
)
from schemas.errors import OutputError


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
    done = done_stages(stages, receipts, config)
    _check_owner(output)
    _check_changed(config, stages, receipts)
    if config.dry_run:
        print("\n".join(describe(chosen, done, receipts, config.workers)))
        return CompareResult(output, chosen, done)
    say = _silent if config.quiet else _to_stderr
    with _locked(output):
        # Once more, now that nobody else is at work here: a comparison may have ended meanwhile.
        receipts = read_receipts(output)
        done = done_stages(stages, receipts, config)
        _check_changed(config, stages, receipts)
        renew_keys(output, stages, receipts)
        (output / SUCCESS).unlink(missing_ok=True)
        save_plan(output, config, stages, facts.verdict)
        waiting = [s for s in chosen if s.name not in done]
        say(
            f"{len(chosen)} stages, {len(chosen) - len(waiting)} done already; {time_left(waiting, receipts, config.workers)}"
        )
        if config.workers == 0:
            failed = run_here(config, stages, waiting, done, say)
        else:
            crew = Crew(config, say, lambda failures: write_results(config, stages, failures))
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
    output = Path(config.output)
    done = done_stages(stages, read_receipts(output), config)
    complete = not failed and all(s.name in done for s in stages)
    results = write_results(config, stages, failed)
    if results is not None:
        say(f"report: {output}/report.html")
    if complete:
        (output / SUCCESS).write_bytes(b"")
    return CompareResult(output, list(chosen), done, dict(failed), results, complete)


def write_results(
    config: CompareConfig, stages: Sequence[Stage], failed: Mapping[str, str]
) -> dict[str, Any] | None:
    """Gather what is there and write the pages.

    Returns:
        The results; None before the first model has been evaluated.
    """
    from pipelines.compare.page import write_pages
    from pipelines.compare.results import gather

    output = Path(config.output)
    receipts = read_receipts(output)
    done = done_stages(stages, receipts, config)
    if not any(s.kind == "toxicity" and s.name in done for s in stages):
        return None
    results = gather(config, [s for s in stages if s.name in done], stages, receipts, dict(failed))
    write_pages(output, results)
    return results


def _check_changed(config: CompareConfig, stages: Sequence[Stage], receipts: Mapping[str, Receipt]) -> None:
    """Refuse to do again what was done with other settings, unless that is wanted.

    Raises:
        OutputError: There is such a stage.
    """
    changed = changed_stages(Path(config.output), stages, receipts)
    if changed and not config.overwrite:
        names = ", ".join(s.name for s in changed[:4]) + (", ..." if len(changed) > 4 else "")
        raise OutputError(
            f"{config.output} holds {len(changed)} stages made with other settings or inputs ({names}); pass --overwrite "
            "to do these again, or choose another --output"
        )


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


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    pass
