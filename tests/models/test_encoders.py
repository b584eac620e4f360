"""The encoder: unit vectors, the library's own, in order, long texts whole, the same in any company."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models import registry, store
from models.encoder_folder import describe_encoder, read_settings
from models.protocols import Encoder
from schemas.errors import ModelError
from tests.models.tiny_classifier import WORDS, save_settings
from tests.models.tiny_encoder import PROMPTS, old_layout, save_encoder

SENTENCES = ["the tea was very good", "nice garden", "you are not an idiot , are you ?", "train", "zigzag !"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(folder):
    return registry.load("encoder", f"hf:{folder}")


def test_vectors_equal_the_librarys(folder, encoder):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(str(folder), device="cpu").encode(SENTENCES, normalize_embeddings=True)
    assert isinstance(encoder, Encoder) and encoder.dimension == 32
    vectors = encoder.encode(SENTENCES)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert (vectors @ vectors.T)[0, 1:].max() < 0.999  # the comparison means something


@settings(max_examples=15, deadline=None)
@example(["the", "the " * 40])  # one window beside several
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=50).map(" ".join), min_size=1, max_size=10))
def test_a_vector_has_unit_length_and_is_the_same_in_any_company(encoder, texts):
    together = encoder.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_array_equal(encoder.encode([text])[0], row)


def test_the_end_of_a_long_text_counts(encoder):
    start = "the garden was nice . " * 20
    one, two = encoder.encode([start + "you idiot " * 20, start + "lovely dinner " * 20])
    assert float(one @ two) < 0.9999
    windows = 2 * encoder.limit
    assert len(encoder.tokenizer(start)["input_ids"]) > windows


def test_a_long_text_is_the_mean_of_its_windows(encoder):
    words = [WORDS[i % 20] for i in range(60)]  # one token each, and 30 fit beside the two marks
    parts = encoder.encode([" ".join(words[:30]), " ".join(words[30:])])
    mean = parts.mean(axis=0)
    np.testing.assert_allclose(encoder.encode([" ".join(words)])[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_no_texts_give_no_rows_and_an_empty_one_a_vector(encoder):
    assert encoder.encode([]).shape == (0, 32)
    assert np.linalg.norm(encoder.encode([""])[0]) == pytest.approx(1.0)


def test_bfloat16_is_an_option(folder, encoder):
    half = registry.load("encoder", f"hf:{folder}", dtype="bfloat16")
    gap = 1 - (half.encode(SENTENCES) * encoder.encode(SENTENCES)).sum(axis=1)
    assert 0 < np.abs(gap).max() < 0.01


def test_a_model_that_overflows_names_the_text(folder):
    import torch

    broken = registry.load("encoder", f"hf:{folder}", token_budget=77)
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="vector of text 0"):
        broken.encode(["tea"])


def test_a_folder_without_weights_is_refused_before_work(tmp_path):
    with pytest.raises(ModelError, match="holds no weights"):
        registry.describe("encoder", f"hf:{save_settings(tmp_path / 'bare')}")


# ------------------------------------------------------------------------- prompts, pooling, long texts, what was done


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """A model with prompts that compares by inner product and does not normalise."""
    return save_encoder(
        tmp_path_factory.mktemp("prompted"), prompts=PROMPTS, normalize=False, similarity="dot", pooling="cls"
    )


def library(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def test_a_folder_says_how_its_model_wants_to_be_used(prompted, folder):
    settings = read_settings(prompted)
    assert (settings.pooling, settings.normalizes, settings.similarity) == ("cls", False, "dot")
    assert settings.prompt("query") == PROMPTS["query"]
    assert settings.prompt("document") == PROMPTS["passage"]  # there is no `document`
    assert settings.prompt("document", "query") == PROMPTS["query"]
    assert settings.prompt("document", "query", "") == ""
    with pytest.raises(ModelError, match=r"no prompt 'web'.*passage, query"):
        settings.prompt("query", "web")
    plain = read_settings(folder)
    assert (plain.pooling, plain.normalizes, plain.dimension, plain.prompt("query")) == ("mean", True, 32, "")
    assert describe_encoder("hf:x", prompted).extra["pooling"] == "cls"


def test_pooling_of_older_folders_is_understood(tmp_path):
    assert read_settings(old_layout(save_encoder(tmp_path, pooling="lasttoken"))).pooling == "lasttoken"


def test_prompts_and_raw_vectors_are_the_librarys(prompted):
    encoder = registry.load("encoder", f"hf:{prompted}")
    theirs = library(prompted)
    for kind, name in (("query", "query"), ("document", "passage")):
        ours = encoder.embed(SENTENCES, prompt=encoder.settings.prompt(kind), kind=kind)
        np.testing.assert_allclose(ours.vectors, theirs.encode(SENTENCES, prompt_name=name), atol=1e-5)
        np.testing.assert_allclose(ours.norms, np.linalg.norm(ours.vectors, axis=1), rtol=1e-6)
        assert ours.norms.std() > 0 and not ours.truncated.any()


def test_a_prompt_can_be_kept_out_of_the_pool(tmp_path):
    model = save_encoder(tmp_path, prompts=PROMPTS, include_prompt=False)
    encoder = registry.load("encoder", f"hf:{model}")
    expected = library(model).encode_query(SENTENCES)
    ours = encoder.embed(SENTENCES, prompt=PROMPTS["query"], kind="query").vectors
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    whole = registry.load("encoder", f"hf:{save_encoder(tmp_path / 'whole', prompts=PROMPTS)}")
    assert np.abs(ours - whole.embed(SENTENCES, prompt=PROMPTS["query"]).vectors).max() > 1e-3


@pytest.mark.parametrize("mode", ["cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
def test_pooling_can_be_set(folder, encoder, mode, tmp_path):
    other = registry.load("encoder", f"hf:{folder}", pooling=mode)
    expected = library(save_encoder(tmp_path, pooling=mode)).encode(SENTENCES)
    np.testing.assert_allclose(other.embed(SENTENCES).vectors, expected, atol=1e-6)
    assert other.variant != encoder.variant


def test_no_such_pooling_is_said(folder):
    with pytest.raises(ModelError, match="no pooling 'median'; choose one of: mean, cls"):
        registry.load("encoder", f"hf:{folder}", pooling="median")


def test_dense_layers_are_computed_and_dimensions_cut_before_normalising(tmp_path):
    model = save_encoder(tmp_path, dense=24)
    encoder = registry.load("encoder", f"hf:{model}")
    assert encoder.dimension == read_settings(model).dimension == 24
    whole = encoder.embed(SENTENCES).vectors
    np.testing.assert_allclose(whole, library(model).encode(SENTENCES), atol=1e-6)
    short = encoder.embed(SENTENCES, dimensions=8).vectors
    cut = whole[:, :8]
    np.testing.assert_allclose(short, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(ModelError, match="24 dimensions, not 25"):
        encoder.embed(SENTENCES, dimensions=25)


def test_truncating_is_what_the_library_does_and_is_reported(folder, encoder):
    long = " ".join(WORDS[i % 20] for i in range(90))
    done = encoder.embed([long, "nice tea"], long="truncate")
    np.testing.assert_allclose(done.vectors, library(folder).encode([long, "nice tea"]), atol=1e-6)
    assert done.truncated.tolist() == [True, False] and done.windows.tolist() == [1, 1]
    assert done.tokens.tolist() == [92, 4]
    whole = encoder.embed([long, "nice tea"], long="mean")
    assert whole.truncated.tolist() == [False, False] and whole.windows.tolist() == [3, 1]
    assert whole.tokens.tolist() == [92, 4]
    assert float(whole.vectors[0] @ done.vectors[0]) < 0.9999


def test_every_window_of_a_long_text_stands_behind_the_prompt(folder, encoder):
    prompt = "the tea . "  # three tokens: windows hold 32 - 2 - 3 - 2 more
    words = [WORDS[i % 20] for i in range(50)]
    done = encoder.embed([" ".join(words)], prompt=prompt)
    parts = encoder.embed([" ".join(words[:25]), " ".join(words[25:])], prompt=prompt).vectors
    assert done.windows.tolist() == [2]
    mean = parts.mean(axis=0)
    np.testing.assert_allclose(done.vectors[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_prompt_that_fills_the_model_is_refused(encoder):
    with pytest.raises(ModelError, match="leaves no room for text"):
        encoder.embed(["tea " * 40], prompt="the " * 30)


def test_a_book_in_one_row_is_embedded_in_parts(encoder, monkeypatch):
    from models import encoder_text

    text = " ".join(WORDS[i % 20] for i in range(600))
    expected = encoder.embed([text, "tea"])
    monkeypatch.setattr(encoder_text, "PART_CHARACTERS", 1000)
    parts = encoder.embed([text, "tea"])
    assert parts.tokens[0] == pytest.approx(expected.tokens[0], abs=6)  # a word cut in two has other pieces
    assert float(parts.vectors[0] @ expected.vectors[0]) > 0.99
    np.testing.assert_array_equal(parts.vectors[1], expected.vectors[1])
    assert encoder.embed([text], long="truncate").truncated.tolist() == [True]


def test_a_model_the_library_must_run_gives_the_librarys_vectors(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    base = save_settings(tmp_path / "base", limit=32)
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    weights = rng.standard_normal((tokenizer.get_vocab_size(), 16)).astype(np.float32)
    module = StaticEmbedding(tokenizer, embedding_weights=weights)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "static"))
    encoder = registry.load("encoder", f"hf:{tmp_path / 'static'}")
    done = encoder.embed(SENTENCES)
    np.testing.assert_allclose(done.vectors, library(tmp_path / "static").encode(SENTENCES), atol=1e-6)
    assert encoder.dimension == 16 and done.tokens.tolist() == [0] * 5


def test_a_folder_may_keep_its_transformer_below(tmp_path):
    import json

    model = save_encoder(tmp_path)
    inner = model / "0_Transformer"
    inner.mkdir()
    chain = json.loads((model / "modules.json").read_text())
    chain[0]["path"] = inner.name
    (model / "modules.json").write_text(json.dumps(chain))
    names = {"config.json", "model.safetensors", "sentence_bert_config.json"}
    for file in model.iterdir():
        if file.name in names or file.name.startswith("tokenizer") or file.name == "vocab.txt":
            file.rename(inner / file.name)
    encoder = registry.load("encoder", f"hf:{model}")
    assert len(encoder.info.revision) == 16 and encoder.settings.dimension == 32
    assert encoder.encode(SENTENCES).shape == (5, 32)


@pytest.mark.models
def test_minilm_equals_sentence_transformers_alone_and_in_company():
    if not store.available("minilm"):
        pytest.skip("run: tamis models pull minilm")
    minilm = registry.load("encoder", "minilm")
    texts = [
        "Statins lower cholesterol.",
        "Der Hund schläft auf dem Sofa.",
        "東京は日本の首都です。",
        "🙂 ok",
        "one word",
        "The trial enrolled 412 adults over two years, and " * 4,
        "Long text about gardens, trains and tea. " * 60,
    ]
    theirs = library(store.path("minilm")).encode(texts)
    together = minilm.embed(texts, long="truncate")
    np.testing.assert_allclose(together.vectors, theirs, atol=1e-6)
    assert together.truncated.tolist() == [False] * 6 + [True]
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(minilm.embed([text], long="truncate").vectors[0], together.vectors[i])


@pytest.mark.models
def test_minilm_puts_paraphrases_beside_each_other():
    if not store.available("minilm"):
        pytest.skip("run: tamis models pull minilm")
    minilm = registry.load("encoder", "minilm")
    a, b, c = minilm.encode(["A cat sits on the mat.", "The cat is on a mat.", "Stocks fell on Tuesday."])
    assert minilm.dimension == 384 and minilm.limit == 256
    assert a @ b > 0.8 and a @ c < 0.3
