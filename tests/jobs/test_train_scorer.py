"""Classifiers and taggers end to end on a tiny encoder: what is saved loads everywhere, and a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from models import registry
from pipelines.train_scorer import TrainScorerConfig, make_config, run
from schemas.errors import InputError, ModelError, OutputError, TamisError
from tests.jobs.killing import kill_after
from tests.models.tiny_classifier import WORDS, save_settings

ROOT = Path(__file__).resolve().parents[2]
RUDE = ("idiot", "stupid", "moron", "fool")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny encoder to start from (its head of six labels does not fit and is replaced)."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = save_settings(tmp_path_factory.mktemp("tiny"), initializer_range=0.2)
    torch.manual_seed(0)
    settings = AutoConfig.from_pretrained(folder)
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(folder)
    return str(folder)


def sentences(n=240):
    """Texts with a rude word in every other one."""
    rng = np.random.default_rng(0)
    calm = [w for w in WORDS if w not in RUDE and not w.startswith("#") and w.isalpha()]
    for i in range(n):
        words = rng.choice(calm, rng.integers(3, 12)).tolist()
        if i % 2:
            words.insert(int(rng.integers(0, len(words))), RUDE[i % 4])
        yield " ".join(words), i % 2


@pytest.fixture(scope="module")
def posts(tmp_path_factory):
    path = tmp_path_factory.mktemp("posts") / "posts.csv"
    lines = [f'"{text}",{"bad" if rude else "good"}' for text, rude in sentences()]
    path.write_text("\n".join(["text,verdict", *lines]) + "\n")
    return str(path)


def config(posts, tiny, output, **options):
    settings = {
        "data": (posts,), "model": tiny, "output": str(output), "label_column": "verdict", "positive": ("bad",),
        "max_length": 32, "batch_size": 16, "epochs": 1, "learning_rate": 3e-3, "eval_fraction": 0.3, "threads": 1,
        "device": "cpu", "quiet": True, "save_steps": 5, "log_steps": 1, **options,
    }  # fmt: skip
    return TrainScorerConfig(**settings)


@pytest.fixture(scope="module")
def trained(posts, tiny, tmp_path_factory):
    return run(
        config(
            posts, tiny, tmp_path_factory.mktemp("out") / "scorer", epochs=10, batch_size=8, save_steps=200
        )
    )


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_equal_weights(one, two):
    import torch

    a, b = weights(one), weights(two)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


TEXTS = [
    "you are a stupid idiot",
    "the committee meets on tuesday",
    "thank you for the lovely dinner",
    "moron !",
]


def test_it_learns_and_says_how_well(trained):
    row = trained.record["results"]["test"]["all"]["toxicity"]
    assert row["auc"]["value"] > 0.95 and row["f1"]["value"] > 0.85
    assert row["auc"]["low"] <= row["auc"]["value"] <= row["auc"]["high"]
    assert row["n"] > 20 and 0.3 < row["base_rate"]["value"] < 0.7
    assert (trained.output / "_SUCCESS").read_text().strip() == trained.record["config_hash"]
    card = (trained.output / "README.md").read_text()
    assert all(
        said in card for said in ("AUC", "posts", trained.record["training_data"], "tamis train scorer")
    )


def test_it_is_a_scorer_of_the_registry_and_says_its_data(trained):
    name = f"hf:{trained.output}"
    info = registry.describe("scorer", name)
    assert info.training_data == trained.record["training_data"].lower()
    assert info.training_data.startswith("posts-")
    scorer = registry.load("scorer", name)
    scores = scorer.score(TEXTS)
    assert scorer.labels == ("toxicity",) and scores[[0, 3], 0].min() > scores[[1, 2], 0].max()


def test_transformers_gives_the_calibrated_probabilities(trained):
    """The temperature is in the weights: plain loading and a sigmoid give what the registry's scorer gives."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = str(trained.output)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.id2label == {0: "toxicity"}
    assert trained.record["results"]["calibration"]["temperature"] != 1.0
    with torch.no_grad():
        plain = [model(**tokenizer(t, return_tensors="pt")).logits.sigmoid()[0].tolist() for t in TEXTS]
    scores = registry.load("scorer", f"hf:{folder}").score(TEXTS)
    np.testing.assert_allclose(scores, plain, atol=1e-5)


def test_detoxify_and_our_reader_of_its_checkpoints_load_it(trained, tmp_path, monkeypatch):
    from detoxify import Detoxify

    folder = trained.output
    expected = registry.load("scorer", f"hf:{folder}").score(TEXTS)
    library = Detoxify(checkpoint=str(folder / "detoxify.ckpt"), huggingface_config_path=str(folder))
    np.testing.assert_allclose(library.predict(TEXTS)["toxicity"], expected[:, 0], atol=1e-5)
    monkeypatch.setenv("TAMIS_HOME", str(tmp_path))
    options = {"checkpoint": str(folder / "detoxify.ckpt"), "config": str(folder)}
    ours = registry.load("scorer", "detoxify:original", **options)
    np.testing.assert_allclose(ours.score(TEXTS), expected, atol=1e-6)
    assert ours.info.training_data == trained.record["training_data"]


def test_a_checkpoint_that_is_not_what_was_saved_is_not_opened(trained, tmp_path):
    import shutil

    folder = shutil.copytree(trained.output, tmp_path / "copy")
    with (folder / "detoxify.ckpt").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ModelError, match="not opened"):
        registry.load(
            "scorer", "detoxify:original", checkpoint=str(folder / "detoxify.ckpt"), config=str(folder)
        )


def test_several_labels_and_sets_with_unknowns_are_learned_together(tiny, tmp_path):
    many = [
        {"text": t, "insult": rude, "threat": [None, 0, 1][i % 3], "toxicity": rude * 0.9}
        for i, (t, rude) in enumerate(sentences(120))
    ]
    one = [{"body": t + " !", "kind": rude} for t, rude in sentences(120)]
    for name, rows in (("a", many), ("b", one)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = (
        f"{tmp_path}/a.jsonl,labels=toxicity+insult+threat",
        f"{tmp_path}/b.jsonl,text=body,label=kind,positive=1,weight=2",
    )
    result = run(
        config(
            "", tiny, tmp_path / "out", data=sets, label_column="", positive=(), balance=True, detoxify=False
        )
    )
    results = result.record["results"]
    assert results["labels"] == ["toxicity", "insult", "threat"]
    assert set(results["test"]) == {"all", "a", "b"}
    assert results["test"]["b"]["insult"] == {"n": 0, "positives": 0}
    assert results["calibration"]["method"] == "shift"
    assert not (tmp_path / "out" / "detoxify.ckpt").exists()
    scorer = registry.load("scorer", f"hf:{tmp_path}/out")
    assert scorer.labels == ("toxicity", "insult", "threat") and scorer.score(TEXTS).shape == (4, 3)
    assert result.record["training_data"].count("+") == 1


def test_a_killed_run_goes_on_to_the_very_same_weights(posts, tiny, tmp_path):
    options = {"eval_steps": 3, "balance": True, "accumulate": 2, "save_steps": 2}
    whole = run(config(posts, tiny, tmp_path / "whole", **options))
    killed = tmp_path / "killed"
    kill_after(killed / "_tamis/checkpoints/checkpoint-2/COMPLETE", config(posts, tiny, killed, **options))
    assert not (killed / "_SUCCESS").exists()
    result = run(config(posts, tiny, killed, **options))
    assert result.resumed_from >= 2
    assert_equal_weights(tmp_path / "whole", killed)
    for figure in ("train_loss", "eval_loss", "tokens_seen", "test", "calibration"):
        assert result.record["results"][figure] == whole.record["results"][figure]
    again = run(config(posts, tiny, killed, **options))
    assert again.plan is None and again.record == result.record


def test_a_scorer_trained_on_says_all_it_ever_learned_from(posts, trained, tmp_path):
    import shutil

    other = shutil.copy(posts, tmp_path / "other.csv")
    settings = config(str(other), str(trained.output), tmp_path / "out", max_steps=1)
    result = run(settings)
    assert result.plan.warmup == 0  # the one step there is would have no learning rate
    first, second = result.record["training_data"].split("+")
    assert first == trained.record["training_data"] and second.startswith("other-")
    again = run(config(posts, str(trained.output), tmp_path / "same", max_steps=1))
    assert again.record["training_data"] == trained.record["training_data"]


def test_a_dry_run_plans_and_writes_nothing(posts, tiny, tmp_path, capsys):
    result = run(config(posts, tiny, tmp_path / "out", dry_run=True))
    said = capsys.readouterr().out
    assert "240 rows" in said and "toxicity: 5" in said and "about 0:0" in said
    assert result.plan.seconds > 0 and not (tmp_path / "out").exists()


def test_another_run_in_the_folder_is_refused(posts, tiny, trained):
    with pytest.raises(OutputError, match="--overwrite"):
        run(config(posts, tiny, trained.output, seed=7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": ()}, "--positive"),
        ({"label_column": "nowhere"}, "no column 'nowhere'"),
        ({"positive": ("worse",)}, "never on"),
        ({"max_length": 512}, "more than .* can see"),
        ({"model": "smollm2"}, "not an encoder"),
        ({"model": "nowhere"}, "no model 'nowhere'"),
        ({"data": ("nowhere.csv",)}, "no such input"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(posts, tiny, tmp_path, options, message):
    with pytest.raises(TamisError, match=message) as caught:
        run(config(posts, tiny, tmp_path / "out", **options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_wrong_settings_are_named_by_their_option():
    with pytest.raises(InputError, match=r"^--batch-size: "):
        make_config(TrainScorerConfig, {"data": ("x",), "output": "y", "batch_size": 0})
    with pytest.raises(InputError, match=r"^--colour: "):
        make_config(TrainScorerConfig, {"data": ("x",), "output": "y", "colour": "red"})


def test_the_command_takes_what_the_help_shows(posts, tiny, tmp_path):
    from pipelines.cli import app

    words = ["train", "scorer", posts, "--model", tiny, "--label-column", "verdict", "--positive", "bad"]
    words += [
        "--output",
        str(tmp_path / "out"),
        "--max-length",
        "32",
        "--max-steps",
        "2",
        "--threads",
        "1",
        "--quiet",
    ]
    done = CliRunner().invoke(
        app, [*words, "--set", "device=cpu", "--set", "save-steps=1", "--training-data", "mine"]
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["run"]["steps"] == 2 and record["training_data"] == "mine"
    assert record["run"]["settings"]["save_steps"] == 1
    shown = CliRunner().invoke(app, ["train", "scorer", "--help"])
    assert "Example" in shown.output


def test_a_scorer_whose_weights_are_unsound_says_so(trained, tmp_path):
    import shutil

    import torch
    from safetensors.torch import save_file

    folder = shutil.copytree(trained.output, tmp_path / "copy")
    broken = weights(folder)
    broken["classifier.weight"][0, 0] = torch.nan
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is not a number"):
        registry.load("scorer", f"hf:{folder}").score(TEXTS)
