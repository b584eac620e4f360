"""Column contracts: which columns a job needs, of which types, and the types' passage in and out of a job.

Corpora arrive as string, large_string, string_view or dictionary-encoded text (polars and datasets emit the last
three). Inside a job text is plain `pa.string()` (or `large_string` where a batch outgrows 2 GiB of offsets);
outside it is what it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import InputError


def is_text(type_: pa.DataType) -> bool:
    """Whether a column of this type holds text, in any of Arrow's encodings."""
    if pa.types.is_dictionary(type_):
        return is_text(type_.value_type)
    return bool(
        pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    )


def check_text_column(schema: pa.Schema, name: str, *, shard: str) -> pa.Field:
    """Return the field of the text column, or say in one line what to pass instead.

    Raises:
        InputError: The column is missing, or is not text.
    """
    index = schema.get_field_index(name)
    if index < 0:
        same = schema.names.count(name)
        if same > 1:  # get_field_index finds neither of two
            raise InputError(f"{shard}: {same} columns are named '{name}'; rename one of them")
        candidates = [f.name for f in schema if is_text(f.type)]
        hint = f"pass --text-column {candidates[0]}" if candidates else "it has no text column at all"
        raise InputError(
            f"{shard}: no column '{name}' (columns: {', '.join(schema.names) or 'none'}); {hint}"
        )
    field = schema.field(index)
    if not is_text(field.type):
        raise InputError(f"{shard}: column '{name}' is {field.type}, not text; pass another --text-column")
    return field


def check_id_column(schema: pa.Schema, name: str | None, *, shard: str) -> None:
    """Check that ids can be read from a column: text, numbers, times; None asks for nothing.

    Raises:
        InputError: The column is missing, or its values have no text form.
    """
    if name is None:
        return
    index = schema.get_field_index(name)
    if index < 0:
        columns = ", ".join(schema.names)
        raise InputError(
            f"{shard}: no column '{name}' (columns: {columns}); pass another --id-column or none"
        )
    type_ = schema.field(index).type
    if not has_text_form(type_):
        raise InputError(
            f"{shard}: column '{name}' is {type_}, which makes no id; pass another --id-column or none"
        )


def has_text_form(type_: pa.DataType) -> bool:
    """Whether every value of a column of this type can be written as text: text, numbers, times."""
    plain = type_.value_type if pa.types.is_dictionary(type_) else type_
    return bool(
        is_text(plain)
        or pa.types.is_integer(plain)
        or pa.types.is_floating(plain)
        or pa.types.is_decimal(plain)
        or pa.types.is_boolean(plain)
        or pa.types.is_temporal(plain)
    )


def check_extra_columns(schema: pa.Schema, names: Sequence[str], *, shard: str) -> None:
    """Check the columns a job reads beside its text: they must be there, and have a text form.

    Raises:
        InputError: One is missing, or is nested.
    """
    for name in names:
        index = schema.get_field_index(name)
        if index < 0:
            raise InputError(f"{shard}: no column '{name}' (columns: {', '.join(schema.names) or 'none'})")
        if not has_text_form(schema.field(index).type):
            raise InputError(f"{shard}: column '{name}' is {schema.field(index).type}, which is no text")


def to_text(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column of any type with a text form as plain text (nulls stay null)."""
    type_ = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if is_text(type_):
        return to_plain_text(values)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return pc.cast(values, pa.string())


def to_plain_text(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Decode text of any encoding to one `pa.string()` array (nulls stay null)."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
        if isinstance(values, pa.ChunkedArray):  # combine_chunks keeps chunks where offsets would overflow
            return pa.concat_arrays([c.cast(pa.large_string()) for c in values.chunks])
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string(values.type):
        return values
    return pc.cast(values, pa.string() if values.nbytes < 2**31 - 1 else pa.large_string())


def to_original_type(values: pa.Array, type_: pa.DataType) -> pa.Array:
    """Encode plain text as the column it came from (large_string, string_view, dictionary with its index type).

    Raises:
        InputError: The dictionary's index type cannot count so many distinct values.
    """
    if values.type.equals(type_):
        return values
    if pa.types.is_dictionary(type_):
        encoded = values.cast(type_.value_type).dictionary_encode()
        try:
            indices = encoded.indices.cast(type_.index_type)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"the changed text has {len(encoded.dictionary)} distinct values, too many for a column of type "
                f"{type_}; give the input a wider index type (int32) or plain text"
            ) from error
        return pa.DictionaryArray.from_arrays(indices, encoded.dictionary, ordered=type_.ordered)
    return values.cast(type_)
