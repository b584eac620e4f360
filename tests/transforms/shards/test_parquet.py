"""Parquet: a changed shard keeps its schema, row order, row groups, codecs and encodings; all untouched rows are equal."""

import datetime as dt
import decimal
import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.columns import to_original_type
from schemas.errors import InputError
from tests.helpers import Drop, Fail, Keep, Replace, files_below, run_plainly
from transforms.shards.files import Folder
from transforms.shards.formats import AssembleOptions, UnitLimits, get_format

TEXTS = [
    "an idiot here",
    "fine",
    None,
    "",
    "Zürich 東京",
    "idiot idiot",
    "fine",
    "spam",
    "poison",
    "last idiot",
]
KEPT = [t for t in TEXTS if t not in ("spam", "poison")]
DONE = [t and t.replace("idiot", "person") for t in TEXTS]


def rich_table(text_type=pa.string()):  # noqa: B008
    """One column of every kind a corpus may bring along."""
    n = len(TEXTS)
    text = to_original_type(pa.array(TEXTS, pa.string()), text_type)
    struct = pa.struct([("lang", pa.string()), ("scores", pa.list_(pa.float32()))])
    columns = {
        "id": pa.array(range(n), pa.uint32()),
        "text": text,
        "meta": pa.array([{"lang": "en", "scores": [i, None]} if i % 3 else None for i in range(n)], struct),
        "tags": pa.array([["a", "b"][: i % 3] for i in range(n)], pa.large_list(pa.string())),
        "pairs": pa.array([[("k", i)] for i in range(n)], pa.map_(pa.string(), pa.int64())),
        "vector": pa.array([[i, i + 1] for i in range(n)], pa.list_(pa.float32(), 2)),
        "kind": pa.array(["x", "y"] * (n // 2)).dictionary_encode(),
        "large": pa.array([f"l{i}" for i in range(n)], pa.large_string()),
        "view": pa.array([f"a longer value than twelve bytes {i}" for i in range(n)], pa.string_view()),
        "when": pa.array(
            [dt.datetime(2024, 1, 1, i, tzinfo=dt.UTC) for i in range(n)], pa.timestamp("us", "Europe/Zurich")
        ),
        "naive": pa.array([dt.datetime(2024, 1, 1, i) for i in range(n)], pa.timestamp("ns")),
        "day": pa.array([dt.date(2024, 1, i + 1) for i in range(n)]),
        "took": pa.array([dt.timedelta(seconds=i) for i in range(n)], pa.duration("ms")),
        "price": pa.array([decimal.Decimal(i) / 4 for i in range(n)], pa.decimal128(10, 2)),
        "half": pa.array(range(n), pa.float16()),
        "raw": pa.array([bytes([i, 255]) for i in range(n)], pa.binary()),
        "hash": pa.array([bytes([i] * 4) for i in range(n)], pa.binary(4)),
        "flag": pa.array([i % 2 == 0 for i in range(n)]),
        "nothing": pa.nulls(n),
    }
    schema = pa.schema(
        [
            pa.field(k, v.type, nullable=k != "id", metadata={"note": "kept"} if k == "kind" else None)
            for k, v in columns.items()
        ],
        metadata={"pandas": "{}", "huggingface": json.dumps({"info": {"features": {}}}), "own": "é"},
    )
    return pa.table(list(columns.values()), schema=schema)


def through(tmp_path, table, steps, *, limits=None, options=None, **write):
    """A table through the engine: the Parquet file in and the one out."""
    source, out = tmp_path / "in" / "a.parquet", tmp_path / "out" / "data" / "a.parquet"
    source.parent.mkdir(parents=True)
    pq.write_table(table, source, **write)
    run_plainly(
        tmp_path / "in",
        tmp_path / "out",
        steps,
        limits=limits or UnitLimits(),
        options=options or AssembleOptions(),
    )
    return pq.ParquetFile(source), pq.ParquetFile(out)


def groups(file):
    return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]


def codecs(file):
    group = file.metadata.row_group(0)
    return {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}


def encodings(file):
    group = file.metadata.row_group(0)
    return {
        group.column(i).path_in_schema: group.column(i).has_dictionary_page for i in range(group.num_columns)
    }


NANOSECONDS = [1_577_836_800_123_456_789, 1_577_836_800_123_456_000]


@pytest.mark.parametrize(
    "write",
    [
        {"version": "1.0", "use_deprecated_int96_timestamps": True},
        {"version": "2.4", "use_deprecated_int96_timestamps": True},
        {"version": "2.6"},
    ],
    ids=str,
)
def test_nanoseconds_stay_whatever_version_the_file_says_it_is(tmp_path, write):
    times = pa.array(NANOSECONDS, pa.timestamp("ns"))
    table = pa.table({"text": ["an idiot", "fine"], "at": times, "n": pa.array([1, 2], pa.uint32())})
    before, after = through(tmp_path, table, [Replace()], **write)
    assert after.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    assert after.read().column("at").cast(pa.int64()).to_pylist() == NANOSECONDS
    assert after.read().column("text").to_pylist() == ["an person", "fine"]


def test_nanoseconds_of_polars_stay(tmp_path):
    frame = pl.DataFrame({"text": ["an idiot", "fine"], "at": NANOSECONDS})
    (tmp_path / "in").mkdir()
    frame.with_columns(pl.col("at").cast(pl.Datetime("ns"))).write_parquet(tmp_path / "in" / "a.parquet")
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace()])
    after = pl.read_parquet(tmp_path / "out" / "data" / "a.parquet")
    assert after["at"].cast(pl.Int64).to_list() == NANOSECONDS


@pytest.mark.parametrize("name", ["item", "element", "array_element", "array"])
@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_what_lies_in_lists_keeps_its_name_and_its_codec(tmp_path, name, codec):
    type_ = pa.list_(pa.field(name, pa.list_(pa.field(name, pa.string()))))
    table = pa.table({"text": ["an idiot", "fine"], "tags": pa.array([[["x"]], [["y", None]]], type_)})
    before, after = through(
        tmp_path,
        table,
        [Replace()],
        compression=codec,
        use_compliant_nested_type=False,
        use_dictionary=["text"],
    )
    assert after.schema_arrow.equals(before.schema_arrow)
    assert codecs(after) == codecs(before) and set(codecs(after).values()) == {codec.upper()}
    assert encodings(after) == encodings(before)


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("type_", TEXT_TYPES, ids=str)
def test_changed_text_and_nothing_else(tmp_path, type_):
    before, after = through(tmp_path, rich_table(type_), [Replace()], row_group_size=4)
    assert after.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    assert before.schema_arrow.field("text").type == type_
    one, two = before.read(), after.read()
    assert two.column("text").to_pylist() == DONE
    assert two.drop(["text"]).equals(one.drop(["text"]))
    assert groups(after) == groups(before) == [4, 4, 2]


def test_nothing_changed_is_a_copy(tmp_path):
    through(tmp_path, rich_table(), [Keep()])
    assert files_below(tmp_path / "out" / "data") == files_below(tmp_path / "in")


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_removed_rows_are_gone_and_the_others_keep_their_order_and_groups(tmp_path, rows):
    before, after = through(
        tmp_path, rich_table(), [Drop(), Fail(), Replace()], row_group_size=4, limits=UnitLimits(rows)
    )
    assert after.schema_arrow.equals(before.schema_arrow, check_metadata=True)
    whole = before.read()
    expected = pa.concat_tables([whole.slice(0, 7), whole.slice(9)]).combine_chunks()
    assert after.read().drop(["text"]).equals(expected.drop(["text"]))
    assert after.read().column("text").to_pylist() == [t and t.replace("idiot", "person") for t in KEPT]
    assert groups(after) == [4, 3, 1]
    dropped, dead = (pq.read_table(tmp_path / "out" / f / "a.parquet") for f in ("dropped", "dead"))
    assert dropped.select(["text", "reason"]).to_pylist() == [{"text": "spam", "reason": "is_spam"}]
    assert dead.select(["text", "row", "stage"]).to_pylist() == [
        {"text": "poison", "row": 8, "stage": "FailOnWord"}
    ]
    assert dead.column("error").to_pylist() == ["ValueError: cannot take 'poison'"]
    # The whole source row stands there, under its own names (`id` is taken by the engine's own).
    for name in before.schema_arrow.names:
        column = dropped.column(name if name != "id" else "source.id")
        assert column.to_pylist() == whole.column(name).slice(7, 1).to_pylist()


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
def test_the_codec_is_kept(tmp_path, codec):
    before, after = through(tmp_path, rich_table(), [Replace()], compression=codec)
    assert codecs(after) == codecs(before)


def test_codecs_dictionaries_and_statistics_are_kept_column_by_column(tmp_path):
    table = rich_table()
    before, after = through(
        tmp_path,
        table,
        [Replace()],
        compression={
            **dict.fromkeys(rich_table().schema.names, "snappy"),
            "text": "zstd",
            "meta.lang": "gzip",
            "large": "none",
        },
        use_dictionary=["kind", "large", "meta.lang"],
        write_statistics=["id", "text"],
    )
    assert codecs(after) == codecs(before) and set(codecs(after).values()) == {
        "ZSTD",
        "GZIP",
        "UNCOMPRESSED",
        "SNAPPY",
    }
    assert encodings(after) == encodings(before)
    stats = [
        [f.metadata.row_group(0).column(i).is_stats_set for i in range(f.metadata.num_columns)]
        for f in (before, after)
    ]
    assert stats[0] == stats[1]


def test_a_file_without_an_arrow_schema_keeps_its_parquet_schema(tmp_path):
    """Spark, DuckDB and others write none."""
    before, after = through(tmp_path, rich_table().drop(["took", "view"]), [Replace()], store_schema=False)
    assert after.schema == before.schema
    assert after.schema_arrow.equals(before.schema_arrow)


def test_row_groups_and_codec_change_when_asked(tmp_path):
    options = AssembleOptions(compression="zstd", row_group_rows=3)
    before, after = through(tmp_path, rich_table(), [Keep()], options=options, row_group_size=10)
    assert groups(after) == [3, 3, 3, 1] and set(codecs(after).values()) == {"ZSTD"}
    assert after.read().equals(before.read())


def test_small_row_groups_are_joined_when_asked(tmp_path):
    options = AssembleOptions(row_group_rows=6)
    _, after = through(tmp_path, rich_table(), [Drop()], options=options, row_group_size=2)
    assert groups(after) == [6, 3]
    assert after.read().column("id").to_pylist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_a_frame_of_polars_comes_back_as_polars_wrote_it(tmp_path):
    source = tmp_path / "in" / "a.parquet"
    source.parent.mkdir()
    frame = pl.DataFrame(
        {
            "text": TEXTS,
            "cat": pl.Series(["a", "b"] * 5, dtype=pl.Categorical),
            "deep": [[{"x": i}] for i in range(10)],
        }
    ).with_columns(when=pl.datetime(2024, 1, 1, time_zone="UTC"))
    frame.write_parquet(source)
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace()])
    after = pl.read_parquet(tmp_path / "out" / "data" / "a.parquet")
    assert after.schema == frame.schema
    assert after.equals(frame.with_columns(text=pl.Series(DONE)))


def test_a_frame_of_pandas_keeps_its_index(tmp_path):
    import pandas as pd

    source = tmp_path / "in" / "a.parquet"
    source.parent.mkdir()
    frame = pd.DataFrame({"text": TEXTS, "n": range(10)}, index=pd.Index(range(100, 110), name="key"))
    frame.to_parquet(source)
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace()])
    after = pd.read_parquet(tmp_path / "out" / "data" / "a.parquet")
    assert after.index.equals(frame.index) and after.index.name == "key"
    assert list(after["n"]) == list(frame["n"])


def test_a_dataset_of_datasets_keeps_its_features(tmp_path):
    datasets = pytest.importorskip("datasets")
    source = tmp_path / "in" / "a.parquet"
    source.parent.mkdir()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 5}, features=features)
    data.to_parquet(source)
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace()])
    after = datasets.Dataset.from_parquet(
        str(tmp_path / "out" / "data" / "a.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert after.features == features
    assert after["text"] == DONE


@pytest.mark.parametrize("steps", [[Keep()], [Replace()], [Drop("")]])
def test_no_rows_and_empty_row_groups(tmp_path, steps):
    schema = rich_table().schema
    path = tmp_path / "in" / "a.parquet"
    path.parent.mkdir()
    with pq.ParquetWriter(path, schema) as writer:
        writer.write_table(rich_table().slice(0, 0))
        writer.write_table(rich_table())
        writer.write_table(rich_table().slice(0, 0))
    pq.write_table(rich_table().slice(0, 0), tmp_path / "in" / "b.parquet")
    manifest, plan = run_plainly(tmp_path / "in", tmp_path / "out", steps)
    assert [s.rows for s in plan.shards] == [10, 0]
    before, after = (
        [pq.read_table(tmp_path / p / n) for n in ("a.parquet", "b.parquet")] for p in ("in", "out/data")
    )
    assert all(a.schema.equals(b.schema, check_metadata=True) for a, b in zip(before, after, strict=True))
    kept = 2 if isinstance(steps[0], Drop) else 10  # "" stands in every text but null and the empty one
    assert [t.num_rows for t in after] == [kept, 0]
    assert manifest["totals"]["rows_kept"] == kept


@given(
    st.lists(st.sampled_from(["a", "idiot", "spam", "poison", "", None]), max_size=30),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 400),
)
@settings(deadline=None, max_examples=25)
def test_units_never_change_what_comes_out(tmp_path_factory, texts, group, rows, size):
    folder = tmp_path_factory.mktemp("parquet")
    table = pa.table({"n": range(len(texts)), "text": pa.array(texts, pa.string())})
    _, after = through(
        folder, table, [Drop(), Fail(), Replace()], row_group_size=group, limits=UnitLimits(rows, size)
    )
    keep = [(i, t) for i, t in enumerate(texts) if t not in ("spam", "poison")]
    assert after.read().column("n").to_pylist() == [i for i, _ in keep]
    assert after.read().column("text").to_pylist() == ["person" if t == "idiot" else t for _, t in keep]


def test_reading_part_of_a_shard_decodes_the_two_columns_alone(tmp_path):
    pq.write_table(rich_table(), tmp_path / "a.parquet", row_group_size=3)
    parquet, source = get_format("parquet"), Folder(str(tmp_path))
    survey = parquet.survey(source, "a.parquet", UnitLimits(2), "text", "id")
    read = list(parquet.read(source, "a.parquet", survey.units[2:4], "text", "id"))
    assert [sorted(r.batch.schema.names) for r in read] == [["id", "text"]] * 2
    rows = [r for unit in read for r in unit.batch.column("id").to_pylist()]
    first = survey.units[2].first_row
    assert rows == list(range(first, first + len(rows)))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, "pass --text-column body"),
        ({"text": [1]}, "column 'text' is int64, not text"),
        ({"text": [["a"]]}, "not text"),
    ],
)
def test_a_missing_or_wrong_column_is_one_line(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        get_format("parquet").survey(Folder(str(tmp_path)), "a.parquet", UnitLimits(), "text", None)


def test_a_column_whose_name_has_a_dot(tmp_path):
    table = pa.table({"meta.text": TEXTS, "meta": [{"text": "other idiot"}] * 10})
    source = tmp_path / "in" / "a.parquet"
    source.parent.mkdir()
    pq.write_table(table, source)
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace()], text_column="meta.text")
    after = pq.read_table(tmp_path / "out" / "data" / "a.parquet")
    assert after.column("meta.text").to_pylist() == DONE
    assert after.column("meta").equals(table.column("meta"))


def test_scan_gives_every_row_whole(tmp_path):
    pq.write_table(rich_table(), tmp_path / "a.parquet", row_group_size=3)
    tables = list(get_format("parquet").scan(Folder(str(tmp_path)), "a.parquet"))
    assert pa.concat_tables(tables).equals(rich_table())
