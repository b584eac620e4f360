"""Arrow IPC: file or stream, its batches, its compression and its dictionaries come back as they were."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import InputError
from tests.helpers import Drop, Fail, Keep, Replace, files_below, read_ipc, run_plainly
from tests.transforms.shards.test_parquet import DONE, KEPT, rich_table
from transforms.shards.files import Folder
from transforms.shards.formats import AssembleOptions, UnitLimits, get_format

TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


def write_ipc(path, table, *, stream=False, sizes=(4, 4, 2), compression=None, unify=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(
        compression=compression, unify_dictionaries=not stream if unify is None else unify
    )
    create = pa.ipc.new_stream if stream else pa.ipc.new_file
    at = 0
    with create(str(path), table.schema, options=options) as writer:
        for size in sizes:
            # A slice of a batch, so that one of no rows still has the dictionaries of the others.
            batches = table.combine_chunks().to_batches()
            writer.write_batch(
                batches[0].slice(at, size) if batches else pa.RecordBatch.from_pylist([], table.schema)
            )
            at += size


def through(tmp_path, table, steps, *, limits=None, options=None, **write):
    """A table through the engine: (table, batch sizes) of the file in, and of the one out."""
    write_ipc(tmp_path / "in" / "a.arrow", table, **write)
    run_plainly(
        tmp_path / "in",
        tmp_path / "out",
        steps,
        limits=limits or UnitLimits(),
        options=options or AssembleOptions(),
    )
    return read_ipc(tmp_path / "in" / "a.arrow"), read_ipc(tmp_path / "out" / "data" / "a.arrow")


def head(path):
    """What tells a file from a stream, and how its first record batch is packed."""
    content = path.read_bytes()
    is_file = content[:6] == b"ARROW1"
    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(content[8 if is_file else 0 :]))
    while (message := reader.read_next_message()).type != "record batch":
        pass
    body = message.body.to_pybytes()
    packed = "lz4" if b"\x04\x22\x4d\x18" in body else "zstd" if b"\x28\xb5\x2f\xfd" in body else None
    return is_file, packed


@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_kind_batches_and_compression_are_kept(tmp_path, stream, compression):
    (one, sizes), (two, after) = through(
        tmp_path, rich_table(), [Replace()], stream=stream, compression=compression
    )
    assert after == sizes == [4, 4, 2]
    assert two.schema.equals(one.schema, check_metadata=True)
    assert two.column("text").to_pylist() == DONE
    assert two.drop(["text"]).equals(one.drop(["text"]))
    assert head(tmp_path / "out" / "data" / "a.arrow") == head(tmp_path / "in" / "a.arrow")
    assert head(tmp_path / "in" / "a.arrow") == (not stream, compression)


@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
@pytest.mark.parametrize("type_", TEXT_TYPES, ids=str)
def test_text_of_any_encoding(tmp_path, stream, type_):
    (one, _), (two, sizes) = through(tmp_path, rich_table(type_), [Drop(), Fail(), Replace()], stream=stream)
    assert two.schema.equals(one.schema, check_metadata=True) and two.schema.field("text").type == type_
    assert two.column("text").to_pylist() == [t and t.replace("idiot", "person") for t in KEPT]
    assert two.column("id").to_pylist() == [0, 1, 2, 3, 4, 5, 6, 9]
    assert sizes == [4, 3, 1]


@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_nothing_changed_is_a_copy(tmp_path, stream):
    through(tmp_path, rich_table(), [Keep()], stream=stream)
    assert files_below(tmp_path / "out" / "data") == files_below(tmp_path / "in")


def test_compression_changes_when_asked(tmp_path):
    (one, _), (two, _) = through(
        tmp_path, rich_table(), [Keep()], options=AssembleOptions(compression="zstd")
    )
    assert two.equals(one)
    assert head(tmp_path / "out" / "data" / "a.arrow")[1] == "zstd"


def test_batches_of_no_rows_and_files_of_no_batches(tmp_path):
    (_, before), (two, sizes) = through(tmp_path, rich_table(), [Replace()], sizes=(0, 4, 0, 6, 0))
    assert two.column("text").to_pylist() == DONE
    assert [n for n in sizes if n] == [n for n in before if n]  # a batch of no rows says nothing
    for stream in (False, True):
        root = tmp_path / str(stream)
        (one, _), (two, _) = through(root, rich_table(), [Replace()], sizes=(), stream=stream)
        assert two.equals(one) and two.num_rows == 0


def test_a_stream_whose_dictionary_changes_from_batch_to_batch(tmp_path):
    kinds = pa.chunked_array(
        [pa.array(["a", "b"]).dictionary_encode(), pa.array(["c", "b"]).dictionary_encode()]
    )
    table = pa.table({"text": ["idiot", "x", "y", "idiot"], "kind": kinds})
    path = tmp_path / "in" / "a.arrow"
    path.parent.mkdir()
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        for batch in table.to_batches():
            writer.write_batch(batch)
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace()])
    after, sizes = read_ipc(tmp_path / "out" / "data" / "a.arrow")
    assert after.column("kind").to_pylist() == ["a", "b", "c", "b"] and sizes == [2, 2]
    assert after.column("text").to_pylist() == ["person", "x", "y", "person"]


def test_a_dictionary_inside_a_list_in_a_file(tmp_path):
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 0], pa.int8()), pa.array(["a", "b"]))
    lists = pa.ListArray.from_arrays([0, 1, 2, 3, 4], words)
    table = pa.table({"text": ["idiot", "x", "y", "spam"], "words": lists})
    _, (two, sizes) = through(tmp_path, table, [Replace(), Drop()], sizes=(2, 2))
    assert two.column("words").to_pylist() == [["a"], ["b"], ["b"]] and sizes == [2, 1]


def test_types_parquet_does_not_know_go_through_and_die_readably(tmp_path):
    table = pa.table(
        {
            "text": ["idiot", "poison", "spam", "fine"],
            "run": pa.RunEndEncodedArray.from_arrays(pa.array([2, 4], pa.int32()), pa.array(["u", "v"])),
            "month": pa.array([pa.MonthDayNano([1, 2, 3])] * 4),
            "either": pa.UnionArray.from_sparse(
                pa.array([0, 1, 0, 1], pa.int8()), [pa.array([1, 2, 3, 4]), pa.array(list("abcd"))]
            ),
        }
    )
    (one, _), (two, _) = through(tmp_path, table, [Drop(), Fail(), Replace()], sizes=(4,))
    assert two.schema == one.schema
    assert two.to_pylist() == [{**one.to_pylist()[0], "text": "person"}, one.to_pylist()[3]]
    import pyarrow.parquet as pq

    dead = pq.read_table(tmp_path / "out" / "dead" / "a.arrow.parquet").to_pylist()
    assert dead[0]["text"] == "poison" and dead[0]["run"] == "u" and dead[0]["either"] == "b"


@given(
    st.lists(st.sampled_from(["a", "idiot", "spam", "poison", "", None]), max_size=30),
    st.lists(st.integers(0, 9), max_size=8),
    st.booleans(),
    st.integers(1, 12),
    st.integers(1, 200),
)
@settings(deadline=None, max_examples=25)
def test_units_never_change_what_comes_out(tmp_path_factory, texts, sizes, stream, rows, size):
    folder = tmp_path_factory.mktemp("arrow")
    table = pa.table({"n": range(len(texts)), "text": pa.array(texts, pa.string())})
    sizes = [*sizes, len(texts)]
    _, (after, _) = through(
        folder, table, [Drop(), Fail(), Replace()], sizes=sizes, stream=stream, limits=UnitLimits(rows, size)
    )
    keep = [(i, t) for i, t in enumerate(texts) if t not in ("spam", "poison")]
    assert after.column("n").to_pylist() == [i for i, _ in keep]
    assert after.column("text").to_pylist() == ["person" if t == "idiot" else t for _, t in keep]


@pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
def test_a_truncated_file_cannot_be_read(tmp_path, stream):
    path = tmp_path / "a.arrow"
    write_ipc(path, rich_table(), stream=stream)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(Exception) as caught:
        get_format("arrow").survey(Folder(str(tmp_path)), "a.arrow", UnitLimits(), "text", None)
    assert not isinstance(caught.value, InputError)  # the shard's fault, not the user's settings


def test_a_missing_column_is_one_line(tmp_path):
    write_ipc(tmp_path / "a.arrow", rich_table())
    for text, id_, message in (("body", None, "no column 'body'"), ("text", "doc", "no column 'doc'")):
        with pytest.raises(InputError, match=message):
            get_format("arrow").survey(Folder(str(tmp_path)), "a.arrow", UnitLimits(), text, id_)


def test_scan_gives_every_row_whole(tmp_path):
    write_ipc(tmp_path / "a.arrow", rich_table())
    assert pa.concat_tables(get_format("arrow").scan(Folder(str(tmp_path)), "a.arrow")).equals(rich_table())


# ------------------------------------------------------------------------------------------------- folders of datasets


def saved(tmp_path, *, rows=20, shards=2):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict(
        {"text": ["idiot", "fine"] * (rows // 2), "label": [0, 1] * (rows // 2)}, features=features
    )
    return datasets, data, {"num_shards": shards}


def test_a_saved_dataset_comes_back_as_a_saved_dataset(tmp_path):
    datasets, data, options = saved(tmp_path)
    data.save_to_disk(str(tmp_path / "in"), **options)
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace()])
    after = datasets.load_from_disk(str(tmp_path / "out" / "data"))
    assert after["text"][:] == ["person", "fine"] * 10 and after.features == data.features


def test_a_dictionary_of_splits_comes_back_as_one(tmp_path):
    datasets, data, _ = saved(tmp_path)
    datasets.DatasetDict({"train": data, "test": data.select(range(4))}).save_to_disk(str(tmp_path / "in"))
    run_plainly(tmp_path / "in", tmp_path / "out", [Replace(), Drop("fine")])
    after = datasets.load_from_disk(str(tmp_path / "out" / "data"))
    assert {k: v["text"][:] for k, v in after.items()} == {"train": ["person"] * 10, "test": ["person"] * 2}


def test_what_datasets_cached_beside_a_saved_dataset_is_no_shard(tmp_path):
    datasets, data, options = saved(tmp_path)
    data.save_to_disk(str(tmp_path / "in"), **options)
    datasets.load_from_disk(str(tmp_path / "in")).map(
        lambda row: {"size": len(row["text"])}, remove_columns=["text"]
    )
    assert list((tmp_path / "in").glob("cache-*.arrow"))
    _, plan = run_plainly(tmp_path / "in", tmp_path / "out", [Replace()])
    assert [s.name for s in plan.shards] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
