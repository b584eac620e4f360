"""Jobs over object stores: memory://, and a real S3-compatible server on this machine, reached as any bucket is."""

import pickle
import uuid

import fsspec
import pytest

from pipelines.verify import verify_output
from schemas.errors import FatalStepError, InputError, OutputError
from tests.helpers import (
    Ask,
    Drop,
    Fail,
    Log,
    Replace,
    StopAt,
    environment,
    logged,
    read_output,
    run,
    sample_corpus,
    sample_texts,
    write_jsonl,
)
from transforms.shards.cache import RequestCache
from transforms.shards.events import read_events
from transforms.shards.files import Folder, copy_file, file_fingerprint
from transforms.shards.inputs import list_input

STEPS = (Drop(), Fail(), Replace())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return sample_corpus(tmp_path_factory.mktemp("corpus"), shards=1, rows=30)


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    run(corpus, out, STEPS)
    return read_output(out)


@pytest.fixture(scope="module")
def s3_server():
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with environment(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1"):
        server.start()
        host, port = server.get_host_and_port()
        yield {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
        server.stop()


@pytest.fixture(params=["memory", "s3"])
def store(request):
    """(root URL, fsspec options) of a store that is emptied afterwards."""
    name = f"bucket-{uuid.uuid4().hex}"
    if request.param == "memory":
        url, options = f"memory://{name}", {}
    else:
        options = request.getfixturevalue("s3_server")
        url = f"s3://{name}"
        fsspec.filesystem("s3", **options).mkdir(name)
    yield url, options
    fs = Folder(url, **options).fs
    if fs.exists(name):
        fs.rm(name, recursive=True)


def upload(corpus, url, options):
    folder = Folder(url, **options)
    for path in corpus.rglob("*.*"):
        folder.write(str(path.relative_to(corpus)), path.read_bytes())
    return folder


def download(url, options, target):
    folder = Folder(url, **options)
    for name in folder.find():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(folder.read(name))
    return target


def fields(options):
    return {"input_options": options, "output_options": options}


def test_a_job_from_store_to_store_is_the_job_on_a_disk(corpus, expected, store, tmp_path):
    url, options = store
    upload(corpus, f"{url}/in", options)
    result = run(f"{url}/in", f"{url}/out", STEPS, unit_rows=7, **fields(options))
    assert result.state == "finished" and result.manifest["input"]["root"] == f"{url}/in"
    assert read_output(download(f"{url}/out", options, tmp_path / "out")) == expected
    assert not Folder(f"{url}/out", **options).find("_tamis/tmp")
    assert [e["kind"] for e in read_events(Folder(f"{url}/out", **options))].count(
        "unit"
    ) == result.plan.units
    assert not verify_output(f"{url}/out", options=options).problems
    assert run(f"{url}/in", f"{url}/out", STEPS, **fields(options)).state == "already finished"


def test_from_a_disk_to_a_store_and_back(corpus, expected, store, tmp_path):
    url, options = store
    run(corpus, f"{url}/one", STEPS, output_options=options)
    assert read_output(download(f"{url}/one", options, tmp_path / "one")) == expected
    result = run(f"{url}/one", tmp_path / "two", (Replace("fox", "hen"),), input_options=options)
    assert result.manifest["lineage"]["job"] == "test"
    assert result.manifest["totals"]["rows_in"] == result.manifest["totals"]["rows_kept"] > 0


def test_a_stopped_job_goes_on_and_no_committed_unit_is_done_twice(corpus, expected, store, tmp_path):
    url, options = store
    upload(corpus, f"{url}/in", options)
    steps = (StopAt(str(tmp_path / "allowed"), "part-0.parquet", 1), Log(str(tmp_path / "log")), *STEPS)
    with pytest.raises(FatalStepError):
        run(f"{url}/in", f"{url}/out", steps, unit_rows=10, **fields(options))
    output = Folder(f"{url}/out", **options)
    assert not output.exists("_SUCCESS") and not output.find("data")
    (tmp_path / "allowed").touch()
    result = run(f"{url}/in", f"{url}/out", steps, unit_rows=10, **fields(options))
    assert result.done > 0
    assert read_output(download(f"{url}/out", options, tmp_path / "out")) == expected
    units = [(shard, unit) for shard, unit, _ in logged(tmp_path / "log")]
    assert len(units) == len(set(units)) == result.plan.units


def test_names_that_read_as_patterns_are_names(store, tmp_path):
    url, options = store
    for name, texts in (("a[1].jsonl", ["idiot", "poison"]), ("a1.jsonl", ["fine", "poison", "spam"])):
        write_jsonl(tmp_path / "in" / name, texts)
    upload(tmp_path / "in", f"{url}/in", options)
    for _ in range(2):
        run(f"{url}/in", f"{url}/out", STEPS, unit_rows=1, **fields(options))
    run(tmp_path / "in", tmp_path / "local", STEPS)
    assert read_output(download(f"{url}/out", options, tmp_path / "out")) == read_output(tmp_path / "local")
    cache = RequestCache(f"{url}/c[1]", **options)
    cache.put_many({b"k" * 16: b"v"})
    assert cache.get_many([b"k" * 16, b"l" * 16, b"k" * 16]) == [b"v", None, b"v"]


def test_answers_are_kept_beside_the_output(store, tmp_path):
    url, options = store
    bill = tmp_path / "bill"
    write_jsonl(tmp_path / "in" / "a.jsonl", sample_texts(8))
    run(tmp_path / "in", f"{url}/out", (Ask(str(bill)),), config={"a": 1}, output_options=options)
    asked = len(bill.read_text().split())
    run(
        tmp_path / "in",
        f"{url}/out",
        (Ask(str(bill)),),
        config={"a": 2},
        overwrite=True,
        output_options=options,
    )
    assert len(bill.read_text().split()) == asked == 8
    assert len(RequestCache(f"{url}/out/_tamis/cache", **options)) == 8


def test_files_globs_and_missing_inputs(corpus, store, tmp_path):
    url, options = store
    upload(corpus, f"{url}/in", options)
    assert [s.name for s in list_input(f"{url}/in/more/part-0.jsonl", options).shards] == ["part-0.jsonl"]
    assert [s.name for s in list_input(f"{url}/in/**/*.jsonl", options).shards] == ["more/part-0.jsonl"]
    assert [s.name for s in list_input(f"{url}/in/*.parquet", options).shards] == ["part-0.parquet"]
    for missing, message in ((f"{url}/nothing", "no such input"), (f"{url}/in/*.arrow", "nothing matches")):
        with pytest.raises(InputError, match=message):
            run(missing, tmp_path / "out", STEPS, input_options=options)
    with pytest.raises(OutputError, match="lies inside the input"):
        run(f"{url}/in", f"{url}/in/out", STEPS, **fields(options))


def test_an_input_that_changed_is_seen_in_the_same_process(store, tmp_path):
    """Clients remember listings and checksums; a second run must not plan from what they remember."""
    url, options = store
    folder = Folder(f"{url}/in", **options)
    folder.write("a.jsonl", b'{"text": "idiot"}\n')
    run(f"{url}/in", tmp_path / "out", STEPS, input_options=options)
    other = pickle.loads(pickle.dumps(folder))
    other.fs.clear_instance_cache()  # as another process would: with a client of its own
    Folder(f"{url}/in", **options, use_listings_cache=False).write(
        "a.jsonl", b'{"text": "idiot"}\n{"text": "more"}\n'
    )
    Folder(f"{url}/in", **options, use_listings_cache=False).write("b.jsonl", b'{"text": "new"}\n')
    result = run(f"{url}/in", tmp_path / "out", STEPS, input_options=options)
    assert [s["rows_in"] for s in result.manifest["shards"]] == [2, 1]


def test_foreign_files_are_left_alone(corpus, store):
    url, options = store
    output = Folder(f"{url}/out", **options)
    output.write("thesis.txt", b"years of work")
    with pytest.raises(OutputError, match="holds files that are not tamis's"):
        run(corpus, output.url, STEPS, output_options=options)
    assert output.find() == ["thesis.txt"]


# ------------------------------------------------------------------------------------------------------------ S3 alone


@pytest.fixture
def bucket(s3_server):
    name = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", **s3_server).mkdir(name)
    return f"s3://{name}", s3_server


def test_a_bucket_that_does_not_exist_is_one_line(corpus, s3_server, tmp_path):
    with pytest.raises(InputError, match="no such input: s3://no-such-bucket/in"):
        run("s3://no-such-bucket/in", tmp_path / "out", STEPS, input_options=s3_server)
    with pytest.raises(OutputError, match="s3://no-such-bucket/out"):
        run(corpus, "s3://no-such-bucket/out", STEPS, output_options=s3_server)


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    options = {
        "key": "k",
        "secret": "s",
        "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"},
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }
    with pytest.raises(InputError, match="no such input: s3://b/in: ") as caught:
        list_input("s3://b/in", options)
    assert "\n" not in str(caught.value)


def test_options_travel_with_the_job_to_other_processes(corpus, expected, bucket, tmp_path):
    url, options = bucket
    upload(corpus, f"{url}/in", options)
    folder = pickle.loads(pickle.dumps(Folder(f"{url}/in", **options)))
    assert folder.find() == ["more/part-0.jsonl", "part-0.parquet"]
    cache = RequestCache(f"{url}/cache", **options)
    cache.put_many({b"k" * 16: b"v"})
    assert pickle.loads(pickle.dumps(cache)).get_many([b"k" * 16]) == [b"v"]
    run(f"{url}/in", f"{url}/out", STEPS, unit_rows=7, workers=2, **fields(options))
    assert read_output(download(f"{url}/out", options, tmp_path / "out")) == expected


def test_a_bucket_itself_is_an_input_and_an_output(corpus, bucket, s3_server):
    url, options = bucket
    upload(corpus, url, options)
    name = f"out-{uuid.uuid4().hex}"
    fsspec.filesystem("s3", **s3_server).mkdir(name)
    assert run(url, f"s3://{name}", STEPS, **fields(options)).state == "finished"
    assert Folder(f"s3://{name}", **options).find("data") == ["data/more/part-0.jsonl", "data/part-0.parquet"]


def test_copies_are_made_by_the_server_and_fingerprints_are_its_own(bucket):
    url, options = bucket
    source, target = Folder(f"{url}/a", **options), Folder(f"{url}/b", **options)
    source.write("x.bin", b"x" * 100_000)
    copy_file(source, "x.bin", target, "data/x.bin")
    assert target.read("data/x.bin") == b"x" * 100_000
    assert file_fingerprint(source, "x.bin").startswith("etag:")
    assert file_fingerprint(source, "x.bin") == file_fingerprint(target, "data/x.bin")


def test_odd_names(bucket, tmp_path):
    url, options = bucket
    odd = ["with space.jsonl", "x=1/été 東京 %20#&.jsonl"]
    for name in odd:
        write_jsonl(tmp_path / "in" / name, ["idiot", *sample_texts(3)])
    upload(tmp_path / "in", f"{url}/in", options)
    run(f"{url}/in", f"{url}/out", STEPS, **fields(options))
    run(tmp_path / "in", tmp_path / "local", STEPS)
    assert read_output(download(f"{url}/out", options, tmp_path / "out")) == read_output(tmp_path / "local")
