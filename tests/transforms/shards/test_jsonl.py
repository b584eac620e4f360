"""JSON lines: a change replaces one literal, and nothing else in the file moves by a byte."""

import gzip
import json

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.errors import InputError
from tests.helpers import Drop, Fail, Keep, Replace, files_below, run_plainly
from transforms.shards.deltas import DeltaCursor
from transforms.shards.files import Folder
from transforms.shards.formats import AssembleOptions, UnitLimits, get_format
from transforms.shards.formats.jsonl import splice

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SPACE = st.text(" \t", max_size=2)


@st.composite
def string_literal(draw, text=TEXT):
    """A string as JSON may write it: plain, escaped, or escaped where nobody would."""
    value = draw(text)
    how = draw(st.sampled_from(["plain", "ascii", "all"]))
    if how == "all":
        units = value.encode("utf-16-be")
        return '"' + "".join(f"\\u{units[i] << 8 | units[i + 1]:04X}" for i in range(0, len(units), 2)) + '"'
    return json.dumps(value, ensure_ascii=how == "ascii")


NUMBERS = [
    "0",
    "-0.0",
    "1.50",
    "1e400",
    "-1E-7",
    "123456789012345678901234567890",
    "9" * 5000,
    "NaN",
    "-Infinity",
]


def values():
    scalar = st.one_of(st.sampled_from(["null", "true", "false", *NUMBERS]), string_literal())
    return st.recursive(
        scalar,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(lambda v: "[" + " , ".join(v) + "]"),
            st.lists(st.tuples(string_literal(), inner), max_size=3).map(
                lambda v: "{" + ",".join(f"{k} :{x}" for k, x in v) + "}"
            ),
        ),
        max_leaves=6,
    )


@st.composite
def lines(draw, key="text"):
    """(line, True where it ends in a newline): one object that has the key at least once."""
    name = string_literal(st.just(key))
    other = st.one_of(string_literal(), string_literal(st.sampled_from(["a", "text ", "Text"])))
    pairs = draw(st.lists(st.tuples(other, values()), max_size=3))
    for _ in range(draw(st.integers(1, 2))):
        pairs.insert(draw(st.integers(0, len(pairs))), (draw(name), draw(values())))
    space = [draw(SPACE) for _ in range(6)]
    body = f"{space[3]},{space[4]}".join(f"{k}{space[0]}:{space[1]}{v}" for k, v in pairs)
    end = draw(st.sampled_from(["\n", "\r\n", ""]))
    start = draw(st.sampled_from(["", "\ufeff", "\n", "  \r\n\n"]))
    return f"{start}{space[5]}{{{space[2]}{body}{space[2]}}}{space[5]}{end}"


def pairs_of(raw):
    """The object's own pairs, numbers by their literal (NaN is not equal to itself, and 1.50 is not 1.5)."""
    return json.loads(
        raw.decode("utf-8-sig"), object_pairs_hook=list, parse_int=str, parse_float=str, parse_constant=str
    )


@given(lines(), st.one_of(TEXT, st.none()))
@example('{"text": "a", "x": {"text": "inner"}, "text" : "b"}\n', "c")
@example('{"a": "say \\"text\\": 1", "text": ""}', 'quote " and \\ back')
@settings(deadline=None, max_examples=150)
def test_splice_replaces_the_value_and_no_other_byte(line, value):
    before = line.encode()
    after = splice(before, "text", value)
    old, new = pairs_of(before), pairs_of(after)
    at = max(i for i, (name, _) in enumerate(old) if name == "text")  # the one parsers keep
    assert new == [
        *old[:at],
        ["text", value] if isinstance(old[at], list) else ("text", value),
        *old[at + 1 :],
    ]
    literals = {json.dumps(value, ensure_ascii=e).encode() for e in (True, False)}
    assert any(
        before.startswith(after[:i]) and before.endswith(after[i + len(literal) :])
        for literal in literals
        for i in range(len(after))
        if after[i : i + len(literal)] == literal
    )


@given(lines(), TEXT)
@settings(deadline=None, max_examples=50)
def test_an_ascii_line_stays_ascii_and_another_is_not_escaped(line, value):
    before = line.encode()
    after = splice(before, "text", value)
    if before.removeprefix(b"\xef\xbb\xbf").isascii():
        assert after.removeprefix(b"\xef\xbb\xbf").isascii()
    else:
        assert json.dumps(value, ensure_ascii=False).encode() in after


def test_splice_passes_over_numbers_python_would_not_read():
    number = "9" * 6000
    after = splice(f'{{"n": {number}, "text": "a"}}'.encode(), "text", "b")
    assert after == f'{{"n": {number}, "text": "b"}}'.encode()


@pytest.mark.parametrize("depth", [900, 1020])
def test_splice_does_not_recurse_into_what_it_passes_over(depth):
    nested = "[" * depth + "]" * depth
    after = splice(f'{{"x": {nested}, "text": "a"}}'.encode(), "text", "b")
    assert after == f'{{"x": {nested}, "text": "b"}}'.encode()


def test_an_object_without_the_key_is_refused():
    with pytest.raises(KeyError):
        splice(b'{"x": {"text": "inner"}}', "text", "b")


# ------------------------------------------------------------------------------------------------------- whole files

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
UNPACK = {
    "": bytes,
    ".gz": gzip.decompress,
    ".zst": lambda b: zstandard.ZstdDecompressor().decompressobj().decompress(b),
}


def through(tmp_path, content, steps, *, suffix="", **options):
    """A file through the engine: what stands in data/ afterwards, and the output folder."""
    out = tmp_path / "out"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.jsonl{suffix}").write_bytes(PACK[suffix](content))
    manifest, _ = run_plainly(tmp_path / "in", out, steps, **options)
    return UNPACK[suffix]((out / "data" / f"a.jsonl{suffix}").read_bytes()), manifest


TRICKY = (
    b'\xef\xbb\xbf{"text": "an idiot", "n": 1.50}\r\n'
    b"\r\n"
    b'{"n": 123456789012345678901234567890, "text": "fine", "x": NaN}\n'
    b'{ "text" : "idiot \\u00e9 \\/ \\ud83d\\ude00" , "text": "last idiot wins" }\n'
    b"   \n\n"
    + '{"text": "Zürich idiot", "tags": ["text", "idiot"], "text ": "idiot"}\n'.encode()
    + b'{"t\\u0065xt": "idiot", "big": 1e400}\n'
    b'{"text": null}\n{"text": ""}\n'
    b'{"text": "no newline idiot"}'
)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_only_changed_literals_differ(tmp_path, suffix, rows):
    got, manifest = through(tmp_path, TRICKY, [Replace()], suffix=suffix, limits=UnitLimits(rows))
    expected = (
        TRICKY.replace(b'"an idiot"', b'"an person"')
        .replace(b"last idiot wins", b"last person wins")
        .replace("Zürich idiot".encode(), "Zürich person".encode())
        .replace(b'"t\\u0065xt": "idiot"', b'"t\\u0065xt": "person"')
        .replace(b"no newline idiot", b"no newline person")
    )
    assert got == expected
    assert manifest["totals"]["rows_changed"] == 5


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_nothing_changes_in_is_copied_as_it_stands(tmp_path, suffix):
    through(tmp_path, TRICKY, [Keep()], suffix=suffix)
    assert files_below(tmp_path / "out" / "data") == files_below(tmp_path / "in")


def test_removed_rows_take_their_line_along_and_leave_the_others(tmp_path):
    content = b'{"text": "a"}\r\n\r\n{"text": "spam"}\r\n{"text": "poison"}\n{"text": "idiot"}'
    got, manifest = through(tmp_path, content, [Drop(), Fail(), Replace()])
    assert got == b'{"text": "a"}\r\n{"text": "person"}'
    assert manifest["totals"]["rows_dropped"] == manifest["totals"]["rows_dead"] == 1


@given(
    st.lists(lines().map(str.strip), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(1, 200),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_rows_and_bytes_of_any_file_are_planned_read_and_written_once(
    tmp_path_factory, bodies, rows, size, data
):
    folder = tmp_path_factory.mktemp("jsonl")
    ends = [data.draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"])) for _ in bodies]
    ends[-1] = data.draw(st.sampled_from(["", "\n", "\n\n\n"]))
    start = data.draw(st.sampled_from(["", "\n", "\ufeff"]))
    content = (
        start + "".join(b.lstrip("\ufeff").strip() + e for b, e in zip(bodies, ends, strict=True))
    ).encode()
    (folder / "a.jsonl").write_bytes(content)
    jsonl, source = get_format("jsonl"), Folder(str(folder))
    try:
        survey = jsonl.survey(source, "a.jsonl", UnitLimits(rows, size), "text", None)
    except InputError:  # no row of the sample has text in that field: refused before work starts
        return
    assert survey.rows == len(bodies)
    assert [u.first_row for u in survey.units] == [
        sum(u.rows for u in survey.units[:i]) for i in range(len(survey.units))
    ]
    assert survey.units[0].start == 0 and survey.units[-1].end == len(content)
    assert all(a.end == b.start for a, b in zip(survey.units, survey.units[1:], strict=False))
    for skip in range(len(survey.units)):  # a resumed run begins anywhere
        read = list(jsonl.read(source, "a.jsonl", survey.units[skip:], "text", None))
        assert [r.batch.num_rows for r in read] == [u.rows for u in survey.units[skip:]]

    def untouched(i):
        import pyarrow as pa

        n = survey.units[i].rows
        return pa.record_batch(
            {
                "_tamis.fate": pa.array([0] * n, pa.int8()),
                "_tamis.changed": [False] * n,
                "_tamis.text": pa.nulls(n, pa.string()),
            }
        )

    cursor = DeltaCursor([u.first_row for u in survey.units], [u.rows for u in survey.units], untouched)
    jsonl.assemble(
        source, "a.jsonl", survey.units, cursor, folder / "b", "text", AssembleOptions(), lambda *_: None
    )
    assert (folder / "b").read_bytes() == content


# ---------------------------------------------------------------------------------------------------------- bad rows


def bad_rows(tmp_path, *raws, id_column=None):
    """Each raw line between two good ones: the error of each, None where it lives."""
    good = b'{"text": "good", "doc": "g"}\n'
    content = good + b"\n".join(raws) + b"\n" + good
    (tmp_path / "a.jsonl").write_bytes(content)
    jsonl, source = get_format("jsonl"), Folder(str(tmp_path))
    survey = jsonl.survey(source, "a.jsonl", UnitLimits(), "text", id_column)
    (unit,) = jsonl.read(source, "a.jsonl", survey.units, "text", id_column)
    assert unit.batch.num_rows == len(raws) + 2
    errors = unit.errors or [None] * unit.batch.num_rows
    assert errors[0] is errors[-1] is None
    return errors[1:-1], unit.batch


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"text": "a', "invalid JSON"),
        (b'{"text": "a"} trailing', "invalid JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10 of the line"),
        (b"[1, 2]", "not a JSON object but list"),
        (b"null", "not a JSON object but NoneType"),
        (b'{"body": "a"}', "no field 'text' in this row"),
        (b'{"text": 1}', "field 'text' is int, not text"),
        (b'{"text": {"a": "b"}}', "field 'text' is dict, not text"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "a\tb"}', "invalid JSON"),  # a raw control character
        (b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b" " * 100, "invalid JSON"),
        (b'{"text": ' + b"1" * 6000 + b"}", "not text"),
    ],
    ids=range(13),
)
def test_a_line_that_cannot_be_used_is_dead_with_the_reason(tmp_path, raw, reason):
    (error,), batch = bad_rows(tmp_path, raw)
    assert reason in error
    assert batch.column("text").to_pylist() == ["good", None, "good"]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"text": null}', None),
        (b'{"text": ""}', ""),
        (b'{"text": "a", "x": NaN, "y": -Infinity}', "a"),
        (b'{"text": "a", "x": "\\ud800"}', "a"),
        (b'{"text": "a", "text": "b"}', "b"),
        (b'{"text": "\\u0000"}', "\0"),
        (b'{"text": "a", "n": ' + b"1" * 6000 + b"}", "a"),
    ],
    ids=range(7),
)
def test_a_line_that_can_be_used_is(tmp_path, raw, text):
    (error,), batch = bad_rows(tmp_path, raw)
    assert error is None
    assert batch.column("text").to_pylist()[1] == text


@pytest.mark.parametrize(
    ("literal", "id_"),
    [
        ('"x"', "x"),
        ("7", "7"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1.50", "1.50"),
        ("null", None),
        ("true", "true"),
        ('{"b": 1, "a": 2}', '{"a": 2, "b": 1}'),
        ('"\\ud800"', "\\ud800"),
    ],
)
def test_an_id_of_any_type_becomes_text(tmp_path, literal, id_):
    (error,), batch = bad_rows(tmp_path, f'{{"text": "a", "doc": {literal}}}'.encode(), id_column="doc")
    assert error is None
    assert batch.column("doc").to_pylist() == ["g", id_, "g"]


def test_a_file_of_other_things_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'[\n{"text": "a"},\n')
    with pytest.raises(ValueError, match="none of the first 2 lines is a JSON object"):
        (tmp_path / "a.jsonl").write_bytes(b"[\n]\n")
        get_format("jsonl").survey(Folder(str(tmp_path)), "a.jsonl", UnitLimits(), "text", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "a", "n": 1}', r"a.jsonl: no field 'text' \(fields: body, n\); pass --text-column body"),
        (
            '{"id": "a1", "body": "a whole sentence"}',  # the longest strings, not the first field
            r"a.jsonl: no field 'text' \(fields: id, body\); pass --text-column body",
        ),
        ('{"n": 1}', "it has no text field at all"),
        ('{"text": 5}', "field 'text' is int, not text"),
        ('{"text": [], "n": 1}', "field 'text' is list, not text"),
    ],
)
def test_a_missing_or_wrong_field_is_one_line_before_work_starts(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        get_format("jsonl").survey(Folder(str(tmp_path)), "a.jsonl", UnitLimits(), "text", None)


def test_an_id_field_no_row_has_is_one_line_before_work_starts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "doc": 1}\n')
    with pytest.raises(InputError, match=r"no field 'id' \(fields: text, doc\); pass another --id-column"):
        get_format("jsonl").survey(Folder(str(tmp_path)), "a.jsonl", UnitLimits(), "text", "id")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": "a"}', b'{"text": "a"}\n\n'])
def test_few_or_no_rows(tmp_path, suffix, content):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix.lower()](content))
    survey = get_format("jsonl").survey(Folder(str(tmp_path)), f"a.jsonl{suffix}", UnitLimits(), "text", None)
    assert survey.rows == content.count(b"{")


def test_members_and_frames_behind_the_first_are_read(tmp_path):
    for suffix in (".gz", ".zst"):
        parts = [b'{"text": "a"}\n', b'{"text": "b"}\n{"te', b'xt": "c"}\n']
        (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(map(PACK[suffix], parts)))
        jsonl, source = get_format("jsonl"), Folder(str(tmp_path))
        survey = jsonl.survey(source, f"a.jsonl{suffix}", UnitLimits(2), "text", None)
        read = jsonl.read(source, f"a.jsonl{suffix}", survey.units, "text", None)
        assert [t for u in read for t in u.batch.column("text").to_pylist()] == ["a", "b", "c"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_cannot_be_read(tmp_path, suffix):
    whole = PACK[suffix](TRICKY * 50)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((EOFError, OSError, ValueError, zstandard.ZstdError)):
        get_format("jsonl").survey(Folder(str(tmp_path)), f"a.jsonl{suffix}", UnitLimits(), "text", None)


def test_a_file_that_shrinks_under_the_job_is_an_error_and_not_fewer_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    jsonl, source = get_format("jsonl"), Folder(str(tmp_path))
    survey = jsonl.survey(source, "a.jsonl", UnitLimits(), "text", None)
    path.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: 1 rows where 2 were planned.*changed"):
        list(jsonl.read(source, "a.jsonl", survey.units, "text", None))


@pytest.mark.parametrize("suffix", PACK)
def test_what_is_packed_again_does_not_depend_on_the_time(tmp_path, suffix):
    content = b'{"text": "idiot"}\n' * 3
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        through(tmp_path / name, content, [Replace()], suffix=suffix)
    one, two = (files_below(tmp_path / n / "out" / "data") for n in ("one", "two"))
    assert one == two


def test_scan_gives_the_lines_that_hold_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(TRICKY)
    tables = list(get_format("jsonl").scan(Folder(str(tmp_path)), "a.jsonl"))
    raws = [r for t in tables for r in t.column("raw").to_pylist()]
    assert raws == [line for line in TRICKY.splitlines(keepends=True) if line.strip()]
