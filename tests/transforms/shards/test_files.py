"""Folders on any filesystem: what is written appears whole or not at all, and what is there is seen."""

import pickle
import threading
import uuid

import fsspec
import pytest

from schemas.errors import TamisError
from transforms.shards.files import Folder, copy_file, file_fingerprint, sidecar_name


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        yield Folder(str(tmp_path / "root"))
        return
    folder = Folder(f"memory://root-{uuid.uuid4().hex}")
    yield folder
    folder.remove("")


def test_what_is_written_is_read_and_found(folder):
    folder.write("b/c.bin", b"\0\xff")
    folder.write("a.txt", b"a")
    folder.write("a.txt", b"again")
    assert folder.read("b/c.bin") == b"\0\xff"
    assert folder.read("a.txt") == b"again"
    assert folder.find() == ["a.txt", "b/c.bin"]
    assert folder.find("b") == ["b/c.bin"]
    assert folder.exists("b/c.bin") and folder.exists("b") and folder.exists() and not folder.exists("c")
    with folder.open("a.txt") as file:
        assert file.read(2) == b"ag"


def test_what_is_not_there(folder):
    assert folder.find() == [] and folder.find("x") == [] and not folder.exists()
    assert folder.read_many(["x", "y"]) == {}
    folder.remove("x")
    with pytest.raises(FileNotFoundError):
        folder.read("x")


def test_many_files_at_once(folder):
    folder.write("a", b"1")
    folder.write("d/b", b"2")
    assert folder.read_many(["a", "missing", "d/b"]) == {"a": b"1", "d/b": b"2"}
    assert folder.read_many(["a"]) == {"a": b"1"}
    assert folder.read_many([]) == {}


def test_a_folder_is_removed_with_all_in_it(folder):
    folder.write("d/e/a", b"1")
    folder.write("d/b", b"2")
    folder.write("c", b"3")
    folder.remove("d")
    folder.remove("d")
    assert folder.find() == ["c"]


@pytest.mark.parametrize("odd", ["a[1].bin", "a*.bin", "a?.bin"])
def test_a_name_is_a_name_and_no_pattern(folder, odd):
    """Stores' clients glob by default, and `a[1]` then reads, and removes, `a1`."""
    folder.write("d/a1.bin", b"other")
    assert folder.read_many([f"d/{odd}"]) == {}
    folder.remove(f"d/{odd}")
    folder.write(f"d/{odd}", b"mine")
    folder.write(f"{odd}/x", b"inside")
    assert folder.read_many([f"d/{odd}", "d/a1.bin"]) == {f"d/{odd}": b"mine", "d/a1.bin": b"other"}
    folder.remove(f"d/{odd}")
    folder.remove(odd)
    assert folder.find() == ["d/a1.bin"]


def test_a_removed_folder_is_no_folder_even_where_empty_folders_stay():
    memory = Folder(f"memory://{uuid.uuid4().hex}")
    memory.fs.makedirs(memory.path("d/e"))
    memory.write("d/e/a", b"1")
    memory.remove("d")
    assert not memory.exists("d") and memory.find() == []


def test_many_files_are_not_left_out_when_the_store_fails(monkeypatch):
    """Only what is missing is left out: a receipt that cannot be read is not a unit that was never done."""
    memory = Folder(f"memory://{uuid.uuid4().hex}")
    memory.write("a", b"1")

    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(memory.fs, "cat_file", refuse)
    with pytest.raises(PermissionError):
        memory.read_many(["a"])


def test_a_pickled_folder_is_the_same_folder(folder):
    folder.write("a", b"1")
    copy = pickle.loads(pickle.dumps(folder))
    assert copy.read("a") == b"1" and (copy.url, copy.root) == (folder.url, folder.root)


def test_a_child_and_what_it_holds(folder):
    folder.child("d").write("a", b"1")
    assert folder.find() == ["d/a"]


def test_a_file_appears_when_it_is_whole(folder):
    with folder.publish("d/a.bin") as path:
        path.write_bytes(b"half")
        assert not folder.exists("d/a.bin") and "d/a.bin" not in folder.find()
        path.write_bytes(b"whole")
    assert folder.read("d/a.bin") == b"whole"
    assert not path.exists()


def test_nothing_appears_after_an_error_and_nothing_is_left(folder):
    folder.write("d/a.bin", b"old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), folder.publish("d/a.bin") as path:
            path.write_bytes(b"half")
            raise error
        assert not path.exists()
    assert folder.read("d/a.bin") == b"old"
    assert folder.find() == ["d/a.bin"]


def test_what_is_being_written_lies_where_no_reader_looks(tmp_path):
    """Not even a listing that shows hidden files finds a part beside the shards."""
    folder = Folder(str(tmp_path))
    with folder.publish("data/a.parquet") as path:
        path.write_bytes(b"half")
        assert folder.find("data") == []
        assert folder.find() == [str(path.relative_to(tmp_path))] and folder.find()[0].startswith("_tamis/")


def test_two_writers_of_one_name_leave_one_whole_file(folder):
    contents = [bytes([i]) * 200_000 for i in range(6)]
    threads = [threading.Thread(target=folder.write, args=("d/a", c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder.read("d/a") in contents and folder.find() == ["d/a"]


@pytest.mark.parametrize(
    "kinds", [("local", "local"), ("memory", "memory"), ("local", "memory"), ("memory", "local")]
)
def test_a_copy_is_the_same_bytes(tmp_path, kinds):
    name = uuid.uuid4().hex
    source, target = (
        Folder(str(tmp_path / side) if kind == "local" else f"memory://{name}/{side}")
        for kind, side in zip(kinds, ("in", "out"), strict=True)
    )
    source.write("d/a", b"x" * 1000)
    copy_file(source, "d/a", target, "data/e/b")
    assert target.read("data/e/b") == b"x" * 1000 and target.find() == ["data/e/b"]


@pytest.mark.parametrize(
    ("typed", "root"),
    [
        ("in", "{cwd}/in"),
        ("./in/", "{cwd}/in"),
        ("in/../out", "{cwd}/out"),
        ("/a/./b//", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("/", "/"),
        ("memory://a/b/", "/a/b"),
    ],
)
def test_a_folder_has_one_name_however_it_is_typed(tmp_path, monkeypatch, typed, root):
    monkeypatch.chdir(tmp_path)
    folder = Folder(typed)
    assert folder.root == root.format(cwd=tmp_path)
    if not typed.startswith("memory"):
        assert folder.url == folder.root


@pytest.mark.parametrize("typed", ["", " "])
def test_an_empty_name_is_not_the_root_of_the_disk(typed):
    with pytest.raises(TamisError, match="an empty name is no folder"):
        Folder(typed)


def test_paths_in_the_root_of_a_filesystem():
    assert Folder("/").path("x") == "/x"
    memory = Folder("memory://")
    name = f"{uuid.uuid4().hex}.txt"
    memory.write(name, b"1")
    assert name in memory.find() and memory.read(name) == b"1"
    memory.remove(name)


def test_a_fingerprint_names_the_content(folder):
    folder.write("a", b"one")
    folder.write("b", b"one")
    folder.write("c", b"two")
    a, b, c = (file_fingerprint(folder, n) for n in "abc")
    assert a == b != c


def test_a_fingerprint_is_the_store_s_own_checksum_where_it_has_one(folder):
    folder.write("a", b"one")
    assert file_fingerprint(folder, "a", {"ETag": '"abc"', "size": 3}) == "etag:abc:3"
    assert file_fingerprint(folder, "a", {"md5Hash": "q==", "size": 3}) == "md5hash:q==:3"


@pytest.mark.parametrize(
    ("shard", "sidecar"),
    [("a/b.parquet", "a/b.parquet"), ("a.jsonl.gz", "a.jsonl.gz.parquet"), ("a.pq", "a.pq.parquet")],
)
def test_sidecars_are_parquet(shard, sidecar):
    assert sidecar_name(shard) == sidecar


class Caching(fsspec.AbstractFileSystem):
    """A store that, like s3fs, answers from the listing it once saw."""

    protocol = "caching"
    files: dict[str, bytes] = {}  # noqa: RUF012

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path).rstrip("/")
        if path not in self.dircache:
            prefix = f"{path}/" if path else ""
            names = {prefix + f[len(prefix) :].split("/")[0] for f in self.files if f.startswith(prefix)}
            if path in self.files:
                names = {path}
            if not names:
                raise FileNotFoundError(path)
            self.dircache[path] = [
                {
                    "name": n,
                    "size": len(self.files.get(n, b"")),
                    "type": "file" if n in self.files else "directory",
                }
                for n in sorted(names)
            ]
        return self.dircache[path] if detail else [e["name"] for e in self.dircache[path]]

    def invalidate_cache(self, path=None):
        self.dircache.clear()


def test_files_another_worker_wrote_are_seen_through_a_listing_cache():
    fsspec.register_implementation("caching", Caching, clobber=True)
    folder = Folder("caching://out")
    Caching.files["out/_tamis/plan.json"] = b"x"
    assert folder.find() == ["_tamis/plan.json"]
    assert not folder.exists("_tamis/receipts") and folder.find("_tamis/receipts") == []
    Caching.files["out/_tamis/receipts/a/0.json"] = b"x"  # by another process
    assert folder.find("_tamis/receipts") == ["_tamis/receipts/a/0.json"]
    assert folder.exists("_tamis/receipts/a/0.json")
    Caching.files["out/_SUCCESS"] = b"x"
    assert folder.exists("_SUCCESS")
    del Caching.files["out/_SUCCESS"]
    assert not folder.exists("_SUCCESS")
