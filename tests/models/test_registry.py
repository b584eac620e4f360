"""Models by name: one part a process, and one line about what is wrong before any work."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading

import pytest

from models import registry, store
from schemas.errors import ModelError
from tests.models.tiny_classifier import save_classifier
from tests.models.tiny_lm import save_adapter, save_base, save_tiny_lm


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMIS_HOME", str(tmp_path / "home"))


def test_a_part_is_loaded_once_for_each_name_and_options(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("moron\n")
    first = registry.load("scorer", "lexicon")
    assert registry.load("scorer", "lexicon") is first
    assert registry.load("scorer", f"lexicon:{words}") is not first
    registry.forget()
    assert registry.load("scorer", "lexicon") is not first


def test_threads_that_ask_together_get_the_same_part(tmp_path, monkeypatch):
    folder = save_classifier(tmp_path / "model", labels=("neutral", "toxic"))
    from models.scorers import sequence

    loads = []
    build = sequence.SequenceScorer.__init__

    def counted(self, *args, **kwargs):
        loads.append(1)
        build(self, *args, **kwargs)

    counted.__signature__ = inspect.signature(build)
    monkeypatch.setattr(sequence.SequenceScorer, "__init__", counted)
    parts = []
    threads = [
        threading.Thread(target=lambda: parts.append(registry.load("scorer", f"hf:{folder}")))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and len(parts) == 5 and len(set(map(id, parts))) == 1


def test_a_part_that_failed_to_load_can_be_asked_for_again(tmp_path):
    words = tmp_path / "words.txt"
    with pytest.raises(ModelError):
        registry.load("scorer", f"lexicon:{words}")
    words.write_text("moron\n")
    assert registry.load("scorer", f"lexicon:{words}").terms == ("moron",)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("judge", "linear", "no kind of model 'judge'"),
        ("scorer", "nope", "no scorer 'nope'; choose one of: lexicon, linear, jigsaw-bilstm"),
        ("scorer", "hf:", "no scorer 'hf:'"),
        ("encoder", "linear", "no encoder 'linear'"),
        ("lm", "minilm", "no lm 'minilm'"),
        ("scorer", "linear", "run: tamis models pull linear"),
        ("scorer", "six-label", "run: tamis models pull jigsaw-bilstm"),
        ("encoder", "minilm", "run: tamis models pull minilm"),
        ("lm", "smollm2", "run: tamis models pull smollm2"),
        ("lm", "openai:localhost", "openai:<base url>#<model>"),
        ("lm", "openai:http://localhost:8000/v1", "openai:<base url>#<model>"),
        ("lm", "/no/such/folder", "there is no folder /no/such/folder"),
        ("lm", "hf:someone/something", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_name_that_cannot_be_had_says_what_to_do(empty_home, kind, name, message):
    for ask in (registry.describe, registry.load):
        with pytest.raises(ModelError, match=message) as caught:
            ask(kind, name)
        assert "\n" not in str(caught.value)


def test_an_unknown_option_is_refused_and_the_known_ones_named(tmp_path):
    with pytest.raises(ModelError, match="lexicon has no option 'colour'; it takes threads, device"):
        registry.describe("scorer", "lexicon", colour="red")
    with pytest.raises(ModelError, match=r"has no option 'colour'; it takes label, device"):
        registry.describe("scorer", f"hf:{tmp_path}", colour="red")
    with pytest.raises(ModelError, match="has no option 'tone'; it takes adapter"):
        registry.describe("lm", str(tmp_path), tone="soft")


def test_options_of_running_are_taken_by_every_scorer():
    for name in ("lexicon", "linear", "jigsaw-bilstm"):
        if name == "lexicon" or store.available(name):
            registry.describe("scorer", name, threads=1, device="cpu", dtype="float32", token_budget=1024)


def test_a_folder_is_described_as_it_is_loaded(tmp_path):
    folder = save_classifier(tmp_path / "model", labels=("neutral", "toxic"))
    info = registry.describe("scorer", f"hf:{folder}")
    assert info == registry.load("scorer", f"hf:{folder}").info
    assert (info.name, info.kind, len(info.revision)) == (f"hf:{folder}", "scorer", 16)
    assert info.revision == store.sha256_of(folder / "model.safetensors")[:16]
    other = save_classifier(tmp_path / "other", labels=("neutral", "toxic"), seed=1)
    assert registry.describe("scorer", f"hf:{other}").revision != info.revision


def test_a_hub_model_is_pinned_to_its_commit(tmp_path, monkeypatch):
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = save_classifier(tmp_path / commit, labels=("neutral", "toxic"))
    asked = []

    def snapshot(repository, *, revision, allow_patterns, local_files_only):
        asked.append((repository, revision, local_files_only))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    info = registry.describe("scorer", "hf:someone/toxic-tiny@v2")
    assert (info.revision, info.source) == (commit, "someone/toxic-tiny@v2")
    assert asked == [("someone/toxic-tiny", "v2", True)]  # HF_HUB_OFFLINE is set in tests
    assert registry.load("scorer", "hf:someone/toxic-tiny@v2").score(["idiot"]).shape == (1, 1)


def test_a_language_model_is_a_bare_folder_or_hf(tmp_path):
    folder = save_tiny_lm(tmp_path / "lm")
    bare, named = registry.describe("lm", str(folder)), registry.describe("lm", f"hf:{folder}")
    assert bare == named and bare.kind == "lm" and bare.name == f"hf:{folder}"
    part = registry.load("lm", str(folder), threads=1)
    assert part.info.revision == bare.revision and part.count_tokens("tea") == 3


def test_a_server_is_described_as_it_is_loaded():
    from models.lm.dummy_server import DummyServer

    with DummyServer() as server:
        name = f"openai:{server.url}#dummy"
        info = registry.describe("lm", name, threads=1, timeout=5.0)  # threads mean nothing to a server
        part = registry.load("lm", name, threads=1, timeout=5.0)
        assert part.info == info and part.timeout == 5.0
        with pytest.raises(ModelError, match="has no option 'adapter'; it takes"):
            registry.describe("lm", name, adapter="detox")


def test_the_options_of_a_local_language_model_are_the_ones_listed():
    from models.lm.local import LocalLanguageModel

    keywords = inspect.signature(LocalLanguageModel).parameters.values()
    known = {p.name for p in keywords if p.kind is p.KEYWORD_ONLY} - {"name"}
    assert set(registry.LOCAL_LM_OPTIONS) == known


def test_names_cover_every_kind_and_say_what_is_here(empty_home):
    rows = registry.names()
    assert {row.kind for row in rows} == set(registry.KINDS)
    states = {row.name: row.state for row in rows}
    assert states["lexicon"] == "built in" and states["smollm2"] == "not pulled"
    assert {"detoxify:<variant>", "openai:<url>#<model>"} <= set(states)


def test_describing_embedded_models_and_listing_names_load_no_torch(empty_home):
    code = (
        "import sys; from models import registry\n"
        "registry.names(); registry.describe('scorer', 'lexicon')\n"
        "try: registry.describe('lm', 'smollm2', adapter='detox')\n"
        "except Exception as e: assert 'tamis models pull smollm2' in str(e), e\n"
        "assert not {'torch', 'transformers', 'sklearn', 'apache_beam'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_steered_models_that_differ_in_settings_share_their_weights_also_from_a_store(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("TAMIS_HOME", str(tmp_path / "home"))
    base = save_base(tmp_path / "base", 0)
    adapter = save_adapter(tmp_path / "out/_tamis/toxic-model", base, 1)
    memory = fsspec.filesystem("memory")
    memory.put(str(adapter), "/registry-test/_tamis/toxic-model", recursive=True)
    options = {"toxic_adapter": "memory://registry-test/_tamis/toxic-model", "dtype": "float32"}
    loaded = [
        registry.load("lm", str(base), socd=(("mode", mode),), **options)
        for mode in ("logratio", "prompt_only", "official")
    ]
    assert len({id(model.base) for model in loaded}) == 1
    local = registry.describe("lm", str(base), socd=(("mode", "logratio"),), toxic_adapter=str(adapter))
    assert loaded[0].info.tag == local.tag
    assert (tmp_path / "home/fetched").is_dir()
    with pytest.raises(ModelError, match="no model folder at memory://registry-test/nothing"):
        registry.describe(
            "lm", str(base), socd=(("mode", "logratio"),), toxic_adapter="memory://registry-test/nothing"
        )
    registry.forget()
