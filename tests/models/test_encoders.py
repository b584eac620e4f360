"""The encoder: unit vectors, the library's own, in order, long texts whole, the same in any company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models import registry, store
from models.protocols import Encoder
from schemas.errors import ModelError
from tests.models.tiny_classifier import WORDS, save_settings

SENTENCES = ["the tea was very good", "nice garden", "you are not an idiot , are you ?", "train", "zigzag !"]


def save_encoder(folder: Path, *, limit: int = 32) -> Path:
    """A random two-layer `sentence-transformers` model."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoConfig, BertModel

    base = save_settings(folder / "base", limit=limit)
    torch.manual_seed(3)
    model = BertModel(AutoConfig.from_pretrained(base))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(base)
    words = Transformer(str(base), max_seq_length=limit)
    parts = [words, Pooling(32, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder / "model"))
    return folder / "model"


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


@pytest.mark.models
def test_minilm_puts_paraphrases_beside_each_other():
    if not store.available("minilm"):
        pytest.skip("run: tamis models pull minilm")
    minilm = registry.load("encoder", "minilm")
    a, b, c = minilm.encode(["A cat sits on the mat.", "The cat is on a mat.", "Stocks fell on Tuesday."])
    assert minilm.dimension == 384 and minilm.limit == 256
    assert a @ b > 0.8 and a @ c < 0.3
