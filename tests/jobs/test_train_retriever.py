"""Retrievers end to end on a tiny encoder: what is trained, what is saved, what is refused, and a killed run that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from models.training.groups import draw_group
from models.training.retriever_batches import GroupCollator, GroupPlan, GroupRow, TextFeatures
from models.training.retriever_data import read_groups
from models.training.shards import list_shards
from pipelines.train_retriever import TrainRetrieverConfig, run
from pipelines.train_scorer import make_config
from schemas.errors import InputError, OutputError, TamisError
from schemas.groups import GROUP_SCHEMA, MASK_SCHEMA
from tests.models.tiny_classifier import WORDS
from tests.models.tiny_encoder import save_encoder

ROOT = Path(__file__).resolve().parents[2]
TOPICS = [w for w in WORDS if w.isalpha() and len(w) > 2][:12]
NOISE = [w for w in WORDS if w.isalpha() and w not in TOPICS]


def documents():
    """Six texts a topic: its word among others."""
    rng = np.random.default_rng(0)
    for t, topic in enumerate(TOPICS):
        for i in range(6):
            words = rng.choice(NOISE, rng.integers(2, 9)).tolist()
            words.insert(int(rng.integers(0, len(words))), topic)
            yield f"d{t}-{i}", " ".join(words)


def group(query, topic, texts, stage, number, rng, *, with_text=True, source="human"):
    mine = [d for d in texts if d.startswith(f"d{topic}-")]
    others = [d for d in texts if d not in mine]
    count = int(rng.integers(1, 5))
    positives = [
        {
            "doc_id": d, "quality_rank": i + 1, "grade": 2, "value": None, "label_source": source, "annotator": source,
            "title": None, "text": texts[d] if with_text else None,
        }
        for i, d in enumerate(mine[:count])
    ]  # fmt: skip
    negatives = [
        {
            "doc_id": d, "source": "random", "rank": i + 1, "score": None, "grade": None, "title": None,
            "text": texts[d] if with_text else None,
        }
        for i, d in enumerate(rng.choice(others, 12, replace=False).tolist())
    ]  # fmt: skip
    words = f"{TOPICS[topic]} {NOISE[int(rng.integers(0, len(NOISE)))]}"
    row = {
        "query_id": query, "query": words if with_text else None, "stage": stage, "stage_number": number,
        "positives": positives, "negatives": negatives,
    }  # fmt: skip
    return row, sorted(mine)


def write_groups(folder, *, stages=("human",), with_text=True, queries=40, **manifest):
    """A folder as `tamis groups` writes it."""
    texts, rng = dict(documents()), np.random.default_rng(1)
    shards, masks = [], {}
    for number, stage in enumerate(stages):
        rows = []
        for q in range(queries):
            row, mine = group(
                f"q{q}", q % len(TOPICS), texts, stage, number, rng, with_text=with_text, source=stage
            )
            rows.append(row)
            masks[f"q{q}"] = mine
        name = f"{number}-{stage}/part-00000.parquet"
        (folder / "data" / name).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=GROUP_SCHEMA), folder / "data" / name)
        shards.append({"path": name, "rows": len(rows)})
    (folder / "mask").mkdir()
    table = [{"query_id": q, "doc_ids": d} for q, d in masks.items()]
    pq.write_table(pa.Table.from_pylist(table, schema=MASK_SCHEMA), folder / "mask" / "part-00000.parquet")
    record = {
        "job": "groups", "run_id": "test-run", "shards": shards,
        "tables": [{"path": "mask/part-00000.parquet", "sha256": "abc"}],
        "draw": {"positives": "all", "max_positives": 3, "group_size": 6, "seed": 0}, **manifest,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(record))
    (folder / "_SUCCESS").write_text("test-run\n")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_encoder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return str(write_groups(tmp_path_factory.mktemp("groups")))


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    return str(write_groups(tmp_path_factory.mktemp("staged"), stages=("llm", "human")))


def config(groups, tiny, output, **options):
    settings = {
        "data": groups, "model": tiny, "output": str(output), "query_length": 8, "passage_length": 16,
        "batch_size": 8, "epochs": 1, "learning_rate": 3e-3, "threads": 1, "device": "cpu", "quiet": True,
        "save_steps": 2, "log_steps": 1, "chunk": 16, **options,
    }  # fmt: skip
    return TrainRetrieverConfig(**settings)


@pytest.fixture(scope="module")
def trained(groups, tiny, tmp_path_factory):
    return run(config(groups, tiny, tmp_path_factory.mktemp("out") / "retriever", epochs=6, save_steps=200))


def ranking_accuracy(folder):
    """How often a topic's word finds a text of that topic first."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    ids, texts = zip(*documents(), strict=True)
    scores = model.similarity(model.encode_query(TOPICS), model.encode_document(list(texts)))
    best = [ids[i] for i in scores.argmax(dim=1).tolist()]
    return np.mean([name.startswith(f"d{t}-") for t, name in enumerate(best)])


def step_events(folder):
    """The progress events of a run, in order."""
    lines = [x for p in (folder / "_tamis" / "events").iterdir() for x in p.read_text().splitlines()]
    return [e for e in map(json.loads, lines) if e.get("event") == "step"]


def weights(folder):
    from safetensors.torch import load_file

    found = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{k}": v for k, v in load_file(path).items()}
    return found


def assert_equal_weights(one, two):
    import torch

    a, b = weights(one), weights(two)
    assert a and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def kill_after(path: Path, settings: TrainRetrieverConfig) -> None:
    """Run in a process of its own, and kill it as soon as a file is there."""
    program = (
        "import sys, time\n"
        "from models.training import retriever_trainer as t\n"
        "step = t.RetrieverTrainer.training_step\n"
        "t.RetrieverTrainer.training_step = lambda *a, **k: (time.sleep(0.15), step(*a, **k))[1]\n"
        "from pipelines.train_retriever import TrainRetrieverConfig, run\n"
        "run(TrainRetrieverConfig.model_validate_json(sys.argv[1]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, settings.model_dump_json()],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("side", ["both", "queries"])
def test_a_head_is_saved_as_a_module_that_gives_the_trained_vectors(groups, tiny, tmp_path, kind, side):
    from sentence_transformers import SentenceTransformer

    from models import registry

    options = {
        "train": "head",
        "head": kind,
        "head_on": side,
        "head_width": 24,
        "epochs": 8,
        "learning_rate": 1e-2,
    }
    result = run(config(groups, tiny, tmp_path / "head", **options))
    assert result.record["model"]["trainable"] == (32 * 32 if kind == "linear" else 2 * 24 * 32 + 24 + 32)
    base = SentenceTransformer(tiny, device="cpu")
    model = SentenceTransformer(str(tmp_path / "head"), device="cpu")
    texts = [t for _, t in documents()]
    moved = np.abs(model.encode_query(TOPICS) - base.encode_query(TOPICS)).max()
    kept = np.abs(model.encode_document(texts) - base.encode_document(texts)).max()
    assert moved > 1e-2
    assert kept < 1e-5 if side == "queries" else kept > 1e-2
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
            threads=1, device="cpu", say=lambda line: None,
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


def test_batches_are_a_function_of_seed_and_epoch_and_draw_what_groups_draw(groups):
    data = read_groups(list_shards(groups))
    plan = GroupPlan(data.rows(0), 8, seed=3, stage="human")
    assert plan.batches(2) == plan.batches(2) != plan.batches(3)
    assert sorted(r.number for b in plan.batches(1) for r in b) == list(range(40))
    from models.training.groups import DrawPolicy

    policy = DrawPolicy("all", 2, 5)

    def no_features(rows, documents):
        return {}, documents

    made = GroupCollator(data, policy, 3, no_features)([GroupRow(7, 1), GroupRow(2, 1)])
    draw = draw_group(data.row_name(7), len(data.positives[7]), 12, seed=3, epoch=1, policy=policy)
    chosen = data.positives[7][list(draw.positives)].tolist()
    assert [n for n in made["groups"]["positives"][0].tolist() if n >= 0] == chosen
    assert made["groups"]["negatives"][0].tolist() == data.negatives[7][list(draw.negatives)].tolist()
    documents_there = made["groups"]["documents"].tolist()
    assert len(set(documents_there)) == len(documents_there)
    assert int(made["usable"]) == 2


def test_the_mask_keeps_undrawn_positives_out_of_the_negatives(groups):
    """Query 0 and query 12 share a topic: what one draws is masked for the other, though it never drew it."""
    from models.losses.targets import GroupIds, make_targets
    from models.training.groups import DrawPolicy

    data = read_groups(list_shards(groups))
    collate = GroupCollator(data, DrawPolicy("all", 4, 8), 0, lambda rows, documents: ({}, documents))
    made = collate([GroupRow(0, 0), GroupRow(12, 0)])["groups"]
    targets = make_targets(GroupIds(**made))
    topic = [data.document_ids[n].startswith("d0-") for n in made["documents"].tolist()]
    assert sum(topic) > 0 and not targets.negative[:, topic].any()
    from dataclasses import replace

    bare = make_targets(GroupIds(**replace(collate, mask=False)([GroupRow(0, 0), GroupRow(12, 0)])["groups"]))
    assert not bare.negative[bare.positive].any()


@pytest.mark.parametrize(
    "options", [{}, {"in_batch": False}, {"mask": False}, {"in_batch": False, "mask": False}]
)
def test_usable_queries_are_those_the_loss_finds_usable(groups, options):
    """The step's mean is over what the collator counts before the forward pass: the same as what the loss sums over."""
    from models.losses.targets import GroupIds, make_targets
    from models.training.groups import DrawPolicy

    data = read_groups(list_shards(groups))
    for policy in (DrawPolicy("all", 3, 4), DrawPolicy("first", 1, 2)):
        collate = GroupCollator(data, policy, 0, lambda rows, documents: ({}, documents), **options)
        for rows in ([GroupRow(0, 0)], [GroupRow(0, 0), GroupRow(12, 0)], [GroupRow(i, 1) for i in range(9)]):
            made = collate(rows)
            targets = make_targets(GroupIds(**made["groups"]), in_batch=options.get("in_batch", True))
            found = targets.positive.any(dim=1) & targets.negative.any(dim=1)
            assert int(made["usable"]) == int(found.sum()), (policy, rows)


def test_text_features_come_longest_first_in_chunks(groups):
    from models.training.retriever_batches import TokenTable

    table = TokenTable.of([[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]], 100)
    made, order = TextFeatures(table, table, pad=0, chunk=3)(np.array([1]), np.array([0, 1, 2, 3]))
    assert order.tolist() == [3, 0, 2, 1]
    assert [ids.shape for ids, _ in made["documents"]] == [(3, 4), (1, 1)]
    ids, mask = made["documents"][0]
    assert ids.tolist()[1] == [1, 2, 3, 0] and mask.tolist()[1] == [1, 1, 1, 0]


def test_a_dry_run_plans_and_writes_nothing(staged, tiny, tmp_path, capsys):
    result = run(config(staged, tiny, tmp_path / "out", dry_run=True))
    said = capsys.readouterr().out
    assert "stage     llm: 40 groups, 5 steps" in said and "time      about 0:0" in said
    assert result.plan.seconds > 0 and result.plan.steps == 10 and not (tmp_path / "out").exists()
    assert run(config(staged, tiny, tmp_path / "out", dry_run=True, train="head")).plan.seconds > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "rand1_lh", "max_positives": -1}, "needs a cap"),
        ({"loss": "lse_pair", "positives": "first"}, "'lse_pair' needs positives drawn by all or rotate"),
        ({"loss": "single_lh", "positives": "all"}, "'single_lh' needs"),
        ({"loss": "nothing"}, "no loss 'nothing'"),
        ({"loss": "joint_lh", "negative_side": "max"}, "--negative-side"),
        ({"max_positives": 6, "group_size": 6}, "leave no slot"),
        ({"stages": ("gold",)}, "no stage 'gold'"),
        ({"epochs": "gold=1"}, "--epochs: the groups have no stage"),
        ({"train": "head", "cached": True}, "--cached"),
        ({"head": "mlp"}, "--train head"),
        ({"passage_length": 4096}, "more than the model can see"),
        ({"query_prefix": "the train is not the committee and it was very nice"}, "leaves no room"),
        ({"model": "nowhere"}, "no model 'nowhere'"),
        ({"data": "nowhere"}, "no such input"),
        ({"vectors": "here"}, "--query-vectors"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(groups, tiny, tmp_path, options, message):
    with pytest.raises(TamisError, match=message) as caught:
        run(config(groups, tiny, tmp_path / "out", **options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_unfinished_poisoned_and_other_folders_are_refused(tiny, tmp_path):
    unfinished = write_groups(tmp_path / "a")
    (unfinished / "_SUCCESS").unlink()
    with pytest.raises(InputError, match="no _SUCCESS"):
        run(config(str(unfinished), tiny, tmp_path / "out"))
    poisoned = write_groups(tmp_path / "b", poisoned=True)
    with pytest.raises(InputError, match="--allow-poisoned"):
        run(config(str(poisoned), tiny, tmp_path / "out"))
    assert run(config(str(poisoned), tiny, tmp_path / "out", allow_poisoned=True, max_steps=1)).record
    other = write_groups(tmp_path / "c", job="embed")
    with pytest.raises(InputError, match="output of `tamis embed`"):
        run(config(str(other), tiny, tmp_path / "none"))


def test_a_teacher_without_grades_is_refused_and_with_them_trains(groups, tiny, tmp_path):
    for loss in ("kl", "margin_mse"):
        result = run(config(groups, tiny, tmp_path / loss, loss=loss, max_steps=2, teacher_scale=0.5))
        assert np.isfinite(result.record["results"]["stages"][0]["train_loss"])
    folder = write_groups(tmp_path / "bare")
    path = folder / "data" / "0-human" / "part-00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[3]["positives"][0]["grade"] = None
    pq.write_table(pa.Table.from_pylist(rows, schema=GROUP_SCHEMA), path)
    with pytest.raises(InputError, match="learns from grades"):
        run(config(str(folder), tiny, tmp_path / "no", loss="kl"))


def test_what_a_model_compares_vectors_by_is_what_it_is_trained_for(groups, tmp_path):
    for name, similarity in (("dot", "dot"), ("euclidean", "euclidean")):
        save_encoder(tmp_path / name, normalize=False, similarity=similarity)
    dot = run(config(groups, str(tmp_path / "dot" / "model"), tmp_path / "out", max_steps=1))
    assert dot.record["run"]["similarity"] == "dot" and dot.record["run"]["loss"]["scale"] == 1.0
    assert (
        json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())["similarity_fn_name"]
        == "dot"
    )
    far = str(tmp_path / "euclidean" / "model")
    with pytest.raises(TamisError, match="similarity=cosine or dot"):
        run(config(groups, far, tmp_path / "no"))
    assert run(config(groups, far, tmp_path / "far", max_steps=1, similarity="cosine")).record


def test_another_run_in_the_folder_is_refused(groups, tiny, trained):
    with pytest.raises(OutputError, match="--overwrite"):
        run(config(groups, tiny, trained.output, seed=7))


def test_wrong_settings_are_named_by_their_option():
    with pytest.raises(InputError, match=r"^--epochs"):
        make_config(TrainRetrieverConfig, {"data": "x", "output": "y", "epochs": "many"})
    with pytest.raises(InputError, match=r"^--learning-rate"):
        make_config(TrainRetrieverConfig, {"data": "x", "output": "y", "learning_rate": "human=-1"})


def test_the_command_takes_what_the_help_shows(groups, tiny, tmp_path):
    from pipelines.cli import app

    words = ["train", "retriever", groups, "--model", tiny, "-o", str(tmp_path / "out"), "--loss", "rand1_lh"]
    words += [
        "--max-steps",
        "2",
        "--batch-size",
        "8",
        "--query-length",
        "8",
        "--passage-length",
        "16",
        "--quiet",
    ]
    done = CliRunner().invoke(
        app, [*words, "--threads", "1", "--set", "device=cpu", "--learning-rate", "1e-3"]
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["run"]["loss"]["name"] == "rand1_lh" and record["run"]["draw"]["positives"] == "random_one"
    assert record["run"]["stages"][0]["rate"] == 1e-3
    shown = CliRunner().invoke(app, ["train", "retriever", "--help"])
    assert "Example" in shown.output
