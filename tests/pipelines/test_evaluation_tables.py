"""Tables that evaluations read: files of every kind, what is wrong with one, and ids to join by."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation.tables import distinct_ids, read_table, read_tables
from schemas.errors import InputError


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "prompts"
    place.mkdir()
    (place / "b.csv").write_text('text,n\n"three, with a comma",3\n,4\n')
    (place / "a.tsv").write_text("text\tn\none\t1\ntwo\t2\n")
    with gzip.open(place / "c.csv.gz", "wt") as file:
        file.write("text,n\nfive,5\n")
    (place / "README.md").write_text("notes")
    return place


@pytest.mark.parametrize("place", ["", "/*.*sv*", "/{name}"])
def test_separated_values_are_read_from_a_folder_a_glob_or_one_by_one(folder, place):
    if "{name}" in place:
        table = read_tables([f"{folder}/{name}" for name in ("a.tsv", "b.csv", "c.csv.gz")])
    else:
        table = read_table(f"{folder}{place}")
    assert table.texts("text") == ["one", "two", "three, with a comma", None, "five"]
    assert table.column("n") == ["1", "2", "3", "4", "5"]  # numbers are for their reader
    assert table.keys == [("a.tsv", 0), ("a.tsv", 1), ("b.csv", 0), ("b.csv", 1), ("c.csv.gz", 0)]


def test_tables_beside_shards_are_notes(folder):
    pq.write_table(pa.table({"text": ["a shard"]}), folder / "z.parquet")
    assert read_table(str(folder)).texts("text") == ["a shard"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"text\ncaf\xe9\n", r"a.csv, line 2: byte 0xe9 is not UTF-8"),
        (b'text\n"never closed\n', r"a.csv, line 2: a quote is opened and never closed"),
        (b"text,n\none\n", r"a.csv, line 2: 1 fields, where the header has 2"),
        (b"", "not one row"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, content, says):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        read_table(str(tmp_path / "a.csv"))
    assert "\n" not in str(error.value)


@given(
    st.lists(
        st.one_of(st.none(), st.just(""), st.integers(0, 9), st.text("ab", min_size=1, max_size=2)),
        max_size=6,
    )
)
def test_ids_are_given_back_as_text_only_if_each_row_has_its_own(values):
    texts = [str(v) for v in values]
    if any(v in (None, "") for v in values):
        with pytest.raises(InputError, match=r"x.csv: \d of \d rows have no id"):
            distinct_ids(values, "x.csv")
    elif len(set(texts)) < len(texts):
        with pytest.raises(InputError, match="times; pass another --id-column"):
            distinct_ids(values, "x.csv")
    else:
        assert distinct_ids(values, "x.csv") == texts
