"""`tamis status`: how far a run is, what it lost, and what to do next."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.progress import RunWatcher, Snapshot, duration
from pipelines.report.costs import losses
from pipelines.report.output import Output
from schemas.errors import OutputError
from transforms.shards.files import Folder

if TYPE_CHECKING:
    from rich.console import Console

_FRESH = 60.0  # seconds within which an event means that a run is at work (workers report every two)


@dataclass
class RunStatus:
    """State of an output folder.

    Attributes:
        state: `finished`, `running`, `stopped` (it can be resumed), or `planned`.
        job: Name of the job.
        source: Its input, as the user gave it.
        run_id: Of the last run.
        snapshot: Rows, units and shards done and planned.
        unreadable: Shards that could not be read, with the reason.
        totals: Rows in, kept, changed, dropped and dead, where the run has finished.
        dead: Errors of dead rows of assembled shards: stage, error, rows.
        seconds: How long the last run took, or has taken.
        rows_per_second: Of the last run.
        events: The last few things that happened: time and text.
        report: Where the report lies, if there is one.
        report_error: Why it could not be written, if it could not.
    """

    state: str
    job: str = ""
    source: str = ""
    run_id: str = ""
    snapshot: Snapshot = field(default_factory=Snapshot)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    dead: list[tuple[str, str, int]] = field(default_factory=list)
    seconds: float | None = None
    rows_per_second: float | None = None
    events: list[tuple[float, str]] = field(default_factory=list)
    report: str = ""
    report_error: str = ""


def read_status(out: str, *, options: Mapping[str, Any] | None = None) -> RunStatus:
    """Read the state of an output folder.

    Raises:
        OutputError: There is no such folder, or no job ever ran there.
    """
    output = Output(out, options)
    folder = output.folder
    if not (output.plan or folder.exists("_tamis") or output.manifest):
        raise OutputError(f"{out}: no job ever ran here; pass the --output of one")
    watcher = RunWatcher(folder, from_start=True)
    snapshot = watcher.poll()
    job = output.read_json("_tamis/job.json") or {}
    events = watcher.events
    status = RunStatus(
        state=_state(output, folder, events),
        job=str(job.get("name") or output.manifest.get("job") or _last(events, "job")),
        source=str(job.get("source") or output.manifest.get("input", {}).get("root") or ""),
        run_id=str(output.manifest.get("run_id") or _last(events, "run_id")),
        snapshot=snapshot,
        unreadable=[(s["path"], s["error"]) for s in output.plan.get("shards", []) if s.get("error")],
        totals=dict(output.manifest.get("totals", {})),
        events=[(float(e.get("t") or 0), _describe(e)) for e in events if e.get("kind") != "progress"][-6:],
        report=f"{folder.url}/report.html" if folder.exists("report.html") else "",
        report_error=str(output.manifest.get("report_error") or ""),
    )
    if lost := losses(output, "dead", examples=1):
        status.dead = [(stage, error, n) for (stage, error), n in lost.groups.most_common(5)]
    _time(status, events, output)
    return status


def show_status(
    out: str,
    *,
    options: Mapping[str, Any] | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> RunStatus:
    """Print the state of an output folder.

    Args:
        out: Output folder of a job, local or any fsspec URL.
        options: fsspec options of its filesystem.
        as_json: Print one JSON object instead.
        console: Where to print.

    Raises:
        OutputError: There is no such folder, or no job ever ran there.
    """
    from rich.console import Console

    console = console or Console()
    status = read_status(out, options=options)
    if as_json:
        import orjson

        console.file.write(orjson.dumps(asdict(status)).decode() + "\n")
        return status
    for label, value in _lines(status):
        console.print(f"{label:<10}" if label else " " * 10, style="dim", end="")
        console.print(value, highlight=False, markup=False, soft_wrap=True)
    return status


def _lines(status: RunStatus) -> list[tuple[str, str]]:
    now = status.snapshot
    lines = [("job", f"{status.job or '?'} of {status.source or '?'}"), ("state", _advice(status))]
    if now.units_planned or now.shards_planned:
        share = f" ({100 * now.rows / now.rows_planned:.1f} %)" if now.rows_planned else ""
        lines.append(("rows", f"{now.rows:,} of {now.rows_planned:,} committed{share}"))
        lines.append(("units", f"{now.units:,} of {now.units_planned:,} committed"))
        lines.append(("shards", f"{now.shards:,} of {now.shards_planned:,} assembled"))
    if status.totals:
        names = ("rows_kept", "rows_changed", "rows_dropped", "rows_dead", "edits")
        counts = ", ".join(
            f"{status.totals[n]:,} {n.removeprefix('rows_')}" for n in names if n in status.totals
        )
        lines.append(("result", counts))
    elif now.dead:
        lines.append(("dead", f"{now.dead:,} rows so far"))
    if status.seconds is not None:
        rate = f", {status.rows_per_second:,.1f} rows/s" if status.rows_per_second else ""
        lines.append(("time", f"{duration(status.seconds)}{rate}"))
    if status.state == "running" and status.rows_per_second and now.rows < now.rows_planned:
        left = (now.rows_planned - now.rows) / status.rows_per_second
        lines.append(("", f"about {duration(left)} left"))
    for i, (stage, error, n) in enumerate(status.dead):
        lines.append(("dead" if i == 0 else "", f"{n:,} × {stage}: {error}"))
    for i, (shard, error) in enumerate(status.unreadable[:5]):
        lines.append(("unreadable" if i == 0 else "", f"{shard}: {error}"))
    if status.report_error:
        lines.append(("report", f"could not be written: {status.report_error}"))
    for i, (t, text) in enumerate(status.events):
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))
        lines.append(("events" if i == 0 else "", f"{stamp}  {text}"))
    return lines


def _advice(status: RunStatus) -> str:
    if status.state == "finished":
        return "finished" + (f"; {status.report} shows what happened" if status.report else "")
    if status.state == "running":
        return "running" + (f", {status.snapshot.step}" if status.snapshot.step else "")
    if status.state == "planned":
        return "planned; nothing has been done yet"
    return "stopped; run the same command again to go on (what is committed stays)"


def _state(output: Output, folder: Folder, events: Sequence[Mapping[str, Any]]) -> str:
    runs = [e for e in events if e.get("kind") == "run"]
    ended = bool(runs) and runs[-1].get("state") == "finished"
    if output.finished or (ended and not output.plan):
        return "finished"
    held = _is_locked(folder)
    if held or (held is None and events and time.time() - float(events[-1].get("t") or 0) < _FRESH):
        return "running"
    return "stopped" if events or folder.exists("_tamis/receipts") else "planned"


def _is_locked(folder: Folder) -> bool | None:
    """Whether a run holds the folder's lock; None where that cannot be told (an object store)."""
    if not folder.is_local:
        return None
    path = folder.local("_tamis/lock")
    if not path.exists():
        return False
    import fcntl

    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _time(status: RunStatus, events: Sequence[Mapping[str, Any]], output: Output) -> None:
    """Duration and rate of the last run, from its own events."""
    starts = [i for i, e in enumerate(events) if e.get("kind") == "run" and e.get("state") == "started"]
    if "seconds" in output.manifest:
        status.seconds = float(output.manifest["seconds"])
    if not starts:
        return
    run = events[starts[-1] :]
    began = float(run[0].get("t") or 0)
    units = [e for e in run if e.get("kind") == "unit"]
    if status.seconds is None:
        end = time.time() if status.state == "running" else float(run[-1].get("t") or began)
        status.seconds = max(0.0, end - began)
    rows = sum(int(e.get("rows") or 0) for e in units)
    if units and (span := float(units[-1].get("t") or 0) - began) > 0:
        status.rows_per_second = rows / span


def _describe(event: Mapping[str, Any]) -> str:
    kind = event.get("kind")
    if kind == "unit":
        lost = f", {event['dead']} dead" if event.get("dead") else ""
        return f"committed {event.get('shard')} unit {event.get('unit')}: {event.get('rows')} rows{lost}"
    if kind == "shard":
        return f"assembled {event.get('shard')}: {event.get('rows')} rows"
    if kind == "run":
        return f"run {event.get('state')}"
    if kind == "log":
        return str(event.get("message", ""))
    facts = {k: v for k, v in event.items() if k not in ("t", "worker", "kind", "event")}
    return f"{event.get('event') or kind} " + " ".join(f"{k}={_value(v)}" for k, v in facts.items())


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _last(events: Sequence[Mapping[str, Any]], name: str) -> str:
    return next((str(e[name]) for e in reversed(events) if e.get(name)), "")
