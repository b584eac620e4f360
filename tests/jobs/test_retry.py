"""`tamis retry` of jobs other than detox: what died is replayed, what lives is left, a job it does not know is left whole."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from pipelines.cli import app
from schemas.errors import InputError, OutputError

ROWS = [{"id": f"r{i}", "title": f"row {i}", "text": f"a sentence of its own, number {i}"} for i in range(12)]
JOBS = {
    "score": ["--scorer", "lexicon"],
    "embed": ["--text", "{title}: {text}", "--prefix", "passage: ", "--store", "float16"],
}


def tamis(*words: object):
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.mark.parametrize("job", JOBS)
def test_a_shard_that_could_not_be_read_is_read_again_with_the_settings_of_the_run(job, tmp_path: Path):
    folder, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    folder.mkdir()
    pl.DataFrame(ROWS[:6]).write_parquet(folder / "a.parquet")
    pl.DataFrame(ROWS[6:]).write_parquet(folder / "b.parquet")
    told = ["--id-column", "id", "--progress", "quiet", *JOBS[job]]
    assert tamis(job, folder, "-o", whole, *told).exit_code == 0
    good = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(good[: len(good) // 2])
    done = tamis(job, folder, "-o", out, *told)
    assert done.exit_code == 0, done.output
    assert json.loads((out / "manifest.json").read_text())["totals"]["rows_kept"] == 6
    before = (out / "data" / "a.parquet").stat().st_mtime_ns
    (folder / "b.parquet").write_bytes(good)
    said = tamis("retry", out, "--dry-run")
    assert "1 unreadable shards" in said.output and (out / "_SUCCESS").exists()
    done = tamis("retry", out, "--progress", "quiet")
    assert done.exit_code == 0 and "0 dead now" in done.output, done.output
    assert (out / "data" / "a.parquet").stat().st_mtime_ns == before
    name = "score" if job == "score" else "embedding"
    for shard in ("a", "b"):
        one, two = (next((o / "attributes" / name).glob(f"{shard}*")) for o in (out, whole))
        assert pl.read_parquet(one).equals(pl.read_parquet(two))
    assert json.loads((out / "manifest.json").read_text())["totals"]["rows_kept"] == 12


def test_a_job_it_does_not_know_is_left_as_it_is(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(json.dumps({"job": "label"}))
    (tmp_path / "_SUCCESS").write_text("x\n")
    done = tamis("retry", tmp_path)
    assert isinstance(done.exception, OutputError) and "holds a label job" in str(done.exception)
    assert (tmp_path / "_SUCCESS").exists()


FILTER = [
    "--scorer",
    "lexicon",
    "--gate",
    "all",
    "--localize",
    "lexicon",
    "--ladder",
    "redact",
    "--progress",
    "quiet",
]


def with_a_dead_row(folder: Path, out: Path) -> None:
    """A finished output, one row of which died."""
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    done = tamis("score", folder, "-o", out, "--scorer", "lexicon", "--progress", "quiet")
    assert done.exit_code == 0, done.output
    assert json.loads((out / "manifest.json").read_text())["totals"]["rows_dead"] == 1


def state_of(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and "events" not in p.parts and p.name != "lock"
    }


def test_a_retry_that_is_refused_leaves_the_output_as_it_is(tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    with_a_dead_row(folder, out)
    before = state_of(out)
    folder.rename(tmp_path / "away")
    done = tamis("retry", out, "--progress", "quiet")
    assert isinstance(done.exception, InputError) and "no such input" in str(done.exception)
    assert state_of(out) == before
    (tmp_path / "away").rename(folder)
    with FileLock(out / "_tamis" / "lock"):
        done = tamis("retry", out, "--progress", "quiet")
        assert isinstance(done.exception, OutputError) and "another run" in str(done.exception)
    assert state_of(out) == before
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": "mended"}\n')
    done = tamis("retry", out, "--progress", "quiet")
    assert done.exit_code == 0 and "0 dead now" in done.output, done.output
    assert json.loads((out / "manifest.json").read_text())["totals"]["rows_kept"] == 2


def test_a_retry_that_was_killed_after_it_put_the_dead_units_back_goes_on(tmp_path: Path, monkeypatch):
    import pipelines.run

    folder, out = tmp_path / "in", tmp_path / "out"
    with_a_dead_row(folder, out)
    (folder / "a.jsonl").write_text('{"text": "fine"}\n{"text": "mended"}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.run, "run_graph", killed)
        assert tamis("retry", out, "--progress", "quiet").exit_code == 130
    assert not (out / "_SUCCESS").exists()
    assert "unfinished" in tamis("retry", out, "--dry-run").output and not (out / "_SUCCESS").exists()
    done = tamis("retry", out, "--progress", "quiet")
    assert done.exit_code == 0 and "0 dead now" in done.output, done.output
    assert json.loads((out / "manifest.json").read_text())["totals"]["rows_kept"] == 2
    assert "unfinished" not in tamis("retry", out, "--progress", "quiet").output


def test_a_way_of_showing_progress_that_there_is_not_is_refused(tmp_path: Path):
    for command in (["retry", tmp_path], ["score", tmp_path, "-o", tmp_path / "out"]):
        done = tamis(*command, "--progress", "bogus")
        assert done.exit_code == 2 and "bogus" in done.output


def test_shards_are_written_again_as_the_run_was_told_to(tmp_path: Path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    rows = [{"text": "you idiot"}, {"text": "fine"}] * 4
    for name in ("a", "b"):
        pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet", compression="snappy")
    good = (folder / "b.parquet").read_bytes()
    (folder / "b.parquet").write_bytes(good[: len(good) // 2])
    told = ["--compression", "zstd", "--row-group-rows", "3", *FILTER]
    assert tamis("detox", folder, "-o", out, *told).exit_code == 0
    (folder / "b.parquet").write_bytes(good)
    before = (out / "data" / "a.parquet").stat().st_mtime_ns
    done = tamis("retry", out, "--progress", "quiet")
    assert done.exit_code == 0 and "0 dead now" in done.output, done.output
    assert (out / "data" / "a.parquet").stat().st_mtime_ns == before
    written = pq.read_metadata(out / "data" / "b.parquet")
    assert written.row_group(0).column(0).compression == "ZSTD" and written.row_group(0).num_rows == 3


@pytest.mark.parametrize("source", ["in/a*.jsonl", "in/[a].jsonl", "in", "./in/a.jsonl"])
def test_an_input_given_from_here_is_found_from_elsewhere(
    source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with_a_dead_row(tmp_path / "in", tmp_path / "whole")
    done = tamis("score", source, "-o", "out", "--scorer", "lexicon", "--progress", "quiet")
    assert done.exit_code == 0, done.output
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "fine"}\n{"text": "mended"}\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = tamis("retry", tmp_path / "out", "--progress", "quiet")
    assert done.exit_code == 0 and "0 dead now" in done.output, done.output
