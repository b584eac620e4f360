"""Reading of shards: what is read, what is refused, and going on at any row."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.training.shards import ShardReader, format_of, list_shards, shard_fingerprint
from schemas.errors import InputError

ROWS = [{"text": f"row {i}", "n": i} for i in range(25)]


def write_mixed(folder: Path) -> None:
    """25 rows over four formats, in the order of the names."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(ROWS[:10]), folder / "a.parquet", row_group_size=4)
    with gzip.open(folder / "b.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in ROWS[10:15])
    table = pa.Table.from_pylist(ROWS[15:20])
    with pa.OSFile(str(folder / "c.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS[20:]), max_chunksize=3)


def write_output(folder: Path, *, success: bool = True, **manifest) -> None:
    """What a tamis job leaves: data/, a manifest that names one of two files, and a sidecar."""
    (folder / "data").mkdir(parents=True)
    (folder / "edits").mkdir()
    for name in ("data/a.parquet", "data/stray.parquet", "edits/a.parquet"):
        pq.write_table(pa.Table.from_pylist([{"text": name}]), folder / name)
    record = {
        "job": "detox",
        "run_id": "r1",
        "config_hash": "c1",
        "shards": [{"path": "a.parquet"}],
        **manifest,
    }
    (folder / "manifest.json").write_text(json.dumps(record))
    if success:
        (folder / "_SUCCESS").write_text("r1\n")


def read_all(reader: ShardReader) -> list[dict]:
    return [row for batch in reader for row in batch.to_pylist()]


def test_every_format_is_read_in_order_of_names(tmp_path):
    write_mixed(tmp_path)
    (tmp_path / "notes.txt").write_text("no rows")
    (tmp_path / "dataset_info.json").write_text("{}")
    listing = list_shards(str(tmp_path))
    assert [s.name for s in listing.shards] == ["a.parquet", "b.jsonl.gz", "c.arrow", "d.arrow"]
    assert read_all(ShardReader(listing, batch_rows=3)) == ROWS
    assert read_all(ShardReader(listing, ["text"])) == [{"text": row["text"]} for row in ROWS]


@given(stop=st.integers(0, 25), batch_rows=st.integers(1, 30))
@settings(deadline=None, max_examples=40)
def test_a_reader_goes_on_at_the_very_row(tmp_path_factory, stop, batch_rows):
    folder = tmp_path_factory.mktemp("shards")
    write_mixed(folder)
    listing = list_shards(str(folder))
    reader = ShardReader(listing, batch_rows=batch_rows)
    rows = reader.rows()
    first = [next(rows) for _ in range(stop)]
    state = json.loads(json.dumps(reader.state_dict()))
    again = ShardReader(listing, batch_rows=7)
    again.load_state_dict(state)
    assert first + list(again.rows()) == ROWS


def test_a_state_of_other_shards_is_refused(tmp_path):
    write_mixed(tmp_path / "one")
    write_mixed(tmp_path / "two")
    (tmp_path / "two" / "a.parquet").unlink()
    state = ShardReader(list_shards(str(tmp_path / "one"))).state_dict()
    with pytest.raises(InputError, match="shards are not those"):
        ShardReader(list_shards(str(tmp_path / "two"))).load_state_dict(state)


def test_of_a_tamis_output_only_what_the_manifest_names_is_read(tmp_path):
    write_output(tmp_path / "out")
    listing = list_shards(str(tmp_path / "out"))
    assert read_all(ShardReader(listing)) == [{"text": "data/a.parquet"}]
    assert listing.lineage == {"job": "detox", "run_id": "r1", "config_hash": "c1"}


def test_an_unfinished_output_is_refused(tmp_path):
    write_output(tmp_path / "out", success=False)
    with pytest.raises(InputError, match="no _SUCCESS"):
        list_shards(str(tmp_path / "out"))
    (tmp_path / "begun" / "_tamis").mkdir(parents=True)
    with pytest.raises(InputError, match="unfinished"):
        list_shards(str(tmp_path / "begun"))


def test_a_poisoned_output_is_refused_unless_told_otherwise(tmp_path):
    write_output(tmp_path / "out", poisoned=True)
    with pytest.raises(InputError, match="--allow-poisoned"):
        list_shards(str(tmp_path / "out"))
    listing = list_shards(str(tmp_path / "out"), allow_poisoned=True)
    assert listing.lineage["poisoned"] is True


@pytest.mark.parametrize(
    "place", ["out/data", "out/data/a.parquet", "out/data/*.parquet", "o*/data/*.parquet"]
)
def test_what_an_output_says_holds_for_the_files_in_its_data(tmp_path, place):
    ranker = {"name": "linear", "kind": "scorer", "revision": "cc", "training_data": ""}
    write_output(tmp_path / "out", poisoned=True, models=[ranker])
    with pytest.raises(InputError, match="--allow-poisoned"):
        list_shards(f"{tmp_path}/{place}")
    lineage = list_shards(f"{tmp_path}/{place}", allow_poisoned=True).lineage
    assert lineage["models"] == [ranker] and lineage["job"] == "detox"
    (tmp_path / "out" / "_tamis").mkdir()
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="out is an unfinished tamis output"):
        list_shards(f"{tmp_path}/{place}")


def test_files_of_several_outputs_keep_what_made_each_of_them(tmp_path):
    for number in (1, 2):
        ranker = {"name": f"ranker-{number}", "kind": "scorer", "revision": str(number)}
        write_output(tmp_path / f"out-{number}", run_id=f"r{number}", models=[ranker])
    lineage = list_shards(f"{tmp_path}/out-*/data/a.parquet").lineage
    assert [m["name"] for m in lineage["models"]] == ["ranker-1", "ranker-2"] and lineage[
        "run_id"
    ] == "r1, r2"


def test_a_folder_called_data_that_is_nobodys_output_is_a_plain_folder(tmp_path):
    write_mixed(tmp_path / "data")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "_SUCCESS").write_text("")
    assert list_shards(str(tmp_path / "data")).manifest is None


def test_a_manifest_that_names_what_is_not_there_is_refused(tmp_path):
    write_output(tmp_path / "out", shards=[{"path": "gone.parquet"}])
    with pytest.raises(InputError, match=r"gone\.parquet"):
        list_shards(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"', "line 2: not JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2: not a JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_all(ShardReader(list_shards(str(tmp_path))))


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.bz2", "jsonl.zst", "csv.gz"])
@pytest.mark.parametrize("broken", ["cut", "garbled", "other"])
def test_a_compressed_file_that_is_broken_is_named(tmp_path, ending, broken):
    path = tmp_path / f"a.{ending}"
    text = random.Random(3).choices("abcdefgh", k=200_000)
    rows = [json.dumps({"text": "".join(text[i : i + 50])}) for i in range(0, len(text), 50)]
    if ending.startswith("csv"):
        rows = ["text", *("".join(text[i : i + 50]) for i in range(0, len(text), 50))]
    with fsspec.open(str(path), "wt", compression="infer") as stream:
        stream.write("\n".join(rows))
    good = path.read_bytes()
    middle = len(good) // 2
    broke = {
        "cut": good[:middle],
        "garbled": good[:middle] + b"\xff" * 64 + good[middle + 64 :],
        "other": b"none of it is compressed\n" * 9,
    }
    path.write_bytes(broke[broken])
    with pytest.raises(InputError, match=r"^a\.(jsonl|csv)\.\w+( cannot be read \(|, line \d+: )"):
        read_all(ShardReader(list_shards(str(path))))


def test_a_truncated_parquet_file_is_named(tmp_path):
    write_mixed(tmp_path)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        read_all(ShardReader(list_shards(str(tmp_path))))


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    write_mixed(tmp_path)
    with pytest.raises(InputError, match=r"no column 'body' \(columns: text, n\)"):
        read_all(ShardReader(list_shards(str(tmp_path)), ["body"]))


def test_json_keys_may_be_left_out_where_they_are_null(tmp_path):
    lines = [{"text": "a", "note": "x"}, {"text": "b"}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reader = ShardReader(list_shards(str(tmp_path)), ["text", "note"], batch_rows=1)
    assert [row["note"] for row in read_all(reader)] == ["x", None, None]


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such input"):
        list_shards(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no Parquet, JSONL, Arrow or CSV"):
        list_shards(str(tmp_path))


def test_csv_is_text_with_quotes_and_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"one, ""two""\nthree",1\n,0\nlast,\n', "utf-8")
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"label\ttext\n1\tfour, five\n"))
    rows = read_all(ShardReader(list_shards(str(tmp_path)), ["text", "label"], batch_rows=2))
    assert [(r["text"], r["label"]) for r in rows] == [
        ('one, "two"\nthree', "1"),
        ("", "0"),
        ("last", ""),
        ("four, five", "1"),
    ]
    with pytest.raises(InputError, match=r"no column 'body' \(columns: text, label\)"):
        read_all(ShardReader(list_shards(str(tmp_path / "a.csv")), ["body"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\none\n", "^a\\.csv, line 2: 1 fields, where the header has 2; quote"),
        (b'text,label\n\n"o\nn",1\ntwo,1,2\n', "^a\\.csv, line 5: 3 fields"),
        (
            b'text,label\none,1\ntwo,"0\nthree,1\n',
            "^a\\.csv, line 3: a quote is opened and never closed",
        ),
        (
            b'text,label\none,1\n"two,0\nthree,1',
            "^a\\.csv, line 3: a quote is opened and never closed",
        ),
        (
            "text,label\nn\u00e9,1\n".encode("latin-1"),
            r"^a\.csv, line 2: byte 0xe9 is not UTF-8; .* iconv -f",
        ),
        (
            b"text,label\n" + b"one,1\n" * 5000 + b"n\xe9,1\n",
            r"^a\.csv, line 5002: byte 0xe9 is not",
        ),
        ("text,label\none,1\n".encode("utf-16"), r"^a\.csv, line 1: byte 0xff is not UTF-8"),
        (b"label,text,label\n1,one,1\n", "^a\\.csv: 2 columns are named 'label'; rename one"),
        (b"", r"^a\.csv: no column 'text' \(columns: none\)"),
    ],
)
def test_a_file_that_is_no_csv_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_all(ShardReader(list_shards(str(tmp_path)), ["text", "label"]))
    assert "\n" not in str(caught.value)


def test_a_long_field_of_a_csv_is_read_and_a_lone_quote_is_a_quote(tmp_path):
    long = "of many words, " * 200_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",1\n5" wide,0')
    rows = read_all(ShardReader(list_shards(str(tmp_path))))
    assert rows == [{"text": long, "label": "1"}, {"text": '5" wide', "label": "0"}]


@given(
    rows=st.lists(st.tuples(st.text(), st.text(min_size=1)), max_size=20),
    first=st.integers(0, 20),
    size=st.integers(1, 9),
)
def test_what_a_csv_writer_writes_is_read_from_any_row_on(tmp_path_factory, rows, first, size):
    folder = tmp_path_factory.mktemp("csv")
    with (folder / "a.csv").open("w", encoding="utf-8", errors="replace", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    expected = [tuple(v.encode("utf-8", "replace").decode() for v in row) for row in rows]
    reader = ShardReader(list_shards(str(folder)), batch_rows=size)
    read = [row for batch in reader.read_shard(0, first_row=first) for row in batch.to_pylist()]
    assert [(r["text"], r["label"]) for r in read] == expected[first:]


def test_csv_beside_other_shards_is_a_note(tmp_path):
    write_mixed(tmp_path)
    before = [s.name for s in list_shards(str(tmp_path)).shards]
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert [s.name for s in list_shards(str(tmp_path)).shards] == before


def test_globs_and_other_filesystems_are_read(tmp_path):
    write_mixed(tmp_path)
    assert len(list_shards(f"{tmp_path}/*.arrow").shards) == 2
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/train-shards/x/a.jsonl", b'{"text": "in memory"}\n')
    listing = list_shards("memory://train-shards")
    assert listing.shards[0].name == "x/a.jsonl"
    assert read_all(ShardReader(listing)) == [{"text": "in memory"}]


def test_a_fingerprint_changes_with_the_bytes(tmp_path):
    write_mixed(tmp_path)
    before = [shard_fingerprint(s) for s in list_shards(str(tmp_path)).shards]
    assert len(set(before)) == 4
    (tmp_path / "c.arrow").write_bytes((tmp_path / "c.arrow").read_bytes() + b"x")
    after = [shard_fingerprint(s) for s in list_shards(str(tmp_path)).shards]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize(
    ("name", "format_"),
    [
        ("a.PARQUET", "parquet"),
        ("x/a.json.zst", "jsonl"),
        ("a.parquet.gz", None),
        ("config.json", None),
        ("x/dataset_infos.json", None),
        ("tokenizer.json", None),
        ("model.safetensors.index.json", None),
        ("a", None),
    ],
)
def test_formats_are_told_by_name(name, format_):
    assert format_of(name) == format_
