"""Live progress of a run: bars on a terminal, lines elsewhere, read from the events the workers append.

Beam's local runners show no live metrics, so whoever wants to know how far a run is reads `_tamis/`: the plan says
what there is to do, receipts what was done before, and the events what has been done since.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import orjson

from transforms.shards.files import Folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_LOG = logging.getLogger(__name__)
_EVENTS, _JOB, _SHARDS = "_tamis/events", "_tamis/job.json", "_tamis/shards"
_WINDOW = 120.0  # seconds over which rates are taken, once a run is older than that
_SIGN_OF_LIFE = 6  # unchanged plain lines are printed only every so many intervals


@dataclass
class Snapshot:
    """How far a run is at one moment.

    Attributes:
        rows: Rows committed, of `rows_planned`.
        units: Units committed, of `units_planned`.
        shards: Shards assembled, of `shards_planned`.
        rows_before: Rows already committed when watching began.
        dead: Rows that failed, so far.
        tokens: Tokens read and written by models since watching began, units under way included.
        seconds: Time since watching began.
        rows_per_second: Recent rate; None before there is one.
        tokens_per_second: Likewise.
        step: Step a worker last reported from.
        state: `started` or `finished`, as the last `run` event said.
        analysed: Rows that an analysis before the job has seen since watching began.
    """

    rows: int = 0
    rows_planned: int = 0
    rows_before: int = 0
    units: int = 0
    units_planned: int = 0
    shards: int = 0
    shards_planned: int = 0
    dead: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    step: str = ""
    state: str = ""
    analysed: int = 0

    @property
    def eta(self) -> float | None:
        """Seconds left for the rows that remain, at the recent rate; None before there is one."""
        left = self.rows_planned - self.rows
        if left <= 0:
            return 0.0
        return left / self.rows_per_second if self.rows_per_second else None


class RunWatcher:
    """Reads what is new under `_tamis/` each time it is asked.

    Args:
        folder: Output folder of the run.
        from_start: Read and keep all events there are, for a look back; what is done is then told by the receipts
            alone, since events may stem from runs whose work was replaced.
    """

    def __init__(self, folder: Folder, *, from_start: bool = False) -> None:
        self.folder = folder
        self._from_start = from_start
        self._offsets: dict[str, int] = {}
        self._done: set[tuple[str, int]] = set()
        self._assembled: set[str] = set()
        self._committed_tokens = 0
        self._under_way: dict[tuple[str, int], dict[tuple[str, str], int]] = {}
        self._history: deque[tuple[float, int, int]] = deque()
        self._planned = False
        self._began = time.monotonic()
        self.snapshot = Snapshot()
        self.events: list[dict[str, Any]] = []  # the last 200, or all of them
        if not from_start:
            self._offsets = self._sizes()
        self._read_plan()
        self._history.append((0.0, self.snapshot.rows, 0))

    def poll(self) -> Snapshot:
        """Take in what is new, and say how far the run is."""
        now = self.snapshot
        if not self._planned:
            self._read_plan()
        for event in self._new_events():
            self._take(event)
        now.seconds = time.monotonic() - self._began
        under_way = sum(sum(steps.values()) for steps in self._under_way.values())
        now.tokens = self._committed_tokens + under_way
        self._rate()
        return now

    def _read_plan(self) -> None:
        """The plan and the good receipts: what there is to do, and what an earlier run has done of it."""
        from transforms.shards.plan import load_plan
        from transforms.shards.receipts import read_receipts

        plan = load_plan(self.folder)
        if plan is None or not self.folder.exists(_JOB):
            return
        self._planned = True
        now = self.snapshot
        now.rows_planned, now.units_planned, now.shards_planned = plan.rows, plan.units, len(plan.shards)
        config_hash = orjson.loads(self.folder.read(_JOB)).get("config_hash", "")
        for (shard, unit), receipt in read_receipts(self.folder, plan, config_hash).items():
            if (shard, unit) not in self._done:
                self._done.add((shard, unit))
                now.rows += receipt.rows
                now.dead += receipt.dead
        now.units = len(self._done)
        now.rows_before = now.rows
        if self._from_start:
            names = {f"{_SHARDS}/{shard.name}.json" for shard in plan.shards}
            self._assembled = names & set(self.folder.find(_SHARDS))
            now.shards = len(self._assembled)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, now = event.get("kind"), self.snapshot
        if kind == "unit":
            self._commit(event)
        elif kind == "shard" and not self._from_start:
            self._assembled.add(str(event.get("shard")))
            now.shards = len(self._assembled)
        elif kind == "progress":
            now.step = str(event.get("step") or now.step)
            unit = (str(event.get("shard")), int(event.get("unit") or 0))
            if unit not in self._done:
                # Counts of a step run from the beginning of its unit: the last report stands for all before it.
                by_step = self._under_way.setdefault(unit, {})
                by_step[str(event.get("worker")), now.step] = _tokens(event)
        elif kind == "analyse":
            now.analysed += int(event.get("rows") or 0)
        elif kind == "run":
            now.state = str(event.get("state") or now.state)
        self.events.append(dict(event))
        if not self._from_start:
            del self.events[:-200]

    def _commit(self, event: Mapping[str, Any]) -> None:
        unit = (str(event.get("shard")), int(event.get("unit") or 0))
        self._under_way.pop(unit, None)
        if (
            self._from_start or unit in self._done
        ):  # a bundle the runner tried twice, or a receipt read at the start
            return
        self._done.add(unit)
        now = self.snapshot
        now.units = len(self._done)
        now.rows += int(event.get("rows") or 0)
        now.dead += int(event.get("dead") or 0)
        self._committed_tokens += _tokens(event)

    def _rate(self) -> None:
        now = self.snapshot
        self._history.append((now.seconds, now.rows, now.tokens))
        while len(self._history) > 2 and self._history[1][0] < now.seconds - _WINDOW:
            self._history.popleft()
        then, rows, tokens = self._history[0]
        span = now.seconds - then
        if span >= 1.0:
            # Units are committed whole: with none in the window, the whole run is the better guide.
            done = (now.rows - rows) / span if now.rows > rows else (now.rows - now.rows_before) / now.seconds
            now.rows_per_second = done or None
            now.tokens_per_second = max(0, now.tokens - tokens) / span or None

    def _sizes(self) -> dict[str, int]:
        if not self.folder.is_local:
            return dict.fromkeys(self.folder.find(_EVENTS), 1)  # objects never grow
        root = self.folder.local(_EVENTS)
        if not root.is_dir():
            return {}
        return {f"{_EVENTS}/{p.name}": p.stat().st_size for p in root.glob("*.jsonl")}

    def _new_events(self) -> list[dict[str, Any]]:
        fresh: list[dict[str, Any]] = []
        sizes = self._sizes()
        if self.folder.is_local:
            for name, size in sizes.items():
                offset = self._offsets.get(name, 0)
                if size > offset:
                    with self.folder.local(name).open("rb") as file:
                        file.seek(offset)
                        content = file.read(size - offset)
                    whole = content.rfind(b"\n") + 1  # a line still being written waits for its end
                    self._offsets[name] = offset + whole
                    fresh += _parse(content[:whole])
        else:
            names = [name for name in sizes if name not in self._offsets]
            for name, content in self.folder.read_many(names).items():
                self._offsets[name] = 1
                fresh += _parse(content)
        return sorted(fresh, key=lambda e: float(e.get("t") or 0))


def _tokens(event: Mapping[str, Any]) -> int:
    return int(event.get("tokens_in") or 0) + int(event.get("tokens_out") or 0)


def _parse(content: bytes) -> list[dict[str, Any]]:
    events = []
    for line in content.splitlines():
        try:
            event = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue  # cut short by a kill
        if isinstance(event, dict):
            events.append(event)
    return events


@dataclass
class ProgressReporter:
    """Shows the progress of the run inside its `with` block, from a thread of its own; never raises into the run.

    Attributes:
        out: Output folder of the run, local or any fsspec URL.
        mode: `auto` (bars on a terminal, else lines), `plain`, `quiet`.
        interval: Seconds between plain lines.
        options: fsspec options of the folder's filesystem.
        console: Where to show it; the default is standard error.
    """

    out: str
    mode: str = "auto"
    interval: float = 10.0
    options: Mapping[str, Any] = field(default_factory=dict)
    console: Console | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._watcher: RunWatcher | None = None
        self._last = ""
        self._unchanged = 0

    @property
    def snapshot(self) -> Snapshot:
        """How far the run was when last looked at."""
        return self._watcher.snapshot if self._watcher else Snapshot()

    def __enter__(self) -> ProgressReporter:
        if self.mode != "quiet":
            try:
                self._watcher = RunWatcher(Folder(self.out, **self.options))
                self._thread = threading.Thread(target=self._run, name="tamis-progress", daemon=True)
                self._thread.start()
            except Exception as error:
                _LOG.debug("no progress is shown: %s", error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            console = self.console or _stderr()
            if self.mode == "auto" and console.is_terminal:
                self._draw(console)
            else:
                self._print(console)
        except Exception as error:  # the run must not suffer from what only watches it
            _LOG.debug("progress stopped: %s", error)

    def _draw(self, console: Console) -> None:
        assert self._watcher is not None
        wait = 0.5 if self._watcher.folder.is_local else 3.0
        with _bars(console) as bars:
            rows = bars.add_task("rows", total=None, note="")
            units = bars.add_task("units", total=None, note="")
            shards = bars.add_task("shards", total=None, note="")
            while True:
                stopping = self._stop.wait(wait)
                self._update(bars, rows, units, shards, self._watcher.poll())
                if stopping:
                    return

    @staticmethod
    def _update(bars: Progress, rows: TaskID, units: TaskID, shards: TaskID, now: Snapshot) -> None:
        bars.update(rows, completed=now.rows, total=now.rows_planned or None, note=_note(now))
        bars.update(units, completed=now.units, total=now.units_planned or None, note=now.step)
        bars.update(shards, completed=now.shards, total=now.shards_planned or None)

    def _print(self, console: Console) -> None:
        assert self._watcher is not None
        while True:
            stopping = self._stop.wait(self.interval)
            line = plain_line(self._watcher.poll())
            done = line.partition(" rows,")[0]
            self._unchanged = 0 if done != self._last else self._unchanged + 1
            if done != self._last or self._unchanged >= _SIGN_OF_LIFE or stopping:
                self._last, self._unchanged = done, 0
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            if stopping:
                return


def plain_line(now: Snapshot) -> str:
    """Progress in one line of text, for logs."""
    share = f" ({100 * now.rows / now.rows_planned:.0f} %)" if now.rows_planned else ""
    parts = [f"{now.rows:,}/{now.rows_planned:,} rows{share}", f"{now.units:,}/{now.units_planned:,} units"]
    if now.shards:
        parts.append(f"{now.shards:,}/{now.shards_planned:,} shards assembled")
    return ", ".join([*parts, *_rates(now)])


def _note(now: Snapshot) -> str:
    return "  ".join(_rates(now))


def _rates(now: Snapshot) -> list[str]:
    parts = []
    if now.rows_per_second:
        parts.append(f"{_short(now.rows_per_second)} rows/s")
    if now.tokens_per_second:
        parts.append(f"{_short(now.tokens_per_second)} tokens/s")
    if now.eta:
        parts.append(f"{duration(now.eta)} left")
    if now.dead:
        parts.append(f"{now.dead:,} dead")
    return parts


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 0.1 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _stderr() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr)


def _bars(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description:>6}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
        console=console,
        refresh_per_second=4,
    )
