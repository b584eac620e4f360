"""`tamis retry` of jobs other than detox: what died is replayed, what lives is left, a job it does not know is left whole."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from schemas.errors import OutputError

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
