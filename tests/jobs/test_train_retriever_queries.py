"""Queries trained alone, against documents whose vectors are there: nothing of an index has to be embedded again."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from models.training.retriever_batches import GroupCollator, GroupRow
from models.training.retriever_data import read_groups
from models.training.retriever_settings import RetrieverSettings
from models.training.shards import list_shards
from pipelines.train_retriever import run
from schemas.errors import InputError, TamisError
from tests.jobs.killing import kill_after
from tests.jobs.retriever_parts import (
    TOPICS,
    assert_equal_weights,
    config,
    documents,
    ranking_accuracy,
    step_events,
    write_groups,
)
from tests.models.tiny_encoder import save_encoder

TEXTS = [t for _, t in documents()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_encoder(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return str(write_groups(tmp_path_factory.mktemp("groups")))


def load(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("side", ["fixed", "head"])
def test_queries_learn_to_find_documents_that_keep_or_map_their_vectors(groups, tiny, tmp_path, train, side):
    from models import registry

    rate = 1e-2 if train == "full" else 5e-3
    options = {"train": train, "documents": side, "epochs": 8, "learning_rate": rate, "save_steps": 200}
    result = run(config(groups, tiny, tmp_path / "r", head_rate=1e-2, **options))
    base, model = load(tiny), load(tmp_path / "r")
    kept = np.abs(model.encode_document(TEXTS) - base.encode_document(TEXTS)).max()
    assert kept < 1e-5 if side == "fixed" else kept > 1e-2
    assert np.abs(model.encode_query(TOPICS) - base.encode_query(TOPICS)).max() > 1e-2
    np.testing.assert_allclose(model.encode(TEXTS), model.encode_document(TEXTS), atol=1e-6)
    margins = [e["positive_score"] - e["negative_score"] for e in step_events(tmp_path / "r")]
    assert np.mean(margins[-5:]) > np.mean(margins[:5]) + 0.02  # an epoch has five steps
    if train == "full":  # LoRA cannot move the word vectors, all that such a tiny encoder knows words by
        assert ranking_accuracy(tmp_path / "r") > ranking_accuracy(tiny) + 0.2
    encoder = registry.load("encoder", f"hf:{tmp_path}/r")
    assert encoder.dimension == base.get_embedding_dimension()
    for word, ask in (("query", model.encode_query), ("document", model.encode_document)):
        np.testing.assert_allclose(
            encoder.embed(TOPICS, kind=word).vectors, ask(TOPICS), atol=1e-5, err_msg=word
        )
    said = (tmp_path / "r" / "README.md").read_text()
    assert ("keep the base model's vectors" in said) == (side == "fixed")
    assert result.record["data"]["vectors"] is None and (tmp_path / "r" / "adapter").exists() == (
        train == "lora"
    )


def test_a_documents_head_is_a_product_an_index_can_be_mapped_by(groups, tiny, tmp_path):
    """What the document route adds to the base model's vectors is one matrix and a normalisation."""
    run(config(groups, tiny, tmp_path / "r", documents="head", head_rate=1e-2, epochs=4))
    model, base = load(tmp_path / "r"), load(tiny)
    route = list(model[0].sub_modules["document"])
    dense = next(m for m in route if type(m).__name__ == "Dense")
    mapped = base.encode_document(TEXTS) @ dense.linear.weight.detach().numpy().T
    mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
    np.testing.assert_allclose(mapped, model.encode_document(TEXTS), atol=1e-5)


def test_a_killed_run_goes_on_to_the_very_same_weights(groups, tiny, tmp_path):
    options = {"documents": "head", "all_documents": True, "loss": "sum_marg_lh", "epochs": 2}
    run(config(groups, tiny, tmp_path / "whole", **options))
    killed = tmp_path / "killed"
    kill_after(
        killed / "_tamis/checkpoints/0-human/checkpoint-4/COMPLETE", config(groups, tiny, killed, **options)
    )
    result = run(config(groups, tiny, killed, **options))
    assert result.resumed_from >= 4
    assert_equal_weights(tmp_path / "whole", killed)


def test_the_head_has_a_rate_of_its_own(groups, tiny, tmp_path):
    """With next to no rate for the queries' encoder, the documents' head moves all the same, and the other way round."""
    options = {"documents": "head", "epochs": 2, "learning_rate": 1e-9}
    run(config(groups, tiny, tmp_path / "head", head_rate=1e-2, **options))
    run(config(groups, tiny, tmp_path / "neither", head_rate=1e-9, **options))
    base = load(tiny)
    for name, moved in (("head", True), ("neither", False)):
        model = load(tmp_path / name)
        assert np.abs(model.encode_query(TOPICS) - base.encode_query(TOPICS)).max() < 1e-4
        assert (np.abs(model.encode_document(TEXTS) - base.encode_document(TEXTS)).max() > 1e-2) == moved


def test_all_documents_are_candidates_and_all_positives_are_drawn(groups):
    data = read_groups(list_shards(groups))
    settings = RetrieverSettings(train="head", loss="sum_marg_lh", all_documents=True)
    policy = settings.draw({"positives": "all", "max_positives": 3, "group_size": 6})
    collate = GroupCollator(data, policy, 0, lambda rows, every: ({}, every), all_documents=True)
    made = collate([GroupRow(0, 0), GroupRow(5, 0)])
    assert made["groups"]["documents"].tolist() == list(range(len(data.document_ids)))
    for slot, row in enumerate((0, 5)):
        drawn = [n for n in made["groups"]["positives"][slot].tolist() if n >= 0]
        assert drawn == data.positives[row].tolist()
        masked = [n for n in made["groups"]["masked"][slot].tolist() if n >= 0]
        assert masked == sorted(data.mask[row].tolist())
    assert int(made["usable"]) == 2
    one = RetrieverSettings(train="head", loss="single_lh", all_documents=True).draw({"max_positives": 3})
    assert one.most_positives == 1 and one.positives == "first"
    capped = RetrieverSettings(train="head", loss="rand1_lh", all_documents=True).draw({"max_positives": 3})
    assert capped.max_positives == 3 and capped.positives == "random_one"


def test_a_step_against_all_documents_says_so(groups, tiny, tmp_path, capsys):
    options = {"documents": "fixed", "all_documents": True, "loss": "mnrl", "quiet": False}
    run(config(groups, tiny, tmp_path / "r", **options))
    said = capsys.readouterr().err
    assert "all its positives (all), against every document" in said
    assert "of the queries alone; documents as they are" in said
    assert "every document of the groups" in (tmp_path / "r" / "README.md").read_text()
    assert step_events(tmp_path / "r")[-1]["excluded"] == 0
    plan = run(config(groups, tiny, tmp_path / "dry", dry_run=True, **options)).plan
    assert plan.seconds > 0 and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"all_documents": True}, "--all-documents needs documents whose vectors are there"),
        ({"all_documents": True, "train": "head", "in_batch": False}, "--own-negatives contradict"),
        ({"all_documents": True, "documents": "fixed", "group_size": 8}, "--group-size draws documents"),
        ({"head": "mlp"}, "--head needs --train head or --documents head"),
        ({"vectors": "there"}, "--documents fixed or head"),
        ({"documents": "fixed", "query_vectors": "there"}, "--query-vectors are for heads"),
    ],
)
def test_what_cannot_be_is_refused_by_name(groups, tiny, tmp_path, options, why):
    with pytest.raises((TamisError, InputError), match=why):
        run(config(groups, tiny, tmp_path / "r", **options))
    assert not (tmp_path / "r").exists()


def test_vectors_that_are_there_are_taken_and_ids_without_texts_do(tmp_path, tiny):
    """Groups of ids, queries by name, documents as an output of `tamis embed`: no text of a document is needed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.cli import app

    groups = write_groups(tmp_path / "groups", with_text=False)
    asked = [{"query_id": f"q{q}", "text": TOPICS[q % len(TOPICS)]} for q in range(40)]
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "queries.parquet")
    found = [{"id": i, "text": t} for i, t in documents()]
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "corpus" / "part-00000.parquet")
    cli = CliRunner()
    embed = ["embed", str(tmp_path / "corpus"), "-o", str(tmp_path / "vectors"), "--id-column", "id"]
    done = cli.invoke(app, [*embed, "--encoder", f"hf:{tiny}"])
    assert done.exit_code == 0, done.output
    command = ["train", "retriever", str(groups), "--output", str(tmp_path / "r"), "--model", tiny, "--quiet"]
    command += ["--documents", "head", "--vectors", str(tmp_path / "vectors"), "--all-documents"]
    command += ["--loss", "sum_marg_lh", "--learning-rate", "1e-2", "--batch-size", "8", "--epochs", "8"]
    lacking = cli.invoke(app, command)
    assert lacking.exit_code and "ids without texts" in str(lacking.exception)
    assert not (tmp_path / "r").exists()  # a refused run leaves nothing: a right one finds the folder free
    done = cli.invoke(app, [*command, "--queries", str(tmp_path / "queries.parquet")])
    assert done.exit_code == 0, done.output
    assert ranking_accuracy(tmp_path / "r") > ranking_accuracy(tiny)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, groups, tiny):
    """An embedded corpus, and two query encoders trained against it: one keeps its vectors, one maps them."""
    import json

    from pipelines.cli import app

    root = tmp_path_factory.mktemp("asked")
    corpus = root / "beir" / "corpus.jsonl"
    corpus.parent.mkdir()
    rows = [{"_id": i, "title": "", "text": t} for i, t in documents()]
    corpus.write_text("".join(json.dumps(r) + "\n" for r in rows))
    queries = [{"_id": f"q{t}", "text": topic} for t, topic in enumerate(TOPICS)]
    (root / "beir" / "queries.jsonl").write_text("".join(json.dumps(r) + "\n" for r in queries))
    (root / "beir" / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore"] + [f"q{i[1:].split('-')[0]}\t{i}\t1" for i, _ in documents()]
    (root / "beir" / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    words = [
        "embed",
        str(corpus),
        "-o",
        str(root / "vectors"),
        "--id-column",
        "_id",
        "--text",
        "{title} {text}",
    ]
    done = CliRunner().invoke(app, [*words, "--encoder", f"hf:{tiny}", "--progress", "quiet"])
    assert done.exit_code == 0, done.output
    for side in ("fixed", "head"):
        options = {"documents": side, "vectors": str(root / "vectors"), "epochs": 8, "learning_rate": 1e-2}
        run(config(groups, tiny, root / side, save_steps=200, **options))
    return root


def test_an_index_is_asked_by_the_encoder_that_was_trained_against_it(asked, tiny):
    import json

    from pipelines.cli import app

    words = ["search", str(asked / "vectors"), TOPICS[0], "-k", "5", "--json"]
    plain = CliRunner().invoke(app, words)
    done = CliRunner().invoke(app, [*words, "--query-encoder", str(asked / "fixed")])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in done.output.splitlines()]
    assert done.output != plain.output
    ids, texts = zip(*documents(), strict=True)
    base, model = load(tiny), load(asked / "fixed")
    scores = (base.encode([f" {t}" for t in texts]) @ model.encode_query([TOPICS[0]]).T)[:, 0]
    best = np.argsort(-scores, kind="stable")[:5]
    np.testing.assert_allclose([r["score"] for r in found], scores[best], atol=1e-4)
    assert {r["id"] for r in found} == {ids[i] for i in best}


def test_a_head_takes_the_documents_vectors_and_embeds_the_queries(asked, groups, tiny, tmp_path):
    options = {
        "train": "head",
        "documents": "fixed",
        "all_documents": True,
        "loss": "mnrl",
        "learning_rate": 1e-2,
    }
    both = run(config(groups, tiny, tmp_path / "embedded", **options))
    dry = run(config(groups, tiny, tmp_path / "dry", vectors=str(asked / "vectors"), dry_run=True, **options))
    assert dry.plan.seconds > 0 and not (tmp_path / "dry").exists()
    run(config(groups, tiny, tmp_path / "given", vectors=str(asked / "vectors"), **options))
    assert both.record["data"]["vectors"] is None
    one, two = (load(tmp_path / n).encode_query(TOPICS) for n in ("embedded", "given"))
    # The index holds texts with a blank title in front; the vectors are nearly the same, and so is what is learnt.
    assert np.einsum("ij,ij->i", one, two).min() > 0.95


def test_it_is_evaluated_beside_the_index_own_encoder(asked, tmp_path):
    import json

    from pipelines.cli import app

    vectors, model = asked / "vectors", asked / "fixed"
    systems = [
        "--system",
        f"before={vectors}",
        "--system",
        f"after={vectors}@{model}",
        "--system",
        f"whole=hf:{model}",
    ]
    words = [
        "eval",
        "retrieval",
        str(asked / "beir"),
        "--split",
        "test",
        *systems,
        "-o",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, [*words, "--progress", "quiet"])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = {n: (tmp_path / "out" / "runs" / f"{n}.run").read_text() for n in ("before", "after", "whole")}
    ranked = {n: [line.split()[:4] for line in text.splitlines()] for n, text in runs.items()}
    assert ranked["after"][:50] == ranked["whole"][:50] != ranked["before"][:50]
    assert "after" in json.dumps(results)


def test_an_encoder_that_was_not_trained_against_the_vectors_is_refused(asked, tiny, tmp_path):
    from pipelines.search import Searcher, SearchOptions
    from schemas.errors import ModelError

    def ask(encoder):
        return Searcher(str(asked / "vectors"), SearchOptions(query_encoder=str(encoder)))

    with pytest.raises(ModelError, match="--documents head: its documents have other vectors"):
        ask(asked / "head")
    assert ask(tiny).vectors(["a"]).shape == (1, 32)  # the very encoder that made the vectors
    import json
    import shutil

    silent = shutil.copytree(asked / "fixed", tmp_path / "silent")
    (silent / "train.json").unlink()
    with pytest.raises(ModelError, match="does not say what it was trained against"):
        ask(silent)
    other = shutil.copytree(asked / "fixed", tmp_path / "other")
    record = json.loads((other / "train.json").read_text())
    record["data"]["encoder_revision"] = "0000"
    (other / "train.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="was trained against vectors of"):
        ask(other)


def test_a_run_that_fails_keeps_what_it_paid_for(groups, tiny, tmp_path, monkeypatch):
    """The documents are embedded, then the training fails: the vectors stay, and the same command uses them."""
    from models.training import retriever_session
    from schemas.errors import ModelError

    def fail(*arguments, **options):
        raise ModelError("no room")

    settings = config(groups, tiny, tmp_path / "r", documents="fixed")
    with monkeypatch.context() as patch:
        patch.setattr(retriever_session.RetrieverSession, "fit", fail)
        with pytest.raises(ModelError, match="no room"):
            run(settings)
    kept = sorted((tmp_path / "r" / "_tamis" / "vectors").iterdir())
    assert kept
    stamps = [p.stat().st_mtime_ns for p in kept]
    seen = []
    save = retriever_session.shutil.rmtree
    monkeypatch.setattr(
        retriever_session.shutil,
        "rmtree",
        lambda path, **options: (
            seen.extend(p.stat().st_mtime_ns for p in kept if p.exists()),
            save(path, **options),
        ),
    )
    run(settings)
    assert seen[: len(stamps)] == stamps and (tmp_path / "r" / "_SUCCESS").exists()
