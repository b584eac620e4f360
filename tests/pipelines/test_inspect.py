"""`tamis inspect`: rows and schema of anything, and one line where it cannot be had."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines.inspect import find_files, inspect_path, iter_rows, to_json
from schemas.errors import InputError, TamisError
from tests.pipelines.sample_output import Sample, build_output

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Sample:
    return build_output(tmp_path_factory.mktemp("inspect") / "out")


def _shown(*args, width: int = 160, **kwargs) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    n = inspect_path(*args, console=console, **kwargs)
    return n, console.file.getvalue()


def _json(*args, **kwargs) -> list[dict]:
    n, text = _shown(*args, as_json=True, **kwargs)
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == n
    return rows


@pytest.mark.parametrize(
    "table", ["edits", "dropped", "dead", "attributes/toxicity", "attributes/spans", "data"]
)
def test_every_table_of_an_output_is_shown(sample, table):
    n, text = _shown(str(sample.path), table=table, limit=1)
    assert n == 1
    assert "id" in text
    assert find_files(str(sample.path), table).title == table


def test_json_lines_hold_whole_rows(sample):
    rows = _json(str(sample.path), table="edits", limit=10_000)
    assert [r["before"] for r in rows] == [e["before"] for e in sample.edits]
    assert rows[0]["candidates"][0].keys() == sample.edits[0]["candidates"][0].keys()


def test_conditions_reach_into_structs_and_stop_early(sample):
    rows = _json(
        str(sample.path),
        what="where",
        where="value.flagged AND value.score > 0.9",
        table="attributes/toxicity",
    )
    assert rows and all(r["value"]["flagged"] and r["value"]["score"] > 0.9 for r in rows)
    assert len(_json(str(sample.path), where="row >= 3", table="edits", limit=4)) == 4


def test_conditions_compare_dictionary_columns_as_text():
    rows = _json(str(EXAMPLES / "corpus.parquet"), where="source = 'howto' AND lang == 'nl'", limit=99)
    assert [r["meta"]["author"] for r in rows] == ["De Werkplaats"]


def test_jsonl_rows_keep_their_own_fields_only():
    rows = _json(str(EXAMPLES / "corpus.jsonl"), limit=99)
    lines = (EXAMPLES / "corpus.jsonl").read_text("utf-8").splitlines()
    assert rows == [json.loads(line) for line in lines]
    picked = _json(str(EXAMPLES / "corpus.jsonl"), where="meta.votes > 100")
    assert {r["id"] for r in picked} == {
        json.loads(line)["id"] for line in lines if json.loads(line)["meta"]["votes"] > 100
    }


def test_a_condition_that_is_null_picks_nothing(tmp_path):
    pq.write_table(pa.table({"a": [1, None, 3]}), tmp_path / "x.parquet")
    assert [r["a"] for r in _json(str(tmp_path), where="a < 3")] == [1]


def test_the_schema_names_types_metadata_and_the_jobs_columns(sample):
    n, text = _shown(str(EXAMPLES / "corpus.parquet"), what="schema")
    assert n == 7
    assert "timestamp[ms, tz=UTC]" in text and "dictionary<values=string" in text
    assert "metadata corpus = tamis examples" in text
    assert "rows: 44" in text
    _, text = _shown(str(sample.path), what="schema")
    assert "text of the job" in text
    (line,) = [json.loads(x) for x in _shown(str(sample.path), what="schema", as_json=True)[1].splitlines()]
    assert line["rows"] == sample.kept and line["files"] == 2
    assert [c["name"] for c in line["columns"]] == ["id", "text", "meta"]


def test_a_shard_whose_schema_differs_is_named(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "b.parquet")
    _, text = _shown(str(tmp_path), what="schema")
    assert "differs: b.parquet: column 'a' is string, not int64" in text


def test_long_values_are_cut_for_the_eye_only(tmp_path):
    long = "word " * 2_000
    pq.write_table(pa.table({"id": ["1"], "text": [long]}), tmp_path / "x.parquet")
    _, text = _shown(str(tmp_path))
    assert "(10,000 characters)" in " ".join(text.replace("│", " ").split()) and text.count("word") < 80
    assert _json(str(tmp_path))[0]["text"] == long


def test_markup_in_values_is_not_obeyed(tmp_path):
    pq.write_table(pa.table({"[bold]id": ["[red]1[/red]"]}), tmp_path / "x.parquet")
    _, text = _shown(str(tmp_path))
    assert "[bold]id" in text and "[red]1[/red]" in text


def test_bytes_and_dates_become_json():
    assert json.loads(to_json({"a": b"ok", "b": b"\xff"})) == {"a": "ok", "b": "/w=="}


def test_arrow_files_and_streams_are_read(tmp_path):
    table = pa.table({"a": range(10)})
    with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    with pa.ipc.new_stream(tmp_path / "y.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    assert [r["a"] for r in _json(str(tmp_path), limit=99)] == [*range(10), *range(10)]


def test_any_filesystem_will_do(sample):
    memory = fsspec.filesystem("memory")
    for file in sample.path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/inspect-test/{file.relative_to(sample.path)}", file.read_bytes())
    local = _json(str(sample.path), table="edits", limit=5)
    assert _json("memory://inspect-test", table="edits", limit=5) == local


def test_rows_are_streamed(sample, monkeypatch):
    import pipelines.inspect as module

    opened: list[str] = []
    read = module.read_batches
    monkeypatch.setattr(module, "read_batches", lambda f, n, **k: opened.append(n) or read(f, n, **k))
    list(iter_rows(find_files(str(sample.path)), limit=3))
    assert opened == ["data/en/part-0.parquet"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"table": "nope"}, "holds no table 'nope'; tables: data, edits"),
        ({"what": "where"}, "where needs a condition"),
        ({"what": "tail"}, "say head, schema or where"),
        ({"where": "colour = 1"}, 'there is no column "colour"; columns: id, text, meta'),
        ({"where": "id ="}, "not a condition"),
        ({"where": "id"}, "not true or false"),
        ({"where": "text > 3"}, "cannot be applied"),
    ],
)
def test_errors_are_one_line(sample, kwargs, message):
    with pytest.raises(InputError) as caught:
        _shown(str(sample.path), **kwargs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_hold_nothing_are_errors(tmp_path):
    with pytest.raises(TamisError, match="no such input"):
        _shown(str(tmp_path / "nowhere"))
    with pytest.raises(TamisError, match="no Parquet, JSONL or Arrow"):
        _shown(str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"x.parquet: cannot be read"):
        _shown(str(tmp_path))
    with pytest.raises(InputError, match="not an output of tamis"):
        _shown(str(tmp_path), table="edits")


def test_the_examples_are_made_from_one_another(tmp_path):
    spec = importlib.util.spec_from_file_location("make_examples", EXAMPLES / "make_examples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.to_table(module.read_documents())
    kept = pq.read_table(EXAMPLES / "corpus.parquet")
    assert kept.schema.metadata == made.schema.metadata
    assert kept.cast(made.schema).combine_chunks().equals(made.combine_chunks())
    assert len({d["id"] for d in module.read_documents()}) == made.num_rows == 44
