"""Retrievers end to end on a tiny encoder: what is trained, what is saved, what is refused, and a killed run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from models.training.retriever_data import read_groups
from models.training.shards import list_shards
from pipelines.train_retriever import run
from schemas.errors import InputError
from schemas.groups import GROUP_SCHEMA
from tests.jobs.killing import kill_after
from tests.jobs.retriever_parts import (
    ROOT,
    TOPICS,
    assert_equal_weights,
    config,
    documents,
    ranking_accuracy,
    step_events,
    weights,
    write_groups,
)
from tests.models.tiny_encoder import save_encoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_encoder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return str(write_groups(tmp_path_factory.mktemp("groups")))


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return str(write_groups(tmp_path_factory.mktemp("staged"), stages=("llm", "human")))


@pytest.fixture(scope="module")
def trained(groups, tiny, tmp_path_factory):
    return run(config(groups, tiny, tmp_path_factory.mktemp("out") / "retriever", epochs=6, save_steps=200))


def test_it_learns_to_retrieve_and_loads_everywhere(trained, tiny):
    from models import registry

    assert ranking_accuracy(trained.output) > ranking_accuracy(tiny) + 0.2
    encoder = registry.load("encoder", f"hf:{trained.output}")
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(trained.output), device="cpu")
    np.testing.assert_allclose(encoder.encode(TOPICS), library.encode(TOPICS), atol=1e-5)
    stage = trained.record["results"]["stages"][0]
    assert stage["last"]["positive_score"] > stage["last"]["negative_score"]
    assert stage["last"]["excluded"] == 0
    assert (trained.output / "_SUCCESS").read_text().strip() == trained.record["config_hash"]


def test_the_card_says_what_it_learned_from(trained):
    card = (trained.output / "README.md").read_text()
    for said in (
        "lse_pair",
        "`test-run`",
        "| human | human | human |",
        "SentenceTransformer",
        "tamis train retriever",
    ):
        assert said in card, said
    labels = trained.record["data"]["labels"]
    assert labels[0]["label_source"] == "human" and labels[0]["positives"] > 40
    assert trained.record["data"]["lineage"]["run_id"] == "test-run"


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_very_same_weights(staged, tiny, tmp_path, train):
    options = {
        "train": train,
        "loss": "lse_pair",
        "accumulate": 2,
        "epochs": "llm=2,human=1",
        "lora_dropout": 0.1,
    }
    whole = run(config(staged, tiny, tmp_path / "whole", **options))
    killed = tmp_path / "killed"
    # the first checkpoint of the second stage: the first is over, the second is not
    kill_after(
        killed / "_tamis/checkpoints/1-human/checkpoint-2/COMPLETE", config(staged, tiny, killed, **options)
    )
    assert not (killed / "_SUCCESS").exists()
    result = run(config(staged, tiny, killed, **options))
    assert result.resumed_from > whole.record["results"]["stages"][0]["steps"]
    assert_equal_weights(tmp_path / "whole", killed)
    for one, two in zip(result.record["results"]["stages"], whole.record["results"]["stages"], strict=True):
        assert one["train_loss"] == two["train_loss"] and one["tokens_seen"] == two["tokens_seen"]
    again = run(config(staged, tiny, killed, **options))
    assert again.plan is None and again.record == result.record
    assert (killed / "adapter").exists() == (train == "lora")


def test_stages_are_trained_in_order_and_start_their_learning_rate_anew(staged, tiny, tmp_path):
    rates = "llm=3e-3,human=1e-3"
    result = run(
        config(staged, tiny, tmp_path / "out", quiet=True, learning_rate=rates, epochs="llm=2,human=1")
    )
    steps = step_events(tmp_path / "out")
    assert [e["stage"] for e in steps] == ["llm"] * 10 + ["human"] * 5
    by_stage = {s: [e["lr"] for e in steps if e["stage"] == s] for s in ("llm", "human")}
    assert max(by_stage["llm"]) == pytest.approx(3e-3) and by_stage["llm"][-1] < 1e-3
    assert max(by_stage["human"]) == pytest.approx(1e-3)
    assert all({"positive_score", "negative_score", "excluded"} <= e.keys() for e in steps)
    assert [s["name"] for s in result.record["run"]["stages"]] == ["llm", "human"]
    only = run(config(staged, tiny, tmp_path / "one", stages=("human",), max_steps=2))
    assert [s["name"] for s in only.record["run"]["stages"]] == ["human"]


def test_a_stage_of_one_step_has_its_learning_rate(groups, tiny, tmp_path):
    run(config(groups, tiny, tmp_path / "out", quiet=True, learning_rate="2e-3", max_steps=1))
    assert [e["lr"] for e in step_events(tmp_path / "out")] == [pytest.approx(2e-3)]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("side", ["shared", "fixed", "head"])
def test_a_head_is_saved_as_a_module_that_gives_the_trained_vectors(groups, tiny, tmp_path, kind, side):
    from sentence_transformers import SentenceTransformer

    from models import registry

    options = {
        "train": "head",
        "head": kind,
        "documents": side,
        "head_width": 24,
        "epochs": 8,
        "learning_rate": 1e-2,
    }
    result = run(config(groups, tiny, tmp_path / "head", **options))
    one = 32 * 32 if kind == "linear" else 2 * 24 * 32 + 24 + 32
    assert result.record["model"]["trainable"] == (2 if side == "head" else 1) * one
    base = SentenceTransformer(tiny, device="cpu")
    model = SentenceTransformer(str(tmp_path / "head"), device="cpu")
    texts = [t for _, t in documents()]
    moved = np.abs(model.encode_query(TOPICS) - base.encode_query(TOPICS)).max()
    kept = np.abs(model.encode_document(texts) - base.encode_document(texts)).max()
    assert moved > 1e-2
    assert kept < 1e-5 if side == "fixed" else kept > 1e-2
    assert np.allclose(np.linalg.norm(model.encode_query(TOPICS), axis=1), 1, atol=1e-5)
    margins = [e["positive_score"] - e["negative_score"] for e in step_events(tmp_path / "head")]
    assert np.mean(margins[-5:]) > np.mean(margins[:5]) + 0.02  # an epoch has five steps
    encoder = registry.load("encoder", f"hf:{tmp_path}/head")
    for word, ask in (("query", model.encode_query), ("document", model.encode_document)):
        np.testing.assert_allclose(
            encoder.embed(TOPICS, kind=word).vectors, ask(TOPICS), atol=1e-5, err_msg=word
        )


def test_a_head_begins_as_the_identity_and_its_layers_are_the_head():
    import torch

    from models.training.retriever_model import Head

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for width in (0, 12):
        torch.manual_seed(0)
        head = Head(8, width)
        assert torch.equal(head(x), x)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        features = {"sentence_embedding": x}
        for layer in head.layers():
            features = layer(features)
        torch.testing.assert_close(features["sentence_embedding"], head(x), rtol=1e-5, atol=1e-5)


def test_a_head_takes_vectors_that_are_there(groups, tiny, tmp_path):
    """Vectors of `tamis embed` give the head that embedding the texts gives; another model's are refused."""
    from pipelines.cli import app

    texts = dict(documents())
    data = read_groups(list_shards(groups))
    rows = {
        "docs": [{"id": d, "text": texts[d]} for d in data.document_ids],
        "queries": [{"id": q, "text": t} for q, t in zip(data.query_ids, data.queries, strict=True)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        words = [
            "embed",
            str(tmp_path / f"{name}.jsonl"),
            "--output",
            str(tmp_path / name),
            "--id-column",
            "id",
        ]
        words += ["--encoder", f"hf:{tiny}", "--as", "query" if name == "queries" else "document"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    given = {"vectors": str(tmp_path / "docs"), "query_vectors": str(tmp_path / "queries")}
    one = run(config(groups, tiny, tmp_path / "given", train="head", **given))
    run(config(groups, tiny, tmp_path / "made", train="head"))
    a, b = weights(tmp_path / "given"), weights(tmp_path / "made")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-4, err_msg=name)
    assert one.record["data"]["vectors"]["documents"]["url"] == given["vectors"]
    other = save_encoder(tmp_path / "other", seed=9)
    with pytest.raises(InputError, match="was embedded by"):
        run(config(groups, str(other), tmp_path / "no", train="head", **given))
    with pytest.raises(InputError, match="--train head"):
        run(config(groups, tiny, tmp_path / "no", **given))


def test_texts_a_killed_run_embedded_are_not_embedded_again(groups, tmp_path, monkeypatch):
    from models.training import retriever_texts
    from models.training.loading import BaseModel

    data = read_groups(list_shards(groups))
    monkeypatch.setattr(retriever_texts, "_TEXTS", 16)
    asked = []

    class Counting:
        """Gives each text its length; fails after so many texts, as a kill would."""

        left = 10_000

        def encode_query(self, texts, **options):
            asked.extend(texts)
            self.left -= len(texts)
            if self.left < 0:
                raise KeyboardInterrupt
            return np.array([[len(t), 1.0] for t in texts], np.float32)

        encode_document = encode_query

        def to(self, place):
            return self

    def embed(encoder, revision="r1"):
        return retriever_texts.embed_groups(
            data, encoder, BaseModel("m", "", revision), {"query": "", "document": ""}, tmp_path / "vectors",
            kinds=("query", "document"), device="cpu", say=lambda line: None,
        )  # fmt: skip

    cut = Counting()
    cut.left = 40 + 20  # the queries, and the first part of the documents
    with pytest.raises(KeyboardInterrupt):
        embed(cut)
    asked.clear()
    vectors = embed(Counting())
    assert len(asked) == len(data.documents) - 16
    assert vectors.documents[:, 0].tolist() == [len(t) for t in data.documents]
    assert vectors.queries[:, 0].tolist() == [len(t) for t in data.queries]
    asked.clear()
    embed(Counting(), revision="r2")  # another model's vectors are others
    assert len(asked) == len(data.documents) + len(data.queries)


def test_groups_of_ids_take_their_texts_from_corpus_and_queries(groups, tiny, tmp_path):
    bare = write_groups(tmp_path / "ids", with_text=False)
    with pytest.raises(InputError, match="--corpus and --queries"):
        run(config(str(bare), tiny, tmp_path / "no"))
    data = read_groups(list_shards(groups))
    (tmp_path / "corpus.jsonl").write_text(
        "\n".join(json.dumps({"_id": d, "text": t}) for d, t in documents())
    )
    (tmp_path / "queries.jsonl").write_text(
        "\n".join(
            json.dumps({"_id": q, "text": t}) for q, t in zip(data.query_ids, data.queries, strict=True)
        )
    )
    more = {"corpus": str(tmp_path / "corpus.jsonl"), "queries": str(tmp_path / "queries.jsonl")}
    run(config(str(bare), tiny, tmp_path / "out", max_steps=2, **more))
    run(config(groups, tiny, tmp_path / "whole", max_steps=2))
    assert_equal_weights(tmp_path / "out", tmp_path / "whole")


def test_two_processes_train_what_one_trains_on_both_their_batches(groups, tiny, tmp_path):
    """As torchrun starts them: a batch each, against the documents of both."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    two = config(groups, tiny, tmp_path / "two", train="head", batch_size=5, epochs=2)
    program = (
        "import sys\n"
        "from pipelines.train_retriever import TrainRetrieverConfig, run\n"
        "run(TrainRetrieverConfig.model_validate_json(sys.argv[1]))\n"
    )
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, two.model_dump_json()],
            cwd=ROOT,
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for r in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=280)
        assert process.returncode == 0, said.decode()[-2000:]
    run(config(groups, tiny, tmp_path / "one", train="head", batch_size=10, epochs=2))
    a, b = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)
    record = json.loads((tmp_path / "two" / "train.json").read_text())
    assert record["run"]["queries_per_step"] == 10 and record["run"]["steps"] == 8


def test_groups_without_negatives_train_on_the_batch_and_on_nothing_else(tiny, tmp_path):
    folder = write_groups(tmp_path / "bare")
    path = folder / "data" / "0-human" / "part-00000.parquet"
    rows = [{**row, "negatives": []} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=GROUP_SCHEMA), path)
    result = run(config(str(folder), tiny, tmp_path / "out", max_steps=2))
    last = result.record["results"]["stages"][0]
    assert last["train_loss"] > 0 and last["last"]["excluded"] == 0
    with pytest.raises(InputError, match="no group has a negative"):
        run(config(str(folder), tiny, tmp_path / "no", in_batch=False))


def test_prefixes_are_trained_with_and_saved(groups, tiny, tmp_path):
    from sentence_transformers import SentenceTransformer

    options = {"query_prefix": "a ", "passage_prefix": "the ", "max_steps": 1, "precision": "bfloat16"}
    run(config(groups, tiny, tmp_path / "out", **options))
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.prompts["query"] == "a " and model.prompts["document"] == "the "
    np.testing.assert_allclose(model.encode_query(["tea"]), model.encode(["a tea"], prompt=""), atol=1e-6)


def test_cached_training_is_training_in_one_piece(groups, tiny, tmp_path):
    """Chunks change nothing; the tiny model has dropout, so both are cut alike and draw alike."""
    for cached in (True, False):
        run(config(groups, tiny, tmp_path / str(cached), cached=cached, max_steps=3, chunk=5))
    a, b = weights(tmp_path / "True"), weights(tmp_path / "False")
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)
