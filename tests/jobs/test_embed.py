"""`tamis embed`, `tamis index` and `tamis search` as a user runs them, with a tiny random encoder."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from models import registry
from pipelines.embed import EmbedConfig, IndexConfig, build_job, index_output, run
from pipelines.run import RunSettings
from pipelines.search import Query, Searcher, SearchOptions, read_queries, run_file, show_hits
from pipelines.verify import verify_output
from schemas.errors import InputError, ModelError, OutputError, TamisError
from tests.conftest import ROOT
from tests.helpers import read_output
from tests.models.tiny_classifier import WORDS
from tests.models.tiny_encoder import PROMPTS, save_encoder
from transforms.embed.vectors import VectorShards, from_arrow
from transforms.shards.formats import UnitLimits

QUIET = RunSettings(progress="quiet")


def texts(n: int) -> list[str | None]:
    """n texts of words the tiny model knows; every 10th is empty or null, every 7th is over its limit."""
    rng = np.random.default_rng(0)
    found: list[str | None] = []
    for i in range(n):
        size = 60 if i % 7 == 3 else int(rng.integers(1, 12))
        found.append(("" if i % 20 else None) if i % 10 == 0 else " ".join(rng.choice(WORDS[:31], size)))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("model"), prompts=PROMPTS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), shards=2)


def write_corpus(folder: Path, *, shards: int, rows: int = 60) -> Path:
    """Parquet and JSONL shards with id, title, text."""
    every = texts(rows)
    for i, part in enumerate(np.array_split(np.arange(rows), shards)):
        table = {
            "doc": [f"d{n}" for n in part],
            "title": ["nice garden" if n % 3 else None for n in part],
            "text": [every[n] for n in part],
        }
        if i % 2:
            lines = (
                json.dumps(dict(zip(table, row, strict=True))) for row in zip(*table.values(), strict=True)
            )
            (folder / f"part-{i}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        else:
            pq.write_table(pa.table(table), folder / f"part-{i}.parquet")
    return folder


def config(corpus, out, model, **changes) -> EmbedConfig:
    return EmbedConfig(input=str(corpus), output=str(out), encoder=str(model), id_column="doc", **changes)


def by_id(out: Path) -> dict[str, tuple]:
    """Vector (or None) and info of every row of an output, by id."""
    found = {}
    for path in sorted((out / "attributes" / "embedding").rglob("*.parquet")):
        table = pq.read_table(path)
        info = pq.read_table(str(path).replace("/embedding/", "/embedding_info/"))
        vectors, missing = from_arrow(table.column("value").combine_chunks())
        rows = zip(
            table.column("id").to_pylist(), vectors, missing, info.column("value").to_pylist(), strict=True
        )
        for id_, vector, gone, said in rows:
            found[id_] = (None if gone else vector.tobytes(), tuple(said.values()))
    return found


@pytest.fixture(scope="module")
def embedded(corpus, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "out"
    run(config(corpus, out, model, index=IndexConfig(kind="ivf", lists=3)), QUIET)
    return out


def test_vectors_stand_row_by_row_beside_an_unchanged_corpus(corpus, model, embedded):
    for name in ("part-0.parquet", "part-1.jsonl"):
        assert (embedded / "data" / name).read_bytes() == (corpus / name).read_bytes()
    encoder = registry.load("encoder", f"hf:{model}")
    found = by_id(embedded)
    assert list(found) == [f"d{i}" for i in range(60)]
    for i, text in enumerate(texts(60)):
        vector, (status, tokens, windows, norm) = found[f"d{i}"]
        if not text:
            assert (vector, status, tokens, windows, norm) == (None, "empty", 0, 0, None)
            continue
        done = encoder.embed([text], prompt=PROMPTS["passage"], long="truncate")
        assert vector == done.vectors[0].tobytes()
        assert status == ("truncated" if i % 7 == 3 else "ok")
        assert tokens == done.tokens[0] and windows == 1 and norm == pytest.approx(done.norms[0])
    assert verify_output(str(embedded)).problems == []
    part = next((embedded / "index").rglob("part-*.faiss"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "sha256" in verify_output(str(embedded), compare=False).problems[0]
    part.write_bytes(whole)


def test_the_manifest_says_what_was_done(embedded):
    manifest = json.loads((embedded / "manifest.json").read_text())
    (encoder,) = manifest["models"]
    assert encoder["extra"] | {"pooling": "mean", "similarity": "cosine", "dimension": 32} == encoder["extra"]
    assert manifest["config"]["prompt"] == PROMPTS["passage"] and manifest["config"]["long"] == "truncate"
    counters = manifest["counters"]
    empty = sum(not t for t in texts(60))
    long = sum(bool(t) and i % 7 == 3 for i, t in enumerate(texts(60)))
    assert (counters["embed.empty"], counters["embed.truncated"]) == (empty, long)
    assert counters["embed.ok"] == 60 - empty - long
    assert manifest["index"]["vectors"] == 60 - empty and manifest["index"]["recall"]["value"] >= 0.95
    assert not (embedded / "_tamis" / "cache").exists()


def test_the_report_shows_the_vectors_and_the_index(embedded):
    page = (embedded / "report.html").read_text()
    assert "54 of 60 documents embedded" in page and "recall@10 of the index" in page
    section = page[page.index('id="embedding"') :]
    assert "over the limit: cut" in section and "IVF3,Flat" in section and "the passage :" in section
    assert section.count("<svg") >= 2
    assert "attributes/embedding/**/*.parquet" in (embedded / "README.md").read_text()


@pytest.mark.parametrize(("shards", "rows", "workers"), [(1, None, 1), (4, 3, 1), (3, 7, 2)])
def test_numbers_do_not_depend_on_shards_units_or_workers(model, embedded, tmp_path, shards, rows, workers):
    (tmp_path / "in").mkdir()
    source = write_corpus(tmp_path / "in", shards=shards)
    settings = replace(QUIET, workers=workers, limits=UnitLimits(rows=rows) if rows else None)
    run(config(source, tmp_path / "out", model), settings)
    assert by_id(tmp_path / "out") == by_id(embedded)


def test_long_texts_are_averaged_where_asked(corpus, model, tmp_path):
    run(config(corpus, tmp_path / "out", model, long="mean"), QUIET)
    status = {id_: info[0] for id_, (_, info) in by_id(tmp_path / "out").items()}
    assert status["d3"] == "mean" and status["d1"] == "ok" and "truncated" not in status.values()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (
        manifest["counters"]["embed.windows"]
        > manifest["counters"]["embed.mean"] + manifest["counters"]["embed.ok"]
    )


def test_text_is_made_of_columns(corpus, model, tmp_path):
    run(config(corpus, tmp_path / "out", model, text="{title} {text}", prefix=""), QUIET)
    found = by_id(tmp_path / "out")
    encoder = registry.load("encoder", f"hf:{model}")
    every = texts(60)
    assert found["d0"][1][0] == "empty"  # neither title nor text
    for i, text in ((1, f"nice garden {every[1]}"), (6, every[6]), (10, "nice garden")):
        assert found[f"d{i}"][0] == encoder.embed([text], long="truncate").vectors[0].tobytes()
    with pytest.raises(InputError, match=r"no (column|field) 'headline'"):
        run(config(corpus, tmp_path / "other", model, text="{headline} {text}"), QUIET)
    with pytest.raises(TamisError, match="names no column"):
        build_job(config(corpus, tmp_path / "other", model, text="text"))


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_vectors_may_be_stored_smaller(corpus, model, embedded, tmp_path, store):
    run(config(corpus, tmp_path / "out", model, store=store), QUIET)
    exact = np.concatenate([b.vectors for b in VectorShards(str(embedded)).batches()])
    near = np.concatenate([b.vectors for b in VectorShards(str(tmp_path / "out")).batches()])
    np.testing.assert_allclose(near, exact, atol=0.004)
    type_ = (
        pq.read_table(tmp_path / "out" / "attributes" / "embedding" / "part-0.parquet")
        .schema.field("value")
        .type
    )
    assert str(type_.value_type) == {"float16": "halffloat"}.get(store, store)
    assert pl.read_parquet(tmp_path / "out" / "attributes" / "embedding" / "part-0.parquet").height == 30


KILLED = """
import os, signal, sys
from models.encoders import SentenceEncoder
from pipelines.embed import EmbedConfig, run
from pipelines.run import RunSettings
from transforms.embed import steps
steps._PART_CHARACTERS, steps.CHECKPOINT_SECONDS = 200, -1
embed, calls = SentenceEncoder.embed, []
def dies(self, texts, **more):
    calls.append(len(texts))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, texts, **more)
SentenceEncoder.embed = dies
run(EmbedConfig(**eval(sys.argv[1])), RunSettings(progress="quiet"))
"""


def test_a_run_killed_within_a_unit_embeds_the_rest_only(corpus, model, embedded, tmp_path):
    settings = config(corpus, tmp_path / "out", model)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, repr(settings.model_dump())],
        cwd=ROOT,
        capture_output=True,
        timeout=250,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    result = run(settings, QUIET)
    assert by_id(tmp_path / "out") == by_id(embedded)
    assert result.manifest["counters"]["embed.from_cache"] > 0
    assert not (tmp_path / "out" / "_tamis" / "cache").exists()


def test_an_index_is_added_to_a_finished_output_and_a_second_run_changes_nothing(corpus, model, tmp_path):
    settings = config(corpus, tmp_path / "out", model)
    run(settings, QUIET)
    before = read_output(tmp_path / "out")
    again = run(settings.model_copy(update={"index": IndexConfig(kind="flat")}), QUIET)
    assert again.state == "already finished" and again.manifest["index"]["kind"] == "flat"
    entry = index_output(str(tmp_path / "out"), IndexConfig(kind="hnsw"))
    assert entry["kind"] == "hnsw" and len(list((tmp_path / "out" / "index").iterdir())) == 1
    assert read_output(tmp_path / "out") == before
    with pytest.raises(OutputError, match=r"other settings \(store\)"):
        run(settings.model_copy(update={"store": "int8"}), QUIET)
    run(settings.model_copy(update={"store": "int8"}), replace(QUIET, overwrite=True))
    assert not (tmp_path / "out" / "index").exists()


def test_a_bad_line_dies_alone(model, tmp_path):
    (tmp_path / "in").mkdir()
    lines = [
        '{"text": "nice tea", "title": "a"}',
        "no json",
        '{"text": "so good", "title": ["x"]}',
        '{"text": "tea"}',
    ]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines) + "\n")
    result = run(
        EmbedConfig(
            input=str(tmp_path / "in"),
            output=str(tmp_path / "out"),
            encoder=str(model),
            text="{title} {text}",
        ),
        QUIET,
    )
    assert result.manifest["totals"]["rows_dead"] == 2 and result.manifest["totals"]["rows_kept"] == 2
    dead = pq.read_table(
        tmp_path / "out" / "dead" / "a.jsonl.parquet"
    )  # it can be read: no null vectors in it
    assert "field 'title' is list" in dead.column("error").to_pylist()[1]


# -------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("exact", [False, True])
def test_a_query_finds_its_own_text(corpus, embedded, model, exact):
    searcher = Searcher(str(embedded), SearchOptions(exact=exact))
    assert searcher.prompt == PROMPTS["query"] and (searcher.index is None) == exact
    # Asked with the documents' own prompt, a document's nearest neighbour is itself.
    twin = Searcher(str(embedded), SearchOptions(exact=exact, prompt_name="passage"))
    every = texts(60)
    hits = twin.search([every[5], every[18]], 3)
    assert hits.ids[:, 0].tolist() == ["d5", "d18"]
    np.testing.assert_allclose(hits.scores[:, 0], 1, atol=1e-5)
    places = twin.places(hits)
    found = twin.texts(places.values())
    assert [found[places[int(o)]] for o in hits.ordinals[:, 0]] == [every[5], every[18]]


def test_hits_are_printed_with_their_texts(embedded, capsys):
    show_hits(Searcher(str(embedded)), "a lovely dinner", 3)
    assert len(re.findall(r"\bd\d+\b", capsys.readouterr().out)) == 3
    show_hits(Searcher(str(embedded)), "a lovely dinner", 2, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["rank"] for r in rows] == [1, 2] and rows[0]["text"] == texts(60)[int(rows[0]["id"][1:])]


def test_a_file_of_queries_gives_a_run(embedded, tmp_path):
    (tmp_path / "q.jsonl").write_text(
        '{"_id": "q1", "text": "nice tea"}\n{"_id": "q2", "text": "bad train"}\n'
    )
    (tmp_path / "q.tsv").write_text("q1\tnice tea\nq2\tbad train\n")
    pq.write_table(
        pa.table({"query_id": ["q1", "q2"], "query": ["nice tea", "bad train"]}), tmp_path / "q.parquet"
    )
    queries = [Query("q1", "nice tea"), Query("q2", "bad train")]
    for name in ("q.jsonl", "q.tsv", "q.parquet"):
        assert read_queries(str(tmp_path / name)) == queries
    searcher = Searcher(str(embedded))
    run_text = run_file(searcher, queries, 5, None, tag="mine")
    lines = [line.split() for line in run_text.splitlines()]
    assert len(lines) == 10 and lines[0][:2] == ["q1", "Q0"] and lines[5][0] == "q2" and lines[4][3] == "5"
    assert {line[5] for line in lines} == {"mine"}
    run_file(searcher, queries, 5, str(tmp_path / "run.parquet"))
    table = pq.read_table(tmp_path / "run.parquet").to_pylist()
    assert [[r["query_id"], r["doc_id"], str(r["rank"])] for r in table] == [
        [a[0], a[2], a[3]] for a in lines
    ]


def test_what_is_wrong_with_queries_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"_id": "q1", "words": "x"}\n')
    (tmp_path / "b.tsv").write_text("q1\tx\nq1\ty\n")
    (tmp_path / "c.tsv").write_text("\n")
    for name, said in (
        ("a.jsonl", "none of the fields text"),
        ("b.tsv", "twice"),
        ("c.tsv", "holds no queries"),
    ):
        with pytest.raises(InputError, match=said):
            read_queries(str(tmp_path / name))
    with pytest.raises(InputError, match="no such file"):
        read_queries(str(tmp_path / "d.tsv"))


def test_other_weights_are_refused(corpus, tmp_path):
    model = save_encoder(tmp_path / "m")
    run(config(corpus, tmp_path / "out", model), QUIET)
    save_encoder(tmp_path / "m2", seed=4)
    (model / "model.safetensors").write_bytes((tmp_path / "m2" / "model" / "model.safetensors").read_bytes())
    registry.forget()
    with pytest.raises(ModelError, match="has other weights"):
        Searcher(str(tmp_path / "out"))


def test_the_commands_take_what_the_help_says(corpus, model, tmp_path, monkeypatch):
    from pipelines.cli import app

    out = str(tmp_path / "out")
    base = [
        "embed",
        str(corpus),
        "-o",
        out,
        "--model",
        str(model),
        "--id-column",
        "doc",
        "--progress",
        "quiet",
    ]
    runner = CliRunner()
    made = runner.invoke(
        app, [*base, "--text-columns", "title,text", "--index", "flat", "--index-option", "codec=float16"]
    )
    assert made.exit_code == 0, made.output
    assert "rows embedded" in made.output and "SQfp16" in made.output
    asked = runner.invoke(app, ["search", out, "nice garden", "-k", "2", "--json"])
    assert asked.exit_code == 0 and len(asked.output.splitlines()) == 2
    built = runner.invoke(app, ["index", out, "--kind", "ivf", "--index-option", "lists=2", "--quiet"])
    assert built.exit_code == 0 and "IVF2" in built.output
    wrong = runner.invoke(app, [*base, "--index", "ivf", "--index-option", "leaves=2"])
    assert isinstance(wrong.exception, TamisError) and "lists" in str(wrong.exception)
    wrong = runner.invoke(app, [*base, "--store", "float8"])
    assert isinstance(wrong.exception, TamisError) and "--store" in str(wrong.exception)
    assert runner.invoke(app, ["search", out]).exit_code == 2


def test_an_impossible_index_is_said_before_work(corpus, model, tmp_path):
    with pytest.raises(TamisError, match="neither flat, ivf, hnsw"):
        run(config(corpus, tmp_path / "out", model, index=IndexConfig(kind="oak")), QUIET)
    assert not (tmp_path / "out").exists()
