"""`tamis status`: the state a folder is in, and what to do next."""

from __future__ import annotations

import fcntl
import io
import json
import time

import orjson
import pytest
from rich.console import Console

from pipelines.status import read_status, show_status
from schemas.errors import FatalStepError, OutputError
from tests.helpers import Fail, Keep, StopAt, run, sample_corpus
from tests.pipelines.sample_output import build_output, write_event, write_receipt, write_run

SHARDS = ("a.parquet", "b.parquet")


def _shown(out, **kwargs) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    show_status(str(out), console=console, **kwargs)
    return console.file.getvalue()


def test_a_finished_run(tmp_path):
    sample = build_output(tmp_path / "out")
    status = read_status(str(sample.path))
    assert (status.state, status.job, status.run_id) == ("finished", "detox", "run-1")
    assert (status.snapshot.units, status.snapshot.units_planned) == (4, 4)
    assert (status.snapshot.shards, status.snapshot.shards_planned) == (2, 2)
    assert status.totals["rows_kept"] == sample.kept
    assert status.dead == [("RewriteToxicSegments", "ValueError: row # is bad", sample.dead)]
    text = _shown(sample.path)
    assert "finished" in text and f"{sample.kept} kept" in text
    assert "report.html" not in text  # there is none
    (sample.path / "report.html").write_text("x")
    assert f"{sample.path}/report.html shows what happened" in _shown(sample.path)


def test_a_stopped_run_can_be_resumed(tmp_path):
    write_run(tmp_path, SHARDS, 20, done=("a.parquet",))
    write_receipt(tmp_path, "b.parquet", 0, dead=4)
    began = time.time() - 5_000
    write_event(tmp_path, kind="run", state="started", run_id="r2", t=began)
    write_event(tmp_path, kind="unit", shard="b.parquet", unit=0, rows=10, dead=4, t=began + 20)
    status = read_status(str(tmp_path))
    assert status.state == "stopped"
    assert (status.snapshot.rows, status.snapshot.rows_planned) == (30, 40)
    assert (status.snapshot.units, status.snapshot.shards, status.snapshot.dead) == (3, 1, 4)
    assert status.rows_per_second == pytest.approx(0.5)
    text = _shown(tmp_path)
    assert "run the same command again" in text
    assert "30 of 40 committed (75.0 %)" in text
    assert "4 rows so far" in text
    assert "committed b.parquet unit 0: 10 rows, 4 dead" in text


def test_a_run_at_work_holds_the_lock(tmp_path):
    write_run(tmp_path, SHARDS, 20, done=("a.parquet",))
    write_event(tmp_path, kind="run", state="started", t=time.time() - 40)
    write_event(tmp_path, kind="unit", shard="a.parquet", unit=1, rows=20, t=time.time() - 20)
    write_event(tmp_path, kind="progress", shard="b.parquet", unit=0, step="Rewrite", t=time.time())
    with (tmp_path / "_tamis/lock").open("a") as file:
        assert read_status(str(tmp_path)).state == "stopped"
        fcntl.flock(file, fcntl.LOCK_EX)
        status = read_status(str(tmp_path))
        assert (status.state, status.snapshot.step) == ("running", "Rewrite")
        text = _shown(tmp_path)
        assert "running, Rewrite" in text and "left" in text
    # Asking must not leave the lock behind.
    with (tmp_path / "_tamis/lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_work_of_a_replaced_run_does_not_count(tmp_path):
    write_run(tmp_path, SHARDS, 20, done=())
    for shard in SHARDS:
        write_event(tmp_path, kind="unit", shard=shard, unit=0, rows=10, t=1.0)
    assert read_status(str(tmp_path)).snapshot.rows == 0


def test_long_runs_keep_their_beginning(tmp_path):
    write_run(tmp_path, SHARDS, 20, done=())
    write_event(tmp_path, kind="run", state="started", run_id="long", t=1_000.0)
    for i in range(1_000):
        write_event(tmp_path, kind="unit", shard="a.parquet", unit=i, rows=5, t=1_001.0 + i)
    status = read_status(str(tmp_path))
    assert status.run_id == "long"
    assert status.rows_per_second == pytest.approx(5.0, rel=0.01)
    assert len(status.events) == 6


def test_json_can_be_read_by_a_program(tmp_path):
    sample = build_output(tmp_path / "out")
    status = json.loads(_shown(sample.path, as_json=True))
    assert status["state"] == "finished"
    assert status["snapshot"]["rows"] == len(sample.before)


def test_unreadable_shards_and_a_failed_report_are_named(tmp_path):
    sample = build_output(tmp_path / "out")
    plan = orjson.loads((sample.path / "_tamis/plan.json").read_bytes())
    plan["shards"][1] |= {"error": "not Parquet", "units": [], "rows": 0}
    (sample.path / "_tamis/plan.json").write_bytes(orjson.dumps(plan))
    manifest = orjson.loads((sample.path / "manifest.json").read_bytes()) | {"report_error": "OSError: full"}
    (sample.path / "manifest.json").write_bytes(orjson.dumps(manifest))
    text = _shown(sample.path)
    assert "en/part-1.parquet: not Parquet" in text
    assert "could not be written: OSError: full" in text


def test_a_training_folder_has_a_status_too(tmp_path):
    write_event(tmp_path, kind="run", state="started", job="train-lm", t=1.0)
    write_event(tmp_path, kind="train", event="log", step=10, loss=2.34567, t=2.0)
    text = _shown(tmp_path)
    assert "train-lm" in text and "log step=10 loss=2.346" in text
    write_event(tmp_path, kind="run", state="finished", job="train-lm", t=3.0)
    assert read_status(str(tmp_path)).state == "finished"


def test_a_folder_no_job_ran_in_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="no job ever ran here"):
        read_status(str(tmp_path))
    with pytest.raises(OutputError, match="no such folder"):
        read_status(str(tmp_path / "nowhere"))


def test_a_real_run_stopped_and_resumed(tmp_path):
    corpus, out, allowed = sample_corpus(tmp_path / "in", shards=1), tmp_path / "out", tmp_path / "allowed"
    steps = (Fail(), StopAt(str(allowed), "part-0.parquet", 2), Keep())
    with pytest.raises(FatalStepError):
        run(corpus, out, steps, unit_rows=20)
    stopped = read_status(str(out))
    assert stopped.state == "stopped"
    assert 0 < stopped.snapshot.rows < stopped.snapshot.rows_planned == 120
    assert stopped.snapshot.units * 20 == stopped.snapshot.rows
    allowed.touch()
    result = run(corpus, out, steps, unit_rows=20)
    finished = read_status(str(out))
    assert finished.state == "finished"
    assert finished.snapshot.rows == 120 and finished.snapshot.shards == 2
    assert finished.snapshot.dead == result.manifest["totals"]["rows_dead"]
    assert sum(n for _, _, n in finished.dead) == finished.snapshot.dead
    assert finished.run_id == result.manifest["run_id"]
