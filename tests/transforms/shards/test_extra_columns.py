"""Columns a job reads beside its text: in every format they ride along as text, and what is missing is said."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas import flight
from schemas.errors import InputError
from transforms.shards.engine import read_units
from transforms.shards.formats import UnitLimits
from transforms.shards.inputs import list_input
from transforms.shards.plan import ReadTask, make_plan

TABLE = pa.table(
    {
        "text": ["one", "two", None],
        "title": pa.array(["a", None, "a"]).dictionary_encode(),
        "year": [1999, 2000, None],
        "tags": [["x"], [], None],
    }
)


def write(folder, kind):
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        pq.write_table(TABLE, folder / "a.parquet")
    elif kind == "arrow":
        with pa.ipc.new_file(str(folder / "a.arrow"), TABLE.schema) as writer:
            writer.write_table(TABLE)
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()))
    return folder


def read(folder, extra, id_column=None):
    listing = list_input(str(folder))
    plan = make_plan(listing, "text", id_column, UnitLimits(rows=2), extra=extra)
    (shard,) = plan.shards
    task = ReadTask(shard.name, 0, len(shard.units))
    batches = [b for _, b in read_units(listing.root, shard, task, "text", id_column, extra)]
    return pa.Table.from_batches(batches)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
def test_extra_columns_ride_along_as_text(tmp_path, kind):
    table = read(write(tmp_path / "in", kind), ("title", "year", "text"), "title")
    assert table.column("text").to_pylist() == ["one", "two", None]
    assert table.column("title").to_pylist() == ["a", None, "a"]
    assert table.column("year").to_pylist() == ["1999", "2000", None]
    assert table.column(flight.ID).to_pylist()[0] == "a"


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
def test_a_column_that_is_not_there_is_said_before_work(tmp_path, kind):
    with pytest.raises(InputError, match=r"a\.\w+: no (column|field) 'headline'"):
        read(write(tmp_path / "in", kind), ("headline",))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_nested_column_is_no_text(tmp_path, kind):
    with pytest.raises(InputError, match="column 'tags' is list"):
        read(write(tmp_path / "in", kind), ("tags",))


def test_a_line_whose_field_is_no_text_is_dead(tmp_path):
    table = read(write(tmp_path / "in", "jsonl"), ("tags",))
    assert table.column(flight.FATE).to_pylist() == [flight.DEAD, flight.DEAD, flight.KEPT]
    assert table.column(flight.ERROR).to_pylist()[0] == "field 'tags' is list, not text"


def test_half_an_emoji_in_an_extra_field_kills_its_row_only(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "title": "\\ud83d"}\n{"text": "b"}\n')
    table = read(tmp_path, ("title",))
    assert "lone surrogate" in table.column(flight.ERROR).to_pylist()[0]
    assert table.column("title").to_pylist() == [None, None]
