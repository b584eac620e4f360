"""`tamis verify` of outputs that are sound, whatever their columns hold, and of one whose input is gone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.verify import verify_output

FILTER = ["--scorer", "lexicon", "--gate", "all", "--localize", "lexicon", "--progress", "quiet"]
NAN = float("nan")
COLUMNS = {
    "float": pa.array([NAN, 1.0, None, -0.0]),
    "half": pa.array([np.float16(NAN), np.float16(1), None, np.float16(2)], pa.float16()),
    "list": pa.array([[NAN, 1.0], [], None, [None]]),
    "large": pa.array([[NAN], [], None, [1.0]], pa.large_list(pa.float32())),
    "fixed": pa.array([[NAN, 1.0], [2.0, NAN], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32(), 2)),
    "struct": pa.array([{"a": NAN, "b": ["x"]}, None, {"a": None, "b": None}, {"a": 1.0, "b": []}]),
    "map": pa.array([[("k", NAN)], [], None, [("l", 1.0)]], pa.map_(pa.string(), pa.float64())),
    "dictionary": pa.array([NAN, 1.0, None, NAN]).dictionary_encode(),
    "view": pa.array(["a value longer than twelve bytes", "b", None, ""], pa.string_view()),
    "views": pa.array([["a value longer than twelve bytes"], [], None, [""]], pa.list_(pa.string_view())),
}


def tamis(*words: object):
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.mark.parametrize("ladder", ["redact", "drop_document"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_every_kind_are_the_inputs(kind, ladder, tmp_path: Path):
    table = pa.table({"text": ["you idiot", "fine", "you idiot", "good"], kind: COLUMNS[kind]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    done = tamis("detox", tmp_path / "a.parquet", "-o", tmp_path / "out", *FILTER, "--ladder", ladder)
    assert done.exit_code == 0, done.output
    verdict = verify_output(str(tmp_path / "out"))
    assert verdict.problems == [] and verdict.rows == (4 if ladder == "redact" else 2)


def test_a_column_that_is_not_the_inputs_is_found(tmp_path: Path):
    source, out = tmp_path / "a.parquet", tmp_path / "out"
    pq.write_table(pa.table({"text": ["you idiot", "fine"], "x": [NAN, 1.0]}), source)
    assert tamis("detox", source, "-o", out, *FILTER, "--ladder", "redact").exit_code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    pq.write_table(pa.table({"text": ["you idiot", "fine"], "x": [NAN, 2.0]}), source)
    manifest["shards"][0]["source_fingerprint"] = verify_fingerprint(source)
    (out / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify_output(str(out)).problems
    assert "column 'x' differs" in problem


def verify_fingerprint(path: Path) -> str:
    from transforms.shards.files import Folder, file_fingerprint

    return file_fingerprint(Folder(str(path.parent)), path.name)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_shard_all_rows_of_which_were_dropped(suffix, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in (("a", "you idiot"), ("b", "fine")):
        path = folder / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"text": [text] * 3}), path)
        else:
            path.write_text(f'{{"text": "{text}"}}\n' * 3)
    done = tamis("detox", folder, "-o", tmp_path / "out", *FILTER, "--ladder", "drop_document")
    assert done.exit_code == 0, done.output
    verdict = verify_output(str(tmp_path / "out"))
    assert verdict.problems == [] and (verdict.shards, verdict.rows) == (2, 3)


def test_lines_with_a_mark_and_with_what_is_no_number_are_read_as_the_job_read_them(tmp_path: Path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    lines = [
        '\ufeff{"text": "you idiot", "n": 1}',
        '{"text": "you idiot", "n": NaN}',
        '{"text": "fine", "n": 2}',
    ]
    source.write_text("\n".join(lines) + "\n", "utf-8")
    assert tamis("detox", source, "-o", out, *FILTER, "--ladder", "redact").exit_code == 0
    verdict = verify_output(str(out))
    assert verdict.problems == [] and verdict.edited_rows == 2
    shown = tamis("inspect", source, "--json")
    assert shown.exit_code == 0 and "_unreadable" not in shown.output, shown.output


def test_an_input_shard_that_is_gone_is_a_problem_in_one_line(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text('{"text": "fine"}\n')
    assert tamis("detox", folder, "-o", tmp_path / "out", *FILTER, "--ladder", "redact").exit_code == 0
    (folder / "a.jsonl").unlink()
    (problem,) = verify_output(str(tmp_path / "out")).problems
    assert problem.startswith("a.jsonl: cannot be compared with the input") and "\n" not in problem


def test_rows_of_string_views_can_be_looked_for(tmp_path: Path):
    pq.write_table(pa.table({"text": COLUMNS["view"], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    shown = tamis("inspect", tmp_path / "a.parquet", "where", "n > 1", "--json")
    assert shown.exit_code == 0, shown.output
    assert [json.loads(line)["n"] for line in shown.output.splitlines()] == [2, 3, 4]
