"""Neural scorers: Detoxify's numbers from a verified, converted checkpoint; any classifier folder's toxic label."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import registry, store
from models.protocols import ToxicityScorer
from models.scorers import detoxify
from models.scorers.hf import choose_head
from schemas.errors import ModelError
from tests.models.tiny_classifier import LABELS, WORDS, save_classifier, save_detoxify, save_settings

SENTENCES = [
    "you are a stupid idiot !",
    "the committee meets on tuesday .",
    "moron",
    "thank you for the lovely dinner , it was very good and we are so nice . " * 2,
    "unheard words zigzag",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny checkpoint in Detoxify's layout and its settings folder; the cache is this module's own."""
    folder = tmp_path_factory.mktemp("detoxify")
    config = save_settings(folder / "config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAMIS_HOME", str(folder / "home"))
        yield save_detoxify(folder, config), config


@pytest.fixture(scope="module")
def scorer(files):
    checkpoint, config = files
    return registry.load("scorer", "detoxify:original", checkpoint=str(checkpoint), config=str(config))


def test_detoxify_scores_equal_the_librarys(files, scorer):
    from detoxify import Detoxify

    checkpoint, config = files
    expected = Detoxify(checkpoint=str(checkpoint), huggingface_config_path=str(config)).predict(SENTENCES)
    assert isinstance(scorer, ToxicityScorer)
    assert scorer.labels == tuple(expected) and scorer.labels[0] == "toxicity"
    scores = scorer.score(SENTENCES)
    np.testing.assert_allclose(scores, np.array(list(expected.values())).T, atol=1e-6)
    assert np.ptp(scores[:, 0]) > 0.01  # the comparison means something: texts do differ


def test_detoxify_is_converted_once_and_loads_without_its_pickle(files, scorer):
    checkpoint, config = files
    folder, info = detoxify.prepare("original", checkpoint=checkpoint, config=config)
    assert (info.name, info.training_data) == ("detoxify:original", "jigsaw-2018")
    assert store.sha256_of(checkpoint).startswith(info.revision)
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("*.ckpt"))
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again, _ = detoxify.prepare("original", checkpoint=checkpoint, config=config)
    assert again == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    described = registry.describe(
        "scorer", "detoxify:original", checkpoint=str(checkpoint), config=str(config)
    )
    assert described == scorer.info and described.extra["labels"] == list(scorer.labels)


def test_a_checkpoint_that_is_not_what_its_name_says_is_not_opened(files, tmp_path):
    checkpoint, config = files
    cut = tmp_path / checkpoint.name
    cut.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"partial download.*not opened"):
        detoxify.prepare("original", checkpoint=cut, config=config)


def test_a_checkpoint_without_a_hash_in_its_name_needs_one(files, tmp_path):
    checkpoint, config = files
    bare = tmp_path / "model.ckpt"
    shutil.copy(checkpoint, bare)
    with pytest.raises(ModelError, match="pass sha256="):
        detoxify.prepare("original", checkpoint=bare, config=config)
    with pytest.raises(ModelError, match="pass sha256="):
        detoxify.prepare("original", checkpoint=bare, config=config, sha256="ab")
    digest = store.sha256_of(checkpoint)
    folder, _ = detoxify.prepare("original", checkpoint=bare, config=config, sha256=digest)
    assert folder.is_dir()


def test_what_is_missing_is_said_before_anything_is_loaded(files, tmp_path):
    checkpoint, _ = files
    with pytest.raises(ModelError, match="choose one of: original, unbiased"):
        registry.describe("scorer", "detoxify:enormous")
    with pytest.raises(ModelError, match=r"no checkpoint.*pass checkpoint="):
        registry.describe("scorer", "detoxify:unbiased", checkpoint=str(tmp_path / "no-12345678.ckpt"))
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        registry.describe(
            "scorer", "detoxify:unbiased", checkpoint=str(checkpoint), config=str(checkpoint.parent)
        )
    with pytest.raises(ModelError, match=r"pass config=FOLDER"):  # the hub is out of reach in tests
        registry.describe("scorer", "detoxify:unbiased", checkpoint=str(checkpoint))


def test_a_checkpoint_of_another_shape_is_refused(files, tmp_path):
    checkpoint, _ = files
    wide = save_settings(tmp_path / "wide", hidden_size=48, num_attention_heads=3)
    with pytest.raises(ModelError, match="does not fit the configuration"):
        detoxify.prepare("original", checkpoint=checkpoint, config=wide)
    deep = save_settings(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"does not fit.*encoder\.layer\.2"):
        detoxify.prepare("original", checkpoint=checkpoint, config=deep)
    assert not list(store.models_folder().glob(".work-*"))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=90).map(" ".join), min_size=1, max_size=10))
def test_a_score_is_the_same_in_any_company(scorer, texts):
    together = scorer.score(texts)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_array_equal(scorer.score([text])[0], row)


def test_a_long_text_scores_the_maximum_of_its_windows(scorer):
    words = [WORDS[i % len(WORDS)] for i in range(0, 900, 7)]
    text = " ".join(words)
    encoded = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(encoded) > scorer.limit
    room, overlap = scorer.limit - 2, scorer.limit // 8
    pieces = [encoded[i : i + room] for i in range(0, len(encoded) - overlap, room - overlap)]
    alone = np.stack([scorer.score([scorer.tokenizer.decode(piece)])[0] for piece in pieces])
    np.testing.assert_allclose(scorer.score(["moron", text])[1], alone.max(axis=0), atol=1e-6)


def test_an_empty_text_scores_zero_and_no_texts_give_no_rows(scorer):
    scores = scorer.score(["", "idiot", " \n"])
    assert not scores[[0, 2]].any() and scores[1].all()
    assert scorer.score([]).shape == (0, len(LABELS))


def test_a_model_that_overflows_names_the_text(files, tmp_path):
    import torch

    part = registry.load("scorer", f"hf:{save_classifier(tmp_path / 'm', labels=('ok', 'toxic'))}")
    with torch.no_grad():
        list(part.model.parameters())[-1].fill_(float("nan"))
    with pytest.raises(ModelError, match=r"score of text 1 \(of 2\) is not a number"):
        part.score(["", "idiot"])


# --- any Hugging Face classifier


def config_of(*labels: str, **more) -> dict:
    return {"id2label": {str(i): label for i, label in enumerate(labels)}, **more}


@pytest.mark.parametrize(
    ("config", "label", "labels", "columns", "activation"),
    [
        (config_of("LABEL_0", "LABEL_1"), None, ("toxicity",), (1,), "softmax"),
        (config_of("neutral", "toxic"), None, ("toxicity",), (1,), "softmax"),
        (config_of("Hate", "NotHate"), None, ("toxicity",), (0,), "softmax"),
        (config_of("hate-speech", "normal", "other"), None, ("toxicity",), (0,), "softmax"),
        (config_of("nice", "mean"), "MEAN", ("toxicity",), (1,), "softmax"),
        (config_of("nice", "mean"), "1", ("toxicity",), (1,), "softmax"),
        (config_of("mean", "nice"), 0, ("toxicity",), (0,), "softmax"),
        ({"num_labels": 2}, None, ("toxicity",), (1,), "softmax"),
        (config_of("LABEL_0"), None, ("toxicity",), (0,), "sigmoid"),
        (
            config_of("insult", "toxic", "threat", problem_type="multi_label_classification"),
            None,
            ("toxic", "insult", "threat"),
            (1, 0, 2),
            "sigmoid",
        ),
    ],
)
def test_the_toxic_label_is_found_or_named(config, label, labels, columns, activation):
    head = choose_head(config, "hf:x", label)
    assert (head.labels, head.columns, head.activation) == (labels, columns, activation)


@pytest.mark.parametrize(
    ("config", "label", "message"),
    [
        (config_of("nice", "mean"), None, "which of its labels means toxic.*nice, mean"),
        (config_of("hate", "offensive", "neither"), None, "which of its labels means toxic"),
        (config_of("LABEL_0", "LABEL_1", "LABEL_2"), None, "which of its labels means toxic"),
        (config_of("nice", "mean"), "rude", "has no label 'rude'; its labels are nice, mean"),
        (config_of("nice", "mean"), "7", "has no label '7'"),
        (config_of("nice", "mean"), 2, "has no label '2'; its labels are nice, mean"),
    ],
)
def test_a_label_that_cannot_be_told_is_asked_for(config, label, message):
    with pytest.raises(ModelError, match=message):
        choose_head(config, "hf:x", label)


def test_a_two_class_folder_scores_its_softmax(tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_classifier(tmp_path / "model", labels=("neutral", "toxic"))
    part = registry.load("scorer", f"hf:{folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [model(**tokenizer(t, return_tensors="pt")).logits.softmax(-1)[0, 1] for t in SENTENCES]
    np.testing.assert_allclose(part.score(SENTENCES)[:, 0], np.array(expected), atol=1e-6)
    assert part.labels == ("toxicity",) and part.info.extra["labels"] == ["toxicity"]


def test_label_is_an_option_and_belongs_to_the_part(tmp_path):
    folder = save_classifier(tmp_path / "model", labels=("nice", "mean"))
    with pytest.raises(ModelError, match="pass label="):
        registry.describe("scorer", f"hf:{folder}")
    mean = registry.load("scorer", f"hf:{folder}", label="mean")
    nice = registry.load("scorer", f"hf:{folder}", label="nice")
    np.testing.assert_allclose(mean.score(SENTENCES) + nice.score(SENTENCES), 1.0, atol=1e-6)


def test_bfloat16_moves_scores_a_little(tmp_path):
    folder = save_classifier(tmp_path / "model")
    whole = registry.load("scorer", f"hf:{folder}", label="toxic").score(SENTENCES)
    half = registry.load("scorer", f"hf:{folder}", label="toxic", dtype="bfloat16").score(SENTENCES)
    assert 0 < np.abs(whole - half).max() < 0.1


def test_a_folder_that_lacks_something_says_what(tmp_path):
    folder = save_classifier(tmp_path / "model", labels=("neutral", "toxic"))
    (folder / "model.safetensors").rename(tmp_path / "aside")
    with pytest.raises(ModelError, match="holds no weights"):
        registry.describe("scorer", f"hf:{folder}")
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="git-lfs pointer"):
        registry.describe("scorer", f"hf:{folder}")
    with pytest.raises(ModelError, match="there is no folder"):
        registry.describe("scorer", f"hf:{tmp_path / 'none'}")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ModelError, match="cannot be loaded"):
        registry.load("scorer", f"hf:{folder}")


def test_a_folder_without_a_trained_head_is_refused(tmp_path):
    from transformers import BertModel

    folder = save_classifier(tmp_path / "model", labels=("neutral", "toxic"))
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    shutil.copy(tmp_path / "base" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no weights for classifier\.bias"):
        registry.load("scorer", f"hf:{folder}")


def test_a_tokenizer_limit_below_the_models_is_kept(tmp_path):
    folder = save_classifier(tmp_path / "model", labels=("neutral", "toxic"), limit=32)
    settings_file = folder / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"model_max_length": 16}))
    assert registry.load("scorer", f"hf:{folder}").limit == 16
