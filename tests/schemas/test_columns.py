import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.columns import check_id_column, check_text_column, is_text, to_original_type, to_plain_text
from schemas.errors import InputError

TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
    pa.dictionary(pa.uint16(), pa.string()),
]


def encode(values, type_):
    return to_original_type(pa.array(values, pa.string()), type_)


@pytest.mark.parametrize("type_", TEXT_TYPES, ids=str)
@given(values=st.lists(st.one_of(st.none(), st.text(st.characters(codec="utf-8")))))
@settings(max_examples=30, deadline=None)
def test_text_of_any_encoding_goes_plain_and_comes_back_as_it_was(type_, values):
    encoded = encode(values, type_)
    assert encoded.type == type_
    plain = to_plain_text(encoded)
    assert pa.types.is_string(plain.type)
    assert plain.to_pylist() == values
    assert to_original_type(plain, type_).to_pylist() == values


@pytest.mark.parametrize("type_", TEXT_TYPES, ids=str)
def test_chunks_are_joined_in_order(type_):
    chunks = pa.chunked_array([encode(["a", None], type_), encode([], type_), encode(["b"], type_)])
    assert to_plain_text(chunks).to_pylist() == ["a", None, "b"]
    assert to_plain_text(pa.chunked_array([], type_)).to_pylist() == []


def test_an_index_type_too_narrow_for_the_new_words_is_not_silently_wrong():
    values = [f"w{i}" for i in range(300)]
    with pytest.raises(InputError, match="300 distinct"):
        to_original_type(pa.array(values), pa.dictionary(pa.int8(), pa.string()))


def test_an_ordered_dictionary_stays_ordered():
    type_ = pa.dictionary(pa.int32(), pa.string(), ordered=True)
    assert encode(["a", "b", "a"], type_).type.ordered


@pytest.mark.parametrize("type_", TEXT_TYPES, ids=str)
def test_the_text_column_may_be_text_of_any_encoding(type_):
    assert is_text(type_)
    assert check_text_column(pa.schema([("t", type_)]), "t", shard="s").type == type_


@pytest.mark.parametrize(
    "type_", [pa.binary(), pa.int64(), pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.int64())], ids=str
)
def test_what_is_not_text_is_refused_with_the_type_in_the_message(type_):
    assert not is_text(type_)
    with pytest.raises(InputError, match="not text; pass another --text-column") as caught:
        check_text_column(pa.schema([("t", type_)]), "t", shard="a.parquet")
    assert str(type_) in str(caught.value) and "a.parquet" in str(caught.value)


def test_a_missing_column_names_the_shard_the_columns_and_what_to_pass():
    schema = pa.schema([("n", pa.int64()), ("body", pa.string())])
    with pytest.raises(
        InputError, match=r"a.parquet: no column 'text' \(columns: n, body\); pass --text-column body"
    ):
        check_text_column(schema, "text", shard="a.parquet")
    with pytest.raises(InputError, match="it has no text column at all"):
        check_text_column(pa.schema([("n", pa.int64())]), "text", shard="a.parquet")
    with pytest.raises(InputError, match="columns: none"):
        check_text_column(pa.schema([]), "text", shard="a.parquet")


def test_a_column_name_that_stands_twice_is_said_to_stand_twice():
    schema = pa.schema([("text", pa.string()), ("text", pa.string())])
    with pytest.raises(InputError, match="2 columns are named 'text'"):
        check_text_column(schema, "text", shard="a.arrow")


@pytest.mark.parametrize(
    "type_",
    [
        *TEXT_TYPES,
        pa.int64(),
        pa.uint8(),
        pa.float32(),
        pa.decimal128(9, 2),
        pa.bool_(),
        pa.timestamp("us", "UTC"),
        pa.duration("s"),
        pa.dictionary(pa.int8(), pa.int64()),
    ],
    ids=str,
)
def test_ids_may_be_text_numbers_or_times(type_):
    check_id_column(pa.schema([("id", type_)]), "id", shard="s")
    values = pa.nulls(1, type_)
    values = values.dictionary_decode() if pa.types.is_dictionary(type_) else values
    assert values.cast(pa.string()).to_pylist() == [None]


@pytest.mark.parametrize(
    "type_",
    [pa.binary(), pa.binary(16), pa.list_(pa.int64()), pa.struct([("a", pa.int64())]), pa.null()],
    ids=str,
)
def test_an_id_column_that_makes_no_text_is_refused(type_):
    with pytest.raises(InputError, match="which makes no id; pass another --id-column or none"):
        check_id_column(pa.schema([("id", type_)]), "id", shard="s")


def test_a_missing_id_column_is_refused_and_none_asks_for_nothing():
    schema = pa.schema([("text", pa.string())])
    check_id_column(schema, None, shard="s")
    with pytest.raises(InputError, match=r"s: no column 'doc' \(columns: text\)"):
        check_id_column(schema, "doc", shard="s")
