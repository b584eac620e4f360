"""Bad input, bad output, bad disk: one line before work starts, or rows in dead/ while the rest goes on."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import FatalStepError, InputError, OutputError, TamisError
from tests.conftest import ROOT
from tests.helpers import (
    Ask,
    Drop,
    Fail,
    Keep,
    NeedScratch,
    Replace,
    StopAt,
    files_below,
    read_output,
    read_texts,
    run,
    sample_corpus,
    sample_texts,
    write_jsonl,
    write_parquet,
)
from transforms.shards.files import Folder


@pytest.fixture
def corpus(tmp_path):
    return sample_corpus(tmp_path / "in", shards=1, rows=30)


def dead(out):
    """Rows of dead/: shard -> [(row, stage, error)]."""
    return {
        name.removesuffix(".parquet") if ".jsonl" in name else name: [
            (r["row"], r["stage"], r["error"]) for r in pq.read_table(out / "dead" / name).to_pylist()
        ]
        for name in files_below(out / "dead")
    }


# --------------------------------------------------------------------------------------------------------- the input


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "no such input"),
        ({"a.txt": b"x"}, {}, "no Parquet, JSONL or Arrow shards"),
        (
            {"a.jsonl": b'{"body": "x"}\n'},
            {},
            r"a\.jsonl: no field 'text' \(fields: body\); pass --text-column body",
        ),
        ({"a.jsonl": b'{"text": 1}\n'}, {}, r"a\.jsonl: field 'text' is int, not text"),
        ({"a.jsonl": b'{"text": "x"}\n'}, {"id_column": "doc"}, r"no field 'doc' \(fields: text\)"),
        ({"a.jsonl": b'{"text": "x"}\n', "b.jsonl": b'{"body": "x"}\n'}, {}, r"b\.jsonl: no field 'text'"),
        ({"a.parquet": b"PAR1", "b.arrow": b"ARROW1"}, {}, r"no shard can be read; the first, a\.parquet: "),
        (
            {"a.jsonl": b"\x00\x01\x02\n"},
            {},
            r"no shard can be read; the first, a\.jsonl: ValueError: none of the first 1 lines",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(tmp_path, files, options, message):
    for name, content in files.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path / "in", tmp_path / "out", [Keep()], **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_and_a_glob_without_match(tmp_path):
    (tmp_path / "in").mkdir()
    for source in (tmp_path / "in", tmp_path / "in" / "*.parquet"):
        with pytest.raises(InputError, match=r"no Parquet, JSONL or Arrow shards in|nothing matches"):
            run(source, tmp_path / "out", [Keep()])


def test_a_text_column_of_another_type_in_one_parquet_of_two(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", ["x"])
    pq.write_table(pa.table({"text": [1.5]}), tmp_path / "in" / "b.parquet")
    with pytest.raises(
        InputError, match=r"b\.parquet: column 'text' is double, not text; pass another --text-column"
    ):
        run(tmp_path / "in", tmp_path / "out", [Keep()])


def test_schemas_may_differ_where_the_text_column_does_not(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", ["idiot"])
    pq.write_table(
        pa.table({"z": [[1]], "text": pa.array(["idiot"], pa.large_string())}), tmp_path / "in" / "b.parquet"
    )
    write_jsonl(tmp_path / "in" / "c.jsonl", ["idiot"])
    run(tmp_path / "in", tmp_path / "out", [Replace()])
    for name in ("a.parquet", "b.parquet"):
        assert pq.read_schema(tmp_path / "out" / "data" / name).equals(pq.read_schema(tmp_path / "in" / name))
    assert [read_texts(tmp_path / "out" / "data" / n) for n in ("a.parquet", "b.parquet", "c.jsonl")] == [
        ["person"]
    ] * 3


def test_null_and_empty_texts_go_through(tmp_path):
    texts = [None, "", " ", "idiot", None]
    write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    write_parquet(tmp_path / "in" / "b.parquet", texts)
    result = run(tmp_path / "in", tmp_path / "out", [Drop(), Fail(), Replace()])
    for name in ("a.jsonl", "b.parquet"):
        assert read_texts(tmp_path / "out" / "data" / name) == [None, "", " ", "person", None]
    assert result.manifest["totals"]["rows_kept"] == 10


def test_bad_lines_are_dead_and_the_rest_goes_on(tmp_path):
    good = b'{"text": "idiot"}\n'
    lines = [
        good,
        b'{"text": "\xff\xfe"}\n',
        b'{"text": 5}\n',
        good,
        b'{"no": "text"}\n',
        b"[]\n",
        good,
        b'{"text": "cut sho',
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(lines))
    result = run(tmp_path / "in", tmp_path / "out", [Replace()], unit_rows=3)
    assert (tmp_path / "out" / "data" / "a.jsonl").read_bytes() == good.replace(b"idiot", b"person") * 3
    rows = dead(tmp_path / "out")["a.jsonl"]
    assert [r for r, _, _ in rows] == [1, 2, 4, 5, 7] and {s for _, s, _ in rows} == {"ReadShard"}
    expected = [
        "invalid UTF-8 at byte 10",
        "is int, not text",
        "no field 'text'",
        "not a JSON object but list",
        "invalid JSON",
    ]
    assert all(e in error for e, (_, _, error) in zip(expected, rows, strict=True))
    raws = pq.read_table(tmp_path / "out" / "dead" / "a.jsonl.parquet").column("raw").to_pylist()
    assert raws == [lines[i] for i in (1, 2, 4, 5, 7)]
    assert result.manifest["totals"]["rows_kept"] == 3 and result.manifest["totals"]["rows_dead"] == 5


def test_a_file_of_bad_lines_alone_among_good_files(tmp_path):
    """All rows of a unit may be dead before the first step, and steps that build on one another still run."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b'{"text": 5}\n{"text": "poison"}\n{"text": 7}\n')
    write_jsonl(tmp_path / "in" / "b.jsonl", ["idiot"])
    run(tmp_path / "in", tmp_path / "out", [Fail(), NeedScratch(), Replace()], unit_rows=1)
    assert [r for r, _, _ in dead(tmp_path / "out")["a.jsonl"]] == [0, 1, 2]
    assert read_texts(tmp_path / "out" / "data" / "b.jsonl") == ["person"]
    assert (tmp_path / "out" / "data" / "a.jsonl").read_bytes() == b""


def test_a_truncated_parquet_among_good_ones_is_dead_and_the_rest_goes_on(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", sample_texts(50))
    write_parquet(tmp_path / "in" / "b.parquet", sample_texts(50))
    path = tmp_path / "in" / "b.parquet"
    path.write_bytes(path.read_bytes()[:500])
    result = run(tmp_path / "in", tmp_path / "out", [Replace()])
    assert set(files_below(tmp_path / "out" / "data")) == {"a.parquet"}
    ((row, stage, error),) = dead(tmp_path / "out")["b.parquet"]
    assert (row, stage) == (-1, "ReadShard") and "\n" not in error and error
    entry = {s["path"]: s for s in result.manifest["shards"]}["b.parquet"]
    assert entry["error"] == error and entry["sha256"] == ""


def test_a_parquet_with_damaged_pages_is_one_line_that_names_it(tmp_path):
    """Its footer is whole, so it is found out only when it is read."""
    write_parquet(tmp_path / "in" / "a.parquet", sample_texts(400), compression="zstd")
    write_jsonl(tmp_path / "in" / "b.jsonl", sample_texts(5))
    path = tmp_path / "in" / "a.parquet"
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"a\.parquet cannot be read at row 0: .*replace or remove it"
    ) as caught:
        run(tmp_path / "in", tmp_path / "out", [Replace()])
    assert "\n" not in str(caught.value)
    path.unlink()
    assert run(tmp_path / "in", tmp_path / "out", [Replace()]).state == "finished"


def test_invalid_utf8_in_a_parquet_is_a_dead_row(tmp_path):
    raw = pa.array([b"fine", b"\xff\xfe", b"idiot"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": text}), tmp_path / "in" / "a.parquet")
    run(tmp_path / "in", tmp_path / "out", [Replace()])
    ((row, stage, error),) = dead(tmp_path / "out")["a.parquet"]
    assert (row, stage) == (1, "ReplaceWord") and "UnicodeDecodeError" in error
    whole = pq.read_table(tmp_path / "out" / "dead" / "a.parquet")
    assert whole.column("text").to_pylist() == [b"\xff\xfe"]
    assert read_texts(tmp_path / "out" / "data" / "a.parquet") == ["fine", "person"]


def test_shards_without_rows(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", [])
    write_jsonl(tmp_path / "in" / "b.jsonl", [])
    (tmp_path / "in" / "c.jsonl").write_bytes(b"\n\n")
    write_jsonl(tmp_path / "in" / "d.jsonl", ["idiot"])
    result = run(tmp_path / "in", tmp_path / "out", [Replace()])
    assert [s["rows_in"] for s in result.manifest["shards"]] == [0, 0, 0, 1]
    before, after = files_below(tmp_path / "in"), files_below(tmp_path / "out" / "data")
    assert {k: v for k, v in after.items() if k != "d.jsonl"} == {
        k: v for k, v in before.items() if k != "d.jsonl"
    }


def test_shards_without_rows_alone(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", [])
    result = run(tmp_path / "in", tmp_path / "out", [Replace()])
    assert result.state == "finished" and result.manifest["totals"]["rows_in"] == 0
    assert run(tmp_path / "in", tmp_path / "out", [Replace()]).state == "already finished"


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", pytest.param("arrow", marks=pytest.mark.slow)])
def test_one_text_of_fifty_megabytes(tmp_path, suffix):
    texts = ["fine", "idiot " + "x" * 50_000_000, "idiot", "y" * 20_000_000]
    path = tmp_path / "in" / f"a.{suffix}"
    path.parent.mkdir()
    if suffix == "parquet":
        write_parquet(path, texts)
    elif suffix == "jsonl":
        write_jsonl(path, texts)
    else:
        table = pa.table({"text": texts})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    result = run(tmp_path / "in", tmp_path / "out", [Replace()])
    assert result.plan.units > 1
    assert read_texts(tmp_path / "out" / "data" / path.name) == [t.replace("idiot", "person") for t in texts]


def test_duplicate_ids_are_counted(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", ["x", "y"])
    (tmp_path / "in" / "b.jsonl").write_text(
        '{"text": "x", "doc": "k"}\n{"text": "y", "doc": "k"}\n{"text": "z"}\n'
    )
    result = run(tmp_path / "in", tmp_path / "out", [Keep()], id_column="doc")
    assert [s["duplicate_ids"] for s in result.manifest["shards"]] == [0, 1]


def test_an_input_that_changes_while_the_job_runs_is_one_line(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", sample_texts(20))
    write_jsonl(tmp_path / "in" / "b.jsonl", sample_texts(20))
    steps = [Shrink(str(tmp_path / "in" / "b.jsonl")), Replace()]
    with pytest.raises(InputError, match=r"b\.jsonl.*changed while the job ran; run the same command again"):
        run(tmp_path / "in", tmp_path / "out", steps, unit_rows=5)
    assert run(tmp_path / "in", tmp_path / "out", steps, unit_rows=5).state == "finished"
    run(tmp_path / "in", tmp_path / "fresh", [Replace()])
    assert read_output(tmp_path / "out") == read_output(tmp_path / "fresh")


@pytest.mark.parametrize("how", ["grow", "change", "remove"])
@pytest.mark.parametrize("step", [Keep(), Replace()], ids=["copied", "spliced"])
def test_an_input_that_grows_or_changes_while_the_job_runs_is_not_finished(tmp_path, how, step):
    """Nothing of what is read falls short, so that only the file itself can tell."""
    source, out = tmp_path / "in" / "a.jsonl", tmp_path / "out"
    write_jsonl(source, ["idiot", "fine"])
    with pytest.raises(
        InputError, match=r"a\.jsonl: it changed while the job ran; run the same command again"
    ):
        run(tmp_path / "in", out, [Meddle(str(source), how), step])
    assert not (out / "_SUCCESS").exists() and not (out / "data" / "a.jsonl").exists()
    if how == "remove":
        write_jsonl(source, ["idiot", "new"])
    run(tmp_path / "in", out, [Meddle(str(source), "touch"), step])  # its time alone means nothing
    run(tmp_path / "in", tmp_path / "fresh", [step])
    assert read_output(out) == read_output(tmp_path / "fresh")


def test_an_object_that_changes_while_the_job_runs_is_not_finished(tmp_path):
    source = Folder("memory://changing/in")
    source.write("a.jsonl", b'{"text": "idiot"}\n')
    try:
        with pytest.raises(InputError, match=r"a\.jsonl: it changed while the job ran"):
            run(source.url, tmp_path / "out", [Meddle(source.url, "store")])
    finally:
        source.remove("")


class Meddle(Keep):
    """Does something to a file that the job has read from."""

    def __init__(self, path, how):
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "how", how)
        object.__setattr__(self, "label", "Meddle")

    def __call__(self, batch, context):
        path = Path(self.path)
        if self.how == "grow":
            path.write_bytes(path.read_bytes() + b'{"text": "late"}\n')
        elif self.how == "change":
            path.write_bytes(path.read_bytes().replace(b"fine", b"good"))
        elif self.how == "remove":
            path.unlink()
        elif self.how == "store":
            Folder(self.path).write("a.jsonl", b'{"text": "other"}\n')
        os.utime(path, ns=(1, 1)) if path.exists() else None
        return batch


class Shrink(Keep):
    """Cuts a file while the job reads another one."""

    def __init__(self, path):
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "label", "Shrink")

    def __call__(self, batch, context):
        path = Path(self.path)
        path.write_bytes(path.read_bytes()[:200].rpartition(b"\n")[0] + b"\n")
        return batch


# -------------------------------------------------------------------------------------------------------- the output


def test_the_output_may_not_lie_inside_the_input_nor_the_input_inside_the_output(
    corpus, tmp_path, monkeypatch
):
    for output in (corpus / "out", corpus / "more" / "out", corpus, corpus / "x" / ".." / "out"):
        with pytest.raises(OutputError, match="lies inside the input"):
            run(corpus, output, [Keep()])
    with pytest.raises(OutputError, match="lies inside the output"):
        run(corpus / "more", tmp_path, [Keep()])
    monkeypatch.chdir(corpus)
    with pytest.raises(OutputError, match="lies inside the input"):
        run(".", "out", [Keep()])
    assert files_below(corpus).keys() == {"part-0.parquet", "more/part-0.jsonl"}


def test_the_output_may_not_lie_where_a_glob_looks_nor_behind_a_link_into_the_input(corpus, tmp_path):
    """A run again would find the first one's output among its input."""
    with pytest.raises(OutputError, match="lies inside the input"):
        run(f"{corpus}/**/*.jsonl", corpus / "clean", [Keep()])
    for link, output in (
        (tmp_path / "link", tmp_path / "link" / "out"),
        (tmp_path / "out", tmp_path / "out"),
    ):
        (corpus / "empty").mkdir(exist_ok=True)
        link.symlink_to(corpus / "empty")
        with pytest.raises(OutputError, match="lies inside the input"):
            run(corpus, output, [Keep()])
    (tmp_path / "alias").symlink_to(corpus)
    with pytest.raises(OutputError, match="lies inside the input"):
        run(tmp_path / "alias", corpus / "out", [Keep()])
    assert files_below(corpus).keys() == {"part-0.parquet", "more/part-0.jsonl"}
    for _ in range(2):  # one level is not all levels
        assert "finished" in run(f"{corpus}/more/*.jsonl", corpus / "more" / "clean", [Keep()]).state


def test_an_empty_output_is_one_line(corpus):
    with pytest.raises(OutputError, match="the output is empty"):
        run(corpus, "", [Keep()])


def test_a_glob_that_the_shell_expanded_is_one_line(corpus, tmp_path):
    with pytest.raises(TamisError, match=r"one input, and b\.jsonl is one more; quote a glob"):
        run(corpus, tmp_path / "out", [Keep()], beam_args=("b.jsonl", "c.jsonl"))
    with pytest.raises(TamisError, match="Beam knows no option --b"):
        run(corpus, tmp_path / "out", [Keep()], beam_args=("--b", "c.jsonl"))


def test_a_folder_whose_name_only_begins_like_the_input_is_another_folder(corpus, tmp_path):
    assert run(corpus, f"{corpus}-clean", [Keep()]).state == "finished"


def test_foreign_files_are_left_alone(corpus, tmp_path):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds files that are not tamis's; choose an empty folder"):
            run(corpus, out, [Keep()], overwrite=overwrite)
    assert files_below(out) == {"sub/thesis.txt": b"years of work"}


def test_an_empty_folder_is_taken(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    assert run(corpus, tmp_path / "out", [Keep()]).state == "finished"


def test_a_file_where_the_folder_should_be(corpus, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is a file; pass a folder"):
        run(corpus, tmp_path / "out", [Keep()])


def test_another_job_or_another_input_is_refused_even_with_overwrite(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out, [Replace()], name="clean")
    before = read_output(out)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds a clean job; choose another --output"):
            run(corpus, out, [Replace()], name="other", overwrite=overwrite)
        with pytest.raises(OutputError, match=f"holds a job over {corpus}; choose another --output"):
            run(corpus / "more", out, [Replace()], name="clean", overwrite=overwrite)
    assert read_output(out) == before and (out / "_SUCCESS").exists()


def test_another_input_under_the_same_root_does_not_replace_the_output(tmp_path, monkeypatch):
    root, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write_jsonl(root / name, [f"idiot {name}"])
    run(root / "a.jsonl", out, [Replace()])
    before = read_output(out)
    for source in (root / "b.jsonl", root / "[bc].jsonl"):
        with pytest.raises(OutputError, match=r"holds a job over .*/a\.jsonl, whose a\.jsonl .*--overwrite"):
            run(source, out, [Replace()])
    assert read_output(out) == before and (out / "_SUCCESS").exists()
    assert run(root / "[ab].jsonl", out, [Replace()]).done == 1  # more than before: nothing is lost
    monkeypatch.chdir(root)
    (root / "b.jsonl").unlink()
    assert run("../in/[ab].jsonl", out, [Replace()]).state == "finished"  # the same input, a shard taken away
    assert set(files_below(out / "data")) == {"a.jsonl"}
    run(root / "c.jsonl", out, [Replace()], overwrite=True)
    assert set(files_below(out / "data")) == {"c.jsonl"}


def test_other_settings_need_overwrite_which_leaves_nothing_of_the_old(corpus, tmp_path):
    out = tmp_path / "out"
    run(corpus, out, [Replace(), Fail(), Drop()], config={"word": "idiot", "same": 1})
    with pytest.raises(OutputError, match=r"holds this job with other settings \(word\); pass --overwrite"):
        run(corpus, out, [Replace("fox")], config={"word": "fox", "same": 1})
    assert (out / "_SUCCESS").exists()
    result = run(corpus, out, [Replace("fox")], config={"word": "fox", "same": 1}, overwrite=True)
    assert result.state == "finished" and result.done == 0
    run(corpus, tmp_path / "fresh", [Replace("fox")], config={"word": "fox", "same": 1})
    assert read_output(out) == read_output(tmp_path / "fresh")


def test_overwriting_keeps_the_answers_already_paid_for(corpus, tmp_path):
    out, bill = tmp_path / "out", tmp_path / "bill"
    run(corpus, out, [Ask(str(bill))], config={"threshold": 1})
    asked = len(bill.read_text().split())
    run(corpus, out, [Ask(str(bill))], config={"threshold": 2}, overwrite=True)
    assert len(bill.read_text().split()) == asked == 30


def test_overwrite_does_nothing_to_an_output_that_is_the_same(corpus, tmp_path):
    run(corpus, tmp_path / "out", [Replace()])
    assert run(corpus, tmp_path / "out", [Replace()], overwrite=True).state == "already finished"


def test_an_unknown_protocol_of_the_output_is_one_line(corpus):
    with pytest.raises(OutputError, match="nosuch"):
        run(corpus, "nosuch://bucket/out", [Keep()])


def test_an_output_that_cannot_be_written_is_one_line(corpus):
    with pytest.raises(OutputError, match="cannot write to the output /proc/tamis-out"):
        run(corpus, "/proc/tamis-out", [Keep()])


# ---------------------------------------------------------------------------------------------------------- the disk


def mount(folder, size):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tamis-test", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small tmpfs here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with 512 kB on it."""
    folder = tmp_path / "disk"
    mount(folder, "512k")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


LIMITED = """
import resource, sys
from pathlib import Path
from tests.helpers import *
from tests.jobs.test_engine_bad_input import *
corpus, out, limit, workers = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    run(corpus, out, [Replace(), Grow(1000)], unit_rows=100, workers=int(workers))
except TamisError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


class Grow(Keep):
    """Makes every text longer, so that the output outgrows its disk."""

    def __init__(self, by):
        object.__setattr__(self, "by", by)
        object.__setattr__(self, "label", "Grow")

    def __call__(self, batch, context):
        from schemas import flight

        noise = [os.urandom(self.by // 2).hex() for _ in range(batch.num_rows)]
        texts = [f"{t} {n}" for t, n in zip(batch.column("text").to_pylist(), noise, strict=True)]
        return flight.set_column(batch, "text", pa.array(texts))


ROOMY = (("a.parquet", 100), ("b.jsonl", 700), ("c.jsonl", 100))


def growing(root):
    for name, rows in ROOMY:
        (write_parquet if name.endswith("parquet") else write_jsonl)(root / name, sample_texts(rows))
    return root


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path, small_disk):
    corpus = growing(tmp_path / "in")
    out = small_disk / "out"
    with pytest.raises(TamisError, match=r"No space left on device.*run the same command again") as caught:
        run(corpus, out, [Replace(), Grow(1000)], unit_rows=100)
    assert "\n" not in str(caught.value) and not (out / "_SUCCESS").exists()
    assert set(files_below(out / "data")) <= {n for n, _ in ROOMY} if (out / "data").exists() else True
    assert list((out / "_tamis" / "receipts").rglob("*.json"))  # what was committed stays
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    result = run(corpus, out, [Replace(), Grow(1000)], unit_rows=100)
    assert result.state == "finished" and result.done > 0
    assert result.manifest["totals"]["rows_kept"] == 900 and result.manifest["totals"]["rows_dead"] == 0


@pytest.mark.parametrize("free", ["4k", "16k", "48k"])
def test_a_disk_that_is_full_at_any_stage_is_one_line(tmp_path, free):
    """Before the plan, at the plan, at the first units, in the request cache: never a traceback, never a dead row."""
    disk = tmp_path / "disk"
    mount(disk, free)
    try:
        with pytest.raises(
            TamisError, match=r"No space left on device|disk is full|disk I/O error"
        ) as caught:
            run(
                growing(tmp_path / "in"),
                disk / "out",
                [Ask(str(tmp_path / "bill")), Grow(1000)],
                unit_rows=50,
            )
        assert "\n" not in str(caught.value)
        assert not (disk / "out" / "_SUCCESS").exists() and not (disk / "out" / "dead").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def test_a_read_only_disk_is_one_line(corpus, small_disk):
    run(corpus, small_disk / "out", [Keep()])
    (small_disk / "out" / "_SUCCESS").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in (small_disk / "out", small_disk / "other"):
        with pytest.raises(OutputError, match=r"cannot write to the output .*Read-only file system"):
            run(corpus, out, [Keep()])


def test_a_limit_on_file_size_is_one_line(tmp_path):
    corpus = growing(tmp_path / "in")
    command = [sys.executable, "-c", LIMITED, str(corpus), str(tmp_path / "out"), "60000", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == FatalStepError.exit_code, done.stdout + done.stderr
    assert re.fullmatch(
        r"FatalStepError cannot write .*File too large.*run the same command again.*\n", done.stdout
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE) and not (tmp_path / "out" / "_SUCCESS").exists()
    result = run(corpus, tmp_path / "out", [Replace(), Grow(1000)], unit_rows=100)
    assert result.state == "finished" and result.manifest["totals"]["rows_dead"] == 0


def test_a_stopped_run_says_where_it_stopped(corpus, tmp_path):
    with pytest.raises(FatalStepError, match="stopped by the test") as caught:
        run(corpus, tmp_path / "out", [StopAt(str(tmp_path / "no"), "part-0.parquet", 0)])
    assert "\n" not in str(caught.value) and "while running" not in str(caught.value)
    assert json.loads((tmp_path / "out" / "_tamis" / "job.json").read_text())["name"] == "test"
