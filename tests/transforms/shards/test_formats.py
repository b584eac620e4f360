"""What can be told of a format before work starts."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from schemas.errors import FatalStepError, InputError
from transforms.shards.formats import check_compression


@pytest.mark.parametrize(
    ("suffix", "codec", "says"),
    [
        ("parquet", "bogus", "one of snappy, zstd, gzip, brotli, lz4, none"),
        ("arrow", "snappy", "one of zstd, lz4, none"),
    ],
)
def test_a_codec_that_a_shard_cannot_have_is_refused_before_any_work(tmp_path, suffix, codec, says):
    table = pa.table({"text": ["fine"]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    check_compression("zstd", [path.name])
    check_compression(None, [path.name])
    with pytest.raises(InputError, match=says):
        check_compression(codec, ["b.jsonl", path.name])
    done = CliRunner().invoke(app, ["detox", str(path), "-o", str(tmp_path / "out"), "--compression", codec])
    assert isinstance(done.exception, InputError) and not (tmp_path / "out").exists()


def test_a_codec_is_refused_where_there_are_only_lines_of_json_to_use_it_on(tmp_path):
    check_compression(None, ["a.jsonl"])
    check_compression("zstd", ["a.jsonl", "b.parquet"])
    with pytest.raises(InputError, match="fits none of the shards"):
        check_compression("zstd", ["a.jsonl", "b.jsonl.gz"])
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    told = ["detox", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "out"), "--compression", "zstd"]
    done = CliRunner().invoke(app, told)
    assert isinstance(done.exception, InputError) and not (tmp_path / "out").exists()


def test_a_column_that_cannot_be_written_again_is_one_line_that_names_the_shard(tmp_path):
    """Arrow writes lists of a fixed size with nulls among them, and cannot read them back."""
    pairs = pa.array([None, [1, 2]], pa.list_(pa.int32(), 2))
    pq.write_table(pa.table({"text": ["you idiot", "fine"], "pair": pairs}), tmp_path / "a.parquet")
    told = ["--scorer", "lexicon", "--localize", "lexicon", "--gate", "all", "--ladder", "redact"]
    place = [str(tmp_path / "a.parquet"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["detox", *place, *told, "--progress", "quiet"])
    assert isinstance(done.exception, FatalStepError)
    said = str(done.exception)
    assert "cannot write a.parquet with its columns as they are" in said and "\n" not in said
    assert not (tmp_path / "out" / "_SUCCESS").exists()
