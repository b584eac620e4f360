"""What a training starts from: known by its bytes, and whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.training.classifier import load_encoder, resolve_encoder
from models.training.loading import LoraSettings, add_lora, load_model, load_tokenizer, resolve_model
from models.training.retriever_model import load_sentence_encoder
from schemas.errors import ModelError
from tests.models.tiny_classifier import save_classifier
from tests.models.tiny_encoder import save_encoder
from tests.models.tiny_lm import save_tiny_lm

COMMIT, OTHER = "a1" * 20, "b2" * 20


def write_base(folder, *, size: int = 0, last: bytes = b"weights"):
    """A folder of nearly nothing, `size` bytes of holes in front of the last ones."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with (folder / "model.safetensors").open("wb") as stream:
        stream.seek(size)
        stream.write(last)
    return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with one model at two commits, the second one current."""
    cache = tmp_path / "hub"
    for seed, commit in enumerate((COMMIT, OTHER)):
        save_tiny_lm(cache / "models--org--tiny" / "snapshots" / commit, seed=seed)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text(OTHER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache / "models--org--tiny"


def test_a_base_is_known_as_it_was_in_earlier_versions(tmp_path):
    """Or a training that is finished would not be found again."""
    assert resolve_model(write_base(tmp_path / "base")).revision == "f8fb66d8eabbe41d"


@pytest.mark.slow  # eight gigabytes of holes are read
def test_a_large_base_is_known_by_all_its_bytes(tmp_path):
    folder = tmp_path / "base"
    before = resolve_model(write_base(folder, size=4 << 30)).revision
    after = resolve_model(write_base(folder, size=4 << 30, last=b"wEights")).revision
    assert before != after


def test_a_hub_id_is_known_by_its_commit(hub):
    now = resolve_model("hf:org/tiny")
    assert (now.revision, now.source) == (OTHER, str(hub / "snapshots" / OTHER))
    (hub / "refs" / "main").write_text(COMMIT)
    assert resolve_model("hf:org/tiny").revision == resolve_encoder("hf:org/tiny").revision == COMMIT
    assert resolve_model(f"hf:org/tiny@{OTHER}").revision == OTHER
    with pytest.raises(ModelError, match="no folder here, and the hub did not give it"):
        resolve_model("hf:org/absent")


def test_an_adapter_names_its_base_by_the_hub_id(hub, tmp_path):
    """And not by where this machine keeps it."""
    base = resolve_model(f"hf:org/tiny@{COMMIT}")
    assert len(load_tokenizer(base)) == 258
    add_lora(load_model(base), LoraSettings(r=2)).save_pretrained(tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "org/tiny"


def take_out(folder, part):
    """Write a folder's weights again without the tensors whose names hold a part."""
    path = folder / "model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if part not in key}
    save_file(kept, path, metadata={"format": "pt"})
    return str(folder)


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return str(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_that_lacks_weights_is_refused(tmp_path, tied):
    folder = save_tiny_lm(tmp_path / "lm", tie_word_embeddings=tied)
    load_model(resolve_model(str(folder)))  # a head that shares the embedding's weights is not missing
    message = (
        "lack 1 tensors"
        if not tied
        else r"lack 3 tensors.*model\.layers\.1\.mlp\.down_proj\.weight among them"
    )
    base = resolve_model(take_out(folder, "layers.1.mlp" if tied else "lm_head"))
    with pytest.raises(ModelError, match=message):
        load_model(base)


def test_weights_of_another_shape_are_refused(tmp_path):
    base = resolve_model(change(save_tiny_lm(tmp_path / "lm"), intermediate_size=40))
    with pytest.raises(ModelError, match=r"(?s)^[^\n]+$"):
        load_model(base)


@pytest.mark.parametrize("kind", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_of_an_encoder_only_head_and_pooler_may_be_new(tmp_path, kind):
    import transformers

    def load(folder):
        return load_encoder(resolve_encoder(str(folder)), getattr(transformers, kind), ("a", "b", "c"))

    folder = save_classifier(tmp_path / "six-labels")
    assert load(folder).classifier.out_features == 3  # another head than the one there is
    take_out(folder, "classifier")
    whole = load(take_out(folder, "pooler"))
    kept = load_file(folder / "model.safetensors")["bert.encoder.layer.1.output.dense.weight"]
    assert torch.equal(whole.bert.encoder.layer[1].output.dense.weight, kept)
    with pytest.raises(ModelError, match=r"lack \d+ tensors .* bert\.embeddings\."):
        load(change(folder, hidden_size=16))
    change(folder, hidden_size=32)
    with pytest.raises(ModelError, match=r"lack 16 tensors .* bert\.encoder\.layer\.1\."):
        load(take_out(folder, "layer.1"))


def test_a_sentence_encoder_that_lacks_weights_is_refused(tmp_path):
    folder = save_encoder(tmp_path)
    load_sentence_encoder(resolve_encoder(take_out(folder, "pooler")))
    base = resolve_encoder(take_out(folder, "layer.1"))
    with pytest.raises(ModelError, match=r"lack 16 tensors .* encoder\.layer\.1\."):
        load_sentence_encoder(base)
