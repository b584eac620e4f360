"""A whole job through the runner: what stands in the output, and what it says of itself."""

import json
import time

import pyarrow.parquet as pq
import pytest

from pipelines.run import RunSettings
from pipelines.verify import verify_output
from schemas.errors import TooManyDeadError
from tests.conftest import ROOT
from tests.helpers import (
    Drop,
    Fail,
    Keep,
    NeedScratch,
    Replace,
    files_below,
    read_output,
    read_texts,
    run,
    run_plainly,
    sample_corpus,
    sample_texts,
    write_jsonl,
    write_parquet,
)
from transforms.shards.events import read_events
from transforms.shards.files import Folder

STEPS = [Drop(), Fail(), NeedScratch(), Replace()]


@pytest.fixture
def corpus(tmp_path):
    return sample_corpus(tmp_path / "in")


def test_an_identity_step_gives_byte_identical_copies(corpus, tmp_path):
    result = run(corpus, tmp_path / "out", [Keep()], unit_rows=7)
    assert result.state == "finished" and result.done == 0
    assert files_below(tmp_path / "out" / "data") == files_below(corpus)
    assert all(s["copied"] for s in result.manifest["shards"])
    assert not any((tmp_path / "out" / f).exists() for f in ("edits", "dropped", "dead", "attributes"))


def test_the_runner_gives_what_the_pure_functions_give(corpus, tmp_path):
    """Beam adds nothing, loses nothing and reorders nothing."""
    for rows in (7, 1000):
        run(corpus, tmp_path / f"out{rows}", STEPS, unit_rows=rows, id_column="doc")
    run_plainly(corpus, tmp_path / "plain", STEPS, id_column="doc")
    assert (
        read_output(tmp_path / "out7") == read_output(tmp_path / "out1000") == read_output(tmp_path / "plain")
    )


def test_a_finished_output_passes_its_own_verification(corpus, tmp_path):
    run(corpus, tmp_path / "out", STEPS, unit_rows=7)
    verdict = verify_output(str(tmp_path / "out"))
    assert not verdict.problems and verdict.compared
    assert verdict.rows == 2 * sum("spam" not in t and "poison" not in t for t in sample_texts(120))


def test_the_manifest_says_what_was_run(corpus, tmp_path):
    config = {"threshold": 0.5, "nested": {"a": [1, 2]}}
    models = ({"name": "m", "revision": "r1", "kind": "scorer"},)
    run(corpus, tmp_path / "out", STEPS, seed=3, config=config, models=models, id_column="doc", name="clean")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["job"], manifest["seed"], manifest["config"], manifest["models"]) == (
        "clean",
        3,
        config,
        list(models),
    )
    assert manifest["input"] | {"bytes": 0} == {
        "root": str(corpus), "text_column": "text", "id_column": "doc", "shards": 4, "bytes": 0,
        "ignored": 0, "ignored_examples": [],
    }  # fmt: skip
    assert manifest["input"]["bytes"] == sum(p.stat().st_size for p in corpus.rglob("*.*"))
    assert manifest["environment"]["packages"]["apache-beam"] and manifest["environment"]["python"]
    assert (tmp_path / "out" / "_SUCCESS").read_text().strip() == manifest["run_id"] != ""
    assert manifest["created"] <= manifest["finished"] and manifest["seconds"] >= 0
    totals = manifest["totals"]
    assert totals["rows_in"] == totals["rows_kept"] + totals["rows_dropped"] + totals["rows_dead"] == 240


def test_files_of_other_kinds_are_not_left_out_without_a_word(corpus, tmp_path, capsys):
    from pipelines.score import ScoreConfig, print_result
    from pipelines.score import run as score

    for name in ("b.csv", "more/c.jsonl.bz2", ".hidden.csv"):
        (corpus / name).write_text("x")
    config = ScoreConfig(input=str(corpus), output=str(tmp_path / "out"), scorer="lexicon")
    for state in ("finished", "already finished"):
        result = score(config, RunSettings(progress="quiet"))
        print_result(config, result)
        printed = capsys.readouterr().out
        assert state in printed and "\n2 other files ignored (b.csv, more/c.jsonl.bz2)\n" in printed
    assert result.manifest["input"]["ignored"] == 2
    assert result.manifest["input"]["ignored_examples"] == ["b.csv", "more/c.jsonl.bz2"]
    for i in range(4):
        (corpus / f"{i}.csv").write_text("x")
    planned = score(config, RunSettings(progress="quiet", dry_run=True))
    assert planned.notes == ("6 other files ignored (0.csv, 1.csv, 2.csv, ...)",)


def test_events_tell_the_run_from_its_start_to_its_end(corpus, tmp_path):
    result = run(corpus, tmp_path / "out", STEPS, unit_rows=20)
    events = read_events(Folder(str(tmp_path / "out")))
    assert (events[0]["kind"], events[0]["state"]) == ("run", "started")
    assert (events[-1]["kind"], events[-1]["state"]) == ("run", "finished")
    units = [e for e in events if e["kind"] == "unit"]
    assert len(units) == result.plan.units == events[0]["units"]
    assert sum(e["rows"] for e in units) == 240 == sum(e["kept"] + e["dropped"] + e["dead"] for e in units)
    assert sum(e["tokens_out"] for e in units) == result.manifest["totals"]["edits"]
    assert sorted(e["shard"] for e in events if e["kind"] == "shard") == [s.name for s in result.plan.shards]


def test_a_second_run_does_nothing(corpus, tmp_path):
    first = run(corpus, tmp_path / "out", STEPS)
    before = {
        p: (tmp_path / "out" / p).stat().st_mtime_ns for p in files_below(tmp_path / "out") if "lock" not in p
    }
    second = run(corpus, tmp_path / "out", STEPS)
    assert second.state == "already finished" and second.manifest == first.manifest
    assert before == {p: (tmp_path / "out" / p).stat().st_mtime_ns for p in before}


def test_a_second_run_after_a_shard_was_added_changed_and_removed(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out, STEPS)
    write_jsonl(corpus / "new.jsonl", sample_texts(10, seed=500))
    write_parquet(corpus / "part-0.parquet", sample_texts(30, seed=700))
    (corpus / "part-1.parquet").unlink()
    result = run(corpus, out, STEPS)
    assert result.state == "finished" and result.done == 2  # the two JSONL shards that are as they were
    run(corpus, tmp_path / "fresh", STEPS)
    assert read_output(out) == read_output(tmp_path / "fresh")


def test_an_output_is_an_input(corpus, tmp_path):
    first = run(corpus, tmp_path / "one", [Drop()], name="first")
    second = run(tmp_path / "one", tmp_path / "two", [Replace()], name="second")
    assert second.manifest["lineage"]["job"] == "first"
    assert second.manifest["lineage"]["run_id"] == first.manifest["run_id"]
    assert second.manifest["totals"]["rows_in"] == first.manifest["totals"]["rows_kept"]
    third = run(tmp_path / "two", tmp_path / "three", [Keep()], name="third")
    assert third.manifest["lineage"]["lineage"]["job"] == "first"


def test_a_dry_run_plans_and_writes_nothing(corpus, tmp_path):
    result = run(corpus, tmp_path / "out", STEPS, dry_run=True, unit_rows=20)
    assert result.state == "planned" and result.plan.units == 12 and result.manifest is None
    assert not (tmp_path / "out").exists()


def test_rows_may_die_up_to_max_dead(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", ["fine", "poison", "fine", "poison"])
    assert run(tmp_path / "in", tmp_path / "out", [Fail()], max_dead=2).manifest["totals"]["rows_dead"] == 2
    with pytest.raises(
        TooManyDeadError, match=r"2 rows are dead and --max-dead is 1; .* run the same command again"
    ):
        run(tmp_path / "in", tmp_path / "strict", [Fail()], max_dead=1)
    assert not (tmp_path / "strict" / "_SUCCESS").exists() and not (tmp_path / "strict" / "data").exists()


def test_a_run_stopped_by_max_dead_goes_on_with_a_larger_one(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", ["fine", "poison", "fine", "poison"])
    for _ in range(2):  # what is dead already counts in every later run
        with pytest.raises(TooManyDeadError):
            run(tmp_path / "in", tmp_path / "out", [Fail()], max_dead=1, unit_rows=1)
    assert run(tmp_path / "in", tmp_path / "out", [Fail()], max_dead=2, unit_rows=1).state == "finished"


def test_units_done_by_workers_apart_count_together_against_max_dead(tmp_path):
    for i in range(6):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", ["poison"])
    with pytest.raises(TooManyDeadError, match="--max-dead is 5"):
        args = ("--direct_running_mode=multi_threading", "--direct_num_workers=3")
        run(tmp_path / "in", tmp_path / "out", [Fail()], max_dead=5, beam_args=args)


def test_a_shard_that_cannot_be_read_counts_against_max_dead(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", ["fine"])
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(TooManyDeadError):
        run(tmp_path / "in", tmp_path / "out", [Keep()], max_dead=0)
    result = run(tmp_path / "in", tmp_path / "out", [Keep()], max_dead=1)
    assert result.state == "finished"
    (dead,) = pq.read_table(tmp_path / "out" / "dead" / "b.parquet").to_pylist()
    assert dead["row"] == -1 and dead["stage"] == "ReadShard" and dead["error"]
    assert set(files_below(tmp_path / "out" / "data")) == {"a.jsonl"}


def test_a_large_file_is_read_by_several_tasks_and_comes_back_as_one(tmp_path):
    texts = sample_texts(3000)
    write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    args = ("--direct_running_mode=multi_threading", "--direct_num_workers=4")
    result = run(tmp_path / "in", tmp_path / "out", [Replace()], unit_rows=50, beam_args=args)
    assert result.plan.units == 60
    assert len(list(result.plan.tasks(set(), 4))) >= 4
    assert read_texts(tmp_path / "out" / "data" / "a.jsonl") == [t.replace("idiot", "person") for t in texts]


def test_shards_under_one_name_in_two_folders_stay_apart(tmp_path):
    for folder in ("a", "b"):
        write_jsonl(tmp_path / "in" / folder / "x.jsonl", [f"idiot {folder}"])
    run(tmp_path / "in", tmp_path / "out", [Replace()])
    assert read_texts(tmp_path / "out" / "data" / "a" / "x.jsonl") == ["person a"]
    assert read_texts(tmp_path / "out" / "data" / "b" / "x.jsonl") == ["person b"]
    assert pq.read_table(tmp_path / "out" / "edits" / "b" / "x.jsonl.parquet").column(
        "shard"
    ).to_pylist() == ["b/x.jsonl"]


def test_odd_shard_names(tmp_path):
    odd = [
        "with space.jsonl",
        "été 東京.jsonl",
        "a\tb.jsonl",
        "%20#?&.jsonl",
        "x=1/y=2/part.jsonl",
        "-.jsonl",
        "'\".jsonl",
    ]
    for name in odd:
        write_jsonl(tmp_path / "in" / name, ["idiot"])
    run(tmp_path / "in", tmp_path / "out", [Replace()])
    assert set(files_below(tmp_path / "out" / "data")) == set(odd)
    assert set(files_below(tmp_path / "out" / "edits")) == {n + ".parquet" for n in odd}


def test_a_job_may_be_started_from_another_folder(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "work" / "in" / "a.jsonl", ["idiot", "fine"])
    monkeypatch.chdir(tmp_path / "work")
    run("in", "out", [Replace()])
    monkeypatch.chdir(tmp_path)
    assert run("work/in", "work/out", [Replace()]).state == "already finished"
    assert run(tmp_path / "work" / "in" / "a.jsonl", "single", [Replace()]).state == "finished"


def test_a_file_beside_its_output(tmp_path, monkeypatch):
    """`tamis detox corpus.jsonl --output out`, the first thing anybody types."""
    write_jsonl(tmp_path / "corpus.jsonl", ["idiot"])
    monkeypatch.chdir(tmp_path)
    assert run("corpus.jsonl", "out", [Replace()]).state == "finished"
    assert run("*.jsonl", "out2", [Replace()]).state == "finished"
    assert run("corpus.jsonl", "out", [Replace()]).state == "already finished"
    assert set(files_below(tmp_path / "out" / "data")) == {"corpus.jsonl"}


def test_other_file_settings_are_applied_to_a_finished_output(corpus, tmp_path):
    from transforms.shards.formats import AssembleOptions

    out = tmp_path / "out"
    run(corpus, out, STEPS)
    again = run(corpus, out, STEPS, assemble=AssembleOptions(compression="zstd"))
    assert again.state == "finished" and again.done == again.plan.units
    assert (
        pq.ParquetFile(out / "data" / "part-0.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    )


def test_a_shard_missing_from_a_finished_output_is_made_again(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out, STEPS)
    before = read_output(out)
    (out / "data" / "part-0.parquet").unlink()
    assert run(corpus, out, STEPS).state == "finished"
    assert read_output(out) == before


def test_a_report_is_written_before_the_manifest_closes(corpus, tmp_path):
    run(corpus, tmp_path / "out", [Keep()], on_finish="tests.jobs.test_engine_output:write_report")
    assert (tmp_path / "out" / "report.html").read_text() == "no _SUCCESS yet, 240 rows"


def write_report(url, options=None):
    output = Folder(url)
    rows = json.loads(output.read("manifest.json"))["totals"]["rows_in"]
    output.write(
        "report.html", f"{'' if output.exists('_SUCCESS') else 'no _SUCCESS yet, '}{rows} rows".encode()
    )


def test_no_reader_ever_sees_part_of_a_shard(tmp_path):
    """While a job runs, whoever lists data/ finds nothing, or whole shards."""
    import subprocess
    import sys

    corpus = sample_corpus(tmp_path / "in", shards=3, rows=200)
    run_plainly(corpus, tmp_path / "whole", [Replace()])
    whole = files_below(tmp_path / "whole" / "data")
    out = tmp_path / "out"
    code = f"from tests.helpers import *; run({str(corpus)!r}, {str(out)!r}, [Replace()], unit_rows=20)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    looks = 0
    try:
        while process.poll() is None:
            for path in (
                (p for p in (out / "data").rglob("*") if p.is_file()) if (out / "data").exists() else ()
            ):
                name = str(path.relative_to(out / "data"))
                assert path.read_bytes() == whole[name]
            if (out / "_SUCCESS").exists():
                assert set(files_below(out / "data")) == set(whole)
            looks += 1
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and looks > 20
    assert files_below(out / "data") == whole
