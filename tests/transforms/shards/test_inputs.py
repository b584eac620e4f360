"""Inputs: what the user typed becomes a sorted list of shards, or one line that says why not."""

import errno
import json
import os
import uuid
from pathlib import Path

import fsspec
import pytest

from schemas.errors import InputError
from tests.helpers import Keep, environment, run_plainly, sample_texts, write_jsonl, write_parquet
from transforms.shards.files import Folder
from transforms.shards.inputs import list_input


def names(listing):
    return [s.name for s in listing.shards]


@pytest.fixture
def corpus(tmp_path):
    for name in (
        "b.jsonl",
        "a.jsonl.gz",
        "sub/c.parquet",
        "sub/deep/d.arrow",
        "e.csv",
        "README.md",
        ".hidden.jsonl",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    for name in ("_tamis/f.jsonl", ".git/g.jsonl", "sub/_tmp/h.parquet"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    return tmp_path / "in"


def test_a_folder_gives_its_shards_sorted_and_passes_over_the_rest(corpus):
    listing = list_input(str(corpus))
    assert names(listing) == ["a.jsonl.gz", "b.jsonl", "sub/c.parquet", "sub/deep/d.arrow"]
    assert [s.format for s in listing.shards] == ["jsonl", "jsonl", "parquet", "arrow"]
    assert listing.ignored == 2 and listing.examples == ("README.md", "e.csv")
    assert listing.root.root == str(corpus) and listing.lineage is None
    assert all(s.size == 1 and s.stamp for s in listing.shards)


def test_a_file_is_a_listing_of_one_under_its_folder(corpus):
    listing = list_input(str(corpus / "sub" / "c.parquet"))
    assert names(listing) == ["c.parquet"] and listing.root.root == str(corpus / "sub")


@pytest.mark.parametrize(
    ("pattern", "expected", "root"),
    [
        ("*.jsonl", ["b.jsonl"], ""),
        ("**/*.parquet", ["sub/c.parquet"], ""),
        ("sub/*", ["c.parquet"], "sub"),
        ("[ab].*", ["a.jsonl.gz", "b.jsonl"], ""),
        ("sub/d??p/*.arrow", ["d??p".replace("d??p", "deep") + "/d.arrow"], "sub"),
    ],
)
def test_a_glob_gives_what_it_matches_under_its_fixed_part(corpus, pattern, expected, root):
    listing = list_input(f"{corpus}/{pattern}")
    assert names(listing) == expected and listing.root.root == str(corpus / root)


@pytest.fixture
def locked_away(monkeypatch):
    """Makes folders that cannot be listed, for root as well, whom no mode keeps out."""
    closed = set()
    scandir = os.scandir

    def refuse(path="."):
        if str(getattr(path, "path", path)) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return lambda path: closed.add(str(path))


@pytest.mark.parametrize("source", ["", "/**/*.parquet", "/s*/deep/*.arrow", "/sub/*/*.arrow"])
def test_a_folder_that_cannot_be_listed_is_refused(corpus, locked_away, source):
    """Passed over, its shards would be missing from the output, and those of an earlier run removed."""
    locked_away(corpus / "sub" / "deep")
    with pytest.raises(InputError, match=r"cannot list .*/sub/deep: Permission denied"):
        list_input(f"{corpus}{source}")


def test_a_folder_that_cannot_be_listed_does_not_matter_where_no_shard_is_looked_for(corpus, locked_away):
    (corpus / "lost+found").mkdir()
    for name in (".git", "_tamis", "lost+found", "sub/_tmp"):
        locked_away(corpus / name)
    assert len(list_input(str(corpus)).shards) == 4
    locked_away(corpus / "sub" / "deep")
    for pattern in ("*.jsonl", "sub/*.parquet", "[ab].*", "x*/**/*.jsonl", "b.jsonl"):
        if pattern.startswith("x"):
            with pytest.raises(InputError, match="nothing matches"):
                list_input(f"{corpus}/{pattern}")
        else:
            assert list_input(f"{corpus}/{pattern}").shards


def test_relative_paths_and_globs(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    assert names(list_input(".")) == names(list_input("../in")) == names(list_input(str(corpus)))
    assert names(list_input("b.jsonl")) == names(list_input("*.jsonl")) == ["b.jsonl"]
    assert list_input("b.jsonl").root.root == str(corpus)


def test_a_path_that_only_looks_like_a_glob_is_a_path(tmp_path):
    write_jsonl(tmp_path / "in [v1]" / "a.jsonl", ["fine"])
    assert names(list_input(str(tmp_path / "in [v1]"))) == ["a.jsonl"]
    assert names(list_input(str(tmp_path / "in [v1]" / "a.jsonl"))) == ["a.jsonl"]


def test_memory_urls(corpus):
    root = f"memory://{uuid.uuid4().hex}"
    for name in ("a.jsonl", "d/b.parquet"):
        Folder(root).write(name, b"x")
    try:
        assert names(list_input(root)) == ["a.jsonl", "d/b.parquet"]
        assert names(list_input(f"{root}/a.jsonl")) == ["a.jsonl"]
        assert names(list_input(f"{root}/**/*.parquet")) == ["d/b.parquet"]
    finally:
        Folder(root).remove("")


def test_a_file_in_the_root_of_a_filesystem():
    name = f"{uuid.uuid4().hex}.jsonl"
    fsspec.filesystem("memory").pipe(f"/{name}", b'{"text": "a"}')
    try:
        listing = list_input(f"memory://{name}")
        assert names(listing) == [name] and listing.root.read(name) == b'{"text": "a"}'
    finally:
        fsspec.filesystem("memory").rm(f"/{name}")


@pytest.mark.parametrize(
    "source", ["missing", "missing.jsonl", "./a/b/missing", "/no/such/folder", "memory://no/such"]
)
def test_what_is_not_there_is_one_line(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no such input: {source}"):
        list_input(source)


def test_a_mistyped_folder_that_could_be_a_hub_id_is_one_line(tmp_path, monkeypatch):
    """`corpora/train` reads as an id of the hub; with no network that must not end in a traceback."""
    monkeypatch.chdir(tmp_path)
    with (
        environment(HF_HUB_OFFLINE="1"),
        pytest.raises(InputError, match=r"no such input: corpora/train .*hub") as caught,
    ):
        list_input("corpora/train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nosuch://bucket/x", "nosuch://bucket/*.parquet"])
def test_an_unknown_protocol_is_one_line(source):
    with pytest.raises(InputError, match="nosuch"):
        list_input(source)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no Parquet, JSONL or Arrow shards in"),
        (["a.csv", "b.txt"], r"no Parquet, JSONL or Arrow shards in .* \(2 other files there\)"),
        ([".a.jsonl", "_b.jsonl"], "no Parquet, JSONL or Arrow shards in"),
    ],
)
def test_a_folder_without_shards_is_one_line(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        list_input(str(tmp_path))


def test_a_glob_that_matches_nothing_is_one_line(tmp_path):
    with pytest.raises(InputError, match="nothing matches"):
        list_input(f"{tmp_path}/*.parquet")
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(InputError, match="no Parquet, JSONL or Arrow shards"):
        list_input(f"{tmp_path}/*.txt")


def test_an_output_of_tamis_is_read_by_its_manifest(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", sample_texts(5))
    write_jsonl(tmp_path / "in" / "sub" / "b.jsonl", sample_texts(5))
    (tmp_path / "in" / "c.parquet").write_bytes(b"broken")
    manifest, _ = run_plainly(tmp_path / "in", tmp_path / "out", [Keep()])
    (tmp_path / "out" / "data" / "stray.jsonl").write_text('{"text": "not named"}\n')
    listing = list_input(str(tmp_path / "out"))
    assert names(listing) == ["a.parquet", "sub/b.jsonl"]
    assert listing.root.root == str(tmp_path / "out" / "data")
    assert listing.lineage == {
        "job": "test",
        "run_id": manifest["run_id"],
        "config_hash": "test",
        "lineage": None,
    }


@pytest.mark.parametrize("place", ["out/data", "out/data/a.jsonl", "out/data/*.jsonl", "out/**/a.jsonl"])
def test_lineage_is_known_wherever_in_an_output_the_input_lies(tmp_path, place):
    write_jsonl(tmp_path / "in" / "a.jsonl", sample_texts(3))
    run_plainly(tmp_path / "in", tmp_path / "out", [Keep()])
    whole = list_input(str(tmp_path / "out")).lineage
    assert whole and list_input(f"{tmp_path}/{place}").lineage == whole
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="out is an unfinished tamis output"):
        list_input(f"{tmp_path}/{place}")


def test_an_unfinished_output_is_refused(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", sample_texts(5))
    run_plainly(tmp_path / "in", tmp_path / "out", [Keep()])
    (tmp_path / "out" / "_SUCCESS").unlink()
    with pytest.raises(InputError, match=r"unfinished tamis output \(no _SUCCESS\); run its job again"):
        list_input(str(tmp_path / "out"))
    (tmp_path / "out" / "manifest.json").unlink()  # as in the middle of a run
    with pytest.raises(InputError, match=r"unfinished tamis output"):
        list_input(str(tmp_path / "out"))


def test_the_files_of_a_saved_dataset_are_those_its_state_names(tmp_path):
    for name in ("data-0.arrow", "cache-1.arrow", "tmp2.arrow"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    listing = list_input(str(tmp_path))
    assert names(listing) == ["data-0.arrow"] and set(listing.companions) == {
        "dataset_info.json",
        "state.json",
    }


def test_the_infos_of_an_older_data_set_are_no_shard(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["fine"])
    (tmp_path / "dataset_infos.json").write_text('{"default": {"description": "x"}}')
    listing = list_input(str(tmp_path))
    assert names(listing) == ["a.jsonl"] and listing.companions == ("dataset_infos.json",)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}'])
def test_another_tool_s_state_file_says_nothing(tmp_path, content):
    (tmp_path / "a.arrow").write_bytes(b"x")
    (tmp_path / "state.json").write_text(content)
    assert names(list_input(str(tmp_path))) == ["a.arrow"]


def test_an_empty_input_is_one_line():
    for source in ("", " "):
        with pytest.raises(InputError, match="the input is empty"):
            list_input(source)


def test_a_name_that_is_not_utf8_is_one_line_that_shows_it(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    for path in (tmp_path / f"{name}.jsonl", tmp_path / name / "a.jsonl"):
        path.write_bytes(b"x")
        for source in (path, path.parent, f"{path.parent}/*.jsonl"):
            with pytest.raises(InputError, match=r"caf\\udce9.*: its name is not UTF-8; rename it"):
                list_input(str(source))
        path.unlink()
    (tmp_path / f"{name}.txt").write_bytes(b"x")
    (tmp_path / "a.jsonl").write_bytes(b"x")
    assert names(list_input(str(tmp_path))) == ["a.jsonl"]


def test_links_are_followed(tmp_path):
    write_jsonl(tmp_path / "blobs" / "0123", ["fine"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    assert names(list_input(str(tmp_path / "in" / "a.jsonl"))) == ["a.jsonl"]
    listing = list_input(str(tmp_path / "in"))
    assert (
        names(listing) == ["a.jsonl"]
        and listing.shards[0].size == Path(tmp_path / "blobs" / "0123").stat().st_size
    )
