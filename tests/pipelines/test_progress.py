"""Live progress: what the watcher reads, what is printed, and that nothing of it reaches the run."""

from __future__ import annotations

import io
import re
import time

import fsspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipelines.progress import ProgressReporter, RunWatcher, Snapshot, duration, plain_line
from pipelines.run import RunSettings, run_job
from tests.helpers import Fail, Replace, job, sample_corpus
from tests.pipelines.sample_output import write_event, write_receipt, write_run
from transforms.shards.events import EventLog
from transforms.shards.files import Folder
from transforms.shards.formats import UnitLimits

SHARDS = ("a.parquet", "b.parquet")


@pytest.fixture
def out(tmp_path):
    """A planned run of two shards with two units of 10 rows each; nothing done yet."""
    write_run(tmp_path, SHARDS, 20, done=())
    return tmp_path


def _unit(out, shard, unit, *, worker="w", **fields):
    write_event(out, worker=worker, kind="unit", shard=shard, unit=unit, rows=10, **fields)


def test_a_watcher_adds_up_what_workers_report(out):
    watcher = RunWatcher(Folder(str(out)))
    now = watcher.poll()
    assert (now.rows, now.rows_planned, now.units_planned, now.shards_planned) == (0, 40, 4, 2)
    _unit(out, "a.parquet", 0, worker="one", dead=1, tokens_in=100, tokens_out=50)
    _unit(out, "b.parquet", 1, worker="two", tokens_in=10, tokens_out=5)
    now = watcher.poll()
    assert (now.rows, now.units, now.dead, now.tokens) == (20, 2, 1, 165)
    write_event(out, kind="shard", shard="a.parquet", rows=20)
    assert watcher.poll().shards == 1
    assert watcher.poll().rows == 20  # nothing is counted twice


def test_a_resumed_run_counts_what_was_done_before(out):
    write_receipt(out, "a.parquet", 0, dead=2)
    _unit(out, "a.parquet", 0)  # of the run before
    watcher = RunWatcher(Folder(str(out)))
    now = watcher.poll()
    assert (now.rows, now.units, now.dead, now.rows_before) == (10, 1, 2, 10)
    _unit(out, "a.parquet", 0)  # the runner tried it again
    _unit(out, "a.parquet", 1)
    now = watcher.poll()
    assert (now.rows, now.units) == (20, 2)


def test_receipts_of_another_configuration_do_not_count(out):
    receipt = write_receipt(out, "a.parquet", 0)
    path = out / "_tamis/receipts/a.parquet/000000.json"
    path.write_bytes(receipt._replace(key="other").dumps())
    assert RunWatcher(Folder(str(out))).poll().rows == 0


def test_tokens_of_units_under_way_are_counted_once(out):
    watcher = RunWatcher(Folder(str(out)))
    pulse = {"kind": "progress", "shard": "a.parquet", "unit": 0, "step": "Rewrite"}
    write_event(out, **pulse, tokens_in=10, tokens_out=30)
    write_event(out, **pulse, tokens_in=10, tokens_out=70)  # counted from the unit's beginning
    now = watcher.poll()
    assert (now.tokens, now.step) == (80, "Rewrite")
    _unit(out, "a.parquet", 0, tokens_in=10, tokens_out=90)
    assert watcher.poll().tokens == 100
    write_event(out, **pulse, tokens_in=10, tokens_out=90)  # late, from a bundle tried twice
    assert watcher.poll().tokens == 100


def test_half_written_lines_wait_for_their_end(out):
    watcher = RunWatcher(Folder(str(out)))
    events = out / "_tamis/events"
    events.mkdir()
    line = orjson.dumps({"kind": "unit", "shard": "a.parquet", "unit": 0, "rows": 10}) + b"\n"
    with (events / "w.jsonl").open("ab") as file:
        file.write(line[:20])
        file.flush()
        assert watcher.poll().rows == 0
        file.write(line[20:] + b"not json\n")
        file.flush()
        assert watcher.poll().rows == 10


def test_a_plan_made_after_the_watching_began_is_found(tmp_path):
    watcher = RunWatcher(Folder(str(tmp_path)))
    assert watcher.poll().rows_planned == 0
    write_run(tmp_path, SHARDS, 20, done=())
    assert watcher.poll().rows_planned == 40


def test_events_on_an_object_store_are_one_object_each(out):
    memory = fsspec.filesystem("memory")
    for file in out.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/progress-test/{file.relative_to(out)}", file.read_bytes())
    folder = Folder("memory://progress-test")
    old = EventLog(folder)
    old.emit("unit", shard="b.parquet", unit=0, rows=10)
    watcher = RunWatcher(folder)
    assert watcher.poll().rows == 0  # that was before
    log = EventLog(folder)
    for unit in (0, 1):
        log.emit("unit", shard="a.parquet", unit=unit, rows=10)
    assert watcher.poll().rows == 20


def test_rates_and_the_time_left_come_from_recent_work(out, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: clock[0])
    watcher = RunWatcher(Folder(str(out)))
    clock[0] += 5
    _unit(out, "a.parquet", 0, tokens_in=0, tokens_out=100)
    now = watcher.poll()
    assert now.rows_per_second == pytest.approx(2.0)
    assert now.tokens_per_second == pytest.approx(20.0)
    assert now.eta == pytest.approx(15.0)
    clock[0] += 300  # a long unit: the rate of the whole run is the better guide
    now = watcher.poll()
    assert now.rows_per_second == pytest.approx(10 / 305)


@given(
    st.builds(
        Snapshot,
        rows=st.integers(0, 10**9),
        rows_planned=st.integers(0, 10**9),
        units=st.integers(0, 10**5),
        dead=st.integers(0, 99),
        rows_per_second=st.none() | st.floats(1e-6, 1e7),
        tokens_per_second=st.none() | st.floats(1e-6, 1e7),
    )
)
def test_any_state_makes_one_line(now):
    line = plain_line(now)
    assert "\n" not in line and len(line) < 160
    assert ("dead" in line) == (now.dead > 0)
    assert now.eta is None or now.eta >= 0


def test_durations_read_well():
    assert [duration(s) for s in (5, 89, 90, 3_600, 4_000, 200_000)] == [
        "5 s", "89 s", "2 min", "1 h 00 min", "1 h 07 min", "2 d 7 h",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ the reporter


def _console(**kwargs) -> Console:
    return Console(file=io.StringIO(), width=160, **kwargs)


def test_plain_mode_prints_lines_and_a_last_one(out):
    console = _console()
    with ProgressReporter(str(out), mode="auto", interval=0.05, console=console) as reporter:
        _unit(out, "a.parquet", 0)
        deadline = time.monotonic() + 5
        while reporter.snapshot.rows < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        _unit(out, "a.parquet", 1, dead=3)
    lines = console.file.getvalue().splitlines()
    assert any(line.startswith("10/40 rows (25 %), 1/4 units") for line in lines)
    assert lines[-1].startswith("20/40 rows (50 %), 2/4 units")
    assert "3 dead" in lines[-1]
    assert (
        len({line.split(" rows")[0] for line in lines}) == len([li for li in lines if "rows" in li])
        or len(lines) < 6
    )


def test_bars_are_drawn_on_a_terminal(out):
    console = _console(force_terminal=True, force_interactive=True)
    with ProgressReporter(str(out), console=console):
        _unit(out, "a.parquet", 0)
        time.sleep(0.7)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "rows" in text and "units" in text and "shards" in text
    assert "10/40" in text and "1/4" in text


def test_quiet_mode_says_nothing(out):
    console = _console()
    with ProgressReporter(str(out), mode="quiet", interval=0.01, console=console):
        _unit(out, "a.parquet", 0)
        time.sleep(0.05)
    assert console.file.getvalue() == ""


def test_an_error_in_the_block_is_not_swallowed(out):
    with pytest.raises(ZeroDivisionError), ProgressReporter(str(out), interval=0.01, console=_console()):
        _ = 1 / 0


@pytest.mark.parametrize("damage", ["plan", "events", "console", "url"])
def test_nothing_that_goes_wrong_reaches_the_run(out, damage):
    console, url = _console(), str(out)
    if damage == "plan":
        (out / "_tamis/plan.json").write_text("{ not json")
    elif damage == "events":
        (out / "_tamis/events").write_text("a file where a folder should be")
    elif damage == "console":
        console.file.close()
    else:
        url = "nosuchprotocol://x/y"
    done = []
    with ProgressReporter(url, mode="plain", interval=0.01, console=console):
        time.sleep(0.05)
        done.append(True)
    assert done


def test_a_real_run_is_followed_to_its_end(tmp_path):
    console = _console()
    output = tmp_path / "out"
    corpus = sample_corpus(tmp_path / "in", shards=1, rows=60)
    steps = (Replace(), Fail())
    settings = RunSettings(limits=UnitLimits(rows=20), progress="quiet")
    with ProgressReporter(str(output), mode="plain", interval=0.05, console=console) as reporter:
        result = run_job(job(output, steps), str(corpus), settings)
    now = reporter.snapshot
    totals = result.manifest["totals"]
    assert now.rows == now.rows_planned == totals["rows_in"] == 120
    assert now.units == now.units_planned == 6
    assert now.shards == 2
    assert now.dead == totals["rows_dead"] > 0
    assert now.state == "finished"
    assert console.file.getvalue().splitlines()[-1].startswith("120/120 rows (100 %), 6/6 units")
