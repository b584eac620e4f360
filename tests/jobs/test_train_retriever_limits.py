"""Retriever training: which batches are drawn, what a dry run says, and what is refused."""

from __future__ import annotations

import json

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
from schemas.groups import GROUP_SCHEMA
from tests.jobs.retriever_parts import config, write_groups
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
        ({"vectors": "here"}, "--documents fixed or head"),
        ({"query_vectors": "here", "train": "head"}, "--query-vectors"),
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
