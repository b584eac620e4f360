"""What a training starts from: known by its bytes, and whole."""

from __future__ import annotations

import json

import pytest

from models.training.classifier import resolve_encoder
from models.training.loading import LoraSettings, add_lora, load_model, load_tokenizer, resolve_model
from schemas.errors import ModelError
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
