"""The request cache: what was answered once is never asked again, whoever asks and whatever was killed."""

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import OutputError, TamisError
from schemas.fingerprint import digest
from transforms.shards.cache import RequestCache

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "cache")
        return
    url = f"memory://cache-{uuid.uuid4().hex}"
    yield url
    fs = fsspec.filesystem("memory")
    if fs.exists(url):
        fs.rm(url, recursive=True)


def test_nothing_is_found_in_an_empty_cache(url):
    cache = RequestCache(url)
    assert cache.get_many([digest("a"), digest("b")]) == [None, None]
    assert cache.get_many([]) == []
    assert len(cache) == 0 and (cache.hits, cache.misses) == (0, 2)


def test_answers_come_back_in_the_order_asked_for(url):
    cache = RequestCache(url)
    cache.put_many({digest("a"): b"1", digest("b"): b"", digest("c"): b"\0\xff" * 1000})
    cache.put_many({})
    keys = [digest(k) for k in "cxbaa"]
    assert cache.get_many(keys) == [b"\0\xff" * 1000, None, b"", b"1", b"1"]
    assert len(cache) == 3 and (cache.hits, cache.misses) == (4, 1)
    assert cache.get_many([digest("a")]) == [b"1"]  # one key alone too


def test_more_keys_than_one_query_may_hold(url):
    cache = RequestCache(url)
    items = {digest(i): str(i).encode() for i in range(1300)}
    cache.put_many(items)
    keys = [*items, digest("missing")]
    assert cache.get_many(keys) == [*items.values(), None]


def test_the_first_answer_stands(tmp_path):
    """Answers are functions of their key; a second one comes of a race and must not change what was used."""
    cache = RequestCache(str(tmp_path))
    cache.put_many({digest("a"): b"first"})
    cache.put_many({digest("a"): b"second"})
    assert cache.get_many([digest("a")]) == [b"first"]


def test_another_cache_on_the_same_folder_sees_the_answers(url):
    RequestCache(url).put_many({digest("a"): b"1"})
    assert RequestCache(url).get_many([digest("a")]) == [b"1"]


def test_a_pickled_cache_is_the_same_cache(url):
    cache = RequestCache(url, some_option=1) if url.startswith("memory") else RequestCache(url)
    cache.put_many({digest("a"): b"1"})
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.get_many([digest("a")]) == [b"1"]
    assert (copy.url, copy.options) == (cache.url, cache.options)


@given(
    st.lists(
        st.dictionaries(st.binary(min_size=1, max_size=3), st.binary(max_size=5), max_size=6), max_size=4
    )
)
@settings(deadline=None, max_examples=20)
def test_it_is_a_dictionary_that_keeps_first_values(tmp_path_factory, puts):
    cache, model = RequestCache(str(tmp_path_factory.mktemp("cache"))), {}
    for items in puts:
        cache.put_many(items)
        model = {**items, **model}
    assert cache.get_many(list(model)) == list(model.values())
    assert len(cache) == len(model)


def test_threads_share_one_cache(url):
    cache, failed = RequestCache(url), []

    def work(n):
        try:
            for i in range(20):
                cache.put_many({digest(n, i): b"x"})
                assert cache.get_many([digest(n, i)]) == [b"x"]
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(cache) == 80


WRITER = """
import sys
from schemas.fingerprint import digest
from transforms.shards.cache import RequestCache
cache = RequestCache(sys.argv[1])
name = sys.argv[2]
for i in range(int(sys.argv[3])):
    cache.put_many({digest(name, i): f"{name}-{i}".encode(), digest("shared", i): b"shared"})
    print(i, flush=True)
"""


def writer(folder, name, count):
    command = [sys.executable, "-c", WRITER, str(folder), name, str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_begin_at_once_share_one_cache(tmp_path):
    """They all make the file, switch it to WAL and make its table in the same moment."""
    processes = [writer(tmp_path, f"p{n}", 30) for n in range(5)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    cache = RequestCache(str(tmp_path))
    assert len(cache) == 5 * 30 + 30
    assert cache.get_many([digest("p3", 29), digest("shared", 0)]) == [b"p3-29", b"shared"]


def test_killing_a_process_loses_nothing_it_had_put(tmp_path):
    process = writer(tmp_path, "p", 100_000)
    said = [process.stdout.readline() for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.read().splitlines(keepends=True)
    process.wait()
    last = max(int(line) for line in said if line.endswith("\n"))
    cache = RequestCache(str(tmp_path))
    assert None not in cache.get_many([digest("p", i) for i in range(last + 1)])
    cache.put_many({digest("after"): b"1"})
    assert cache.get_many([digest("after")]) == [b"1"]


def test_a_damaged_file_is_one_line_and_no_row_s_fault(tmp_path):
    (tmp_path / "answers.sqlite").write_bytes(b"this is no database, and long enough to be looked at" * 100)
    for use in (lambda c: c.get_many([b"k"]), lambda c: c.put_many({b"k": b"v"}), len):
        with pytest.raises(OutputError, match=r"answers\.sqlite.*not a database.*remove it"):
            use(RequestCache(str(tmp_path)))


def test_a_full_disk_is_one_line_and_no_row_s_fault(tmp_path):
    cache = RequestCache(str(tmp_path))
    cache.put_many({b"k": b"v"})
    # SQLite's own limit stands in for the disk's: the error is the same one.
    pages = cache._connection().execute("PRAGMA page_count").fetchone()[0]
    cache._connection().execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(TamisError, match="disk is full"):
        cache.put_many({digest(i): os.urandom(1000) for i in range(100)})
    assert cache.get_many([b"k"]) == [b"v"]


def test_a_lock_held_too_long_is_one_line_and_no_row_s_fault(tmp_path, monkeypatch):
    cache = RequestCache(str(tmp_path))
    cache.put_many({b"k": b"v"})
    cache._connection().execute("PRAGMA busy_timeout=50")
    other = sqlite3.connect(tmp_path / "answers.sqlite")
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(OutputError, match="locked"):
        cache.put_many({b"other": b"v"})
    assert time.monotonic() - started < 10
    other.rollback()
    cache.put_many({b"other": b"v"})
    assert cache.get_many([b"k", b"other"]) == [b"v", b"v"]


def _open_together(root: str, caches: int, barrier: Any, failures: Any) -> None:
    for number in range(caches):
        barrier.wait()
        try:
            RequestCache(f"{root}/{number}").get_many([b"key"])
        except OutputError as error:
            failures.put(str(error))
    failures.put(None)


def test_processes_that_open_a_new_cache_at_one_moment_all_can(tmp_path):
    context, count, caches = multiprocessing.get_context("fork"), 4, 100
    barrier, failures = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_open_together, args=(str(tmp_path), caches, barrier, failures))
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    found: list[str] = []
    ended = 0
    while ended < count:
        line = failures.get(timeout=60)
        ended += line is None
        found += [line] if line is not None else []
    for process in processes:
        process.join()
    assert found == []
