"""A tagger end to end on a tiny encoder: it learns, loads everywhere, and finds the same spans in any company."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import registry
from models.metrics.spans import mean_character_f1, offsets_of
from models.protocols import SpanFinder
from models.scorers.tagger import decode_spans, read_output
from models.training.tagger_session import tune_threshold
from pipelines.train_spans import TrainSpansConfig, run
from schemas import flight
from schemas.errors import InputError, ModelError
from tests.jobs.test_train_scorer import sentences
from tests.models.tiny_classifier import WORDS, save_classifier, save_settings

RUDE = ("idiot", "stupid", "moron", "fool")


def marked(n=160):
    """Texts whose rude words are the gold spans."""
    for text, _ in sentences(n):
        offsets = [i for w in RUDE if (at := text.find(w)) >= 0 for i in range(at, at + len(w))]
        yield {"text": text, "spans": sorted(offsets)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import torch
    from transformers import AutoConfig, AutoModel

    folder = tmp_path_factory.mktemp("spans")
    tiny = save_settings(folder / "tiny", initializer_range=0.2)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(tiny)).save_pretrained(tiny)
    lines = [f'"{json.dumps(row["spans"])}",{row["text"]}' for row in marked()]
    (folder / "posts.csv").write_text("\n".join(["spans,text", *lines]))
    config = TrainSpansConfig(
        data=f"{folder}/posts.csv", model=str(tiny), output=f"{folder}/tagger", max_length=32, batch_size=8, epochs=12,
        learning_rate=4e-3, save_steps=500, eval_fraction=0.3, threads=1, device="cpu", quiet=True,
    )  # fmt: skip
    return run(config)


@pytest.fixture(scope="module")
def tagger(trained):
    return registry.load("tagger", f"hf:{trained.output}")


def test_it_learns_and_says_how_well(trained, tagger):
    results = trained.record["results"]
    figure = results["test"]["character F1"]
    assert figure["value"] > 0.8 and figure["low"] <= figure["value"] <= figure["high"]
    assert tagger.threshold == results["decoding"]["threshold"] == read_output(trained.output, "x").threshold
    posts = list(marked(300))[160:]
    found = [offsets_of(spans) for spans in tagger.find([p["text"] for p in posts])]
    assert mean_character_f1(found, [set(p["spans"]) for p in posts]) > 0.8
    assert "Character F1".lower() in (trained.output / "README.md").read_text().lower()


def test_it_is_an_ordinary_token_classifier(trained):
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(str(trained.output))
    assert model.config.id2label == {0: "O", 1: "TOXIC"}


def test_the_registry_says_what_it_is(trained, tagger):
    info = registry.describe("tagger", f"hf:{trained.output}")
    assert isinstance(tagger, SpanFinder)
    assert (info.kind, info.training_data) == ("tagger", trained.record["training_data"])
    assert registry.describe("tagger", str(trained.output)).revision == info.revision


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=0, max_size=120).map(" ".join), min_size=1, max_size=6)
)
def test_a_text_is_tagged_alike_in_any_company(tagger, texts):
    """Bit for bit, also texts longer than the model sees; spans are ascending, disjoint, and within the text."""
    together = tagger.character_probabilities(texts)
    for text, probabilities in zip(texts, together, strict=True):
        assert np.array_equal(probabilities, tagger.character_probabilities([text])[0])
        assert (
            probabilities.shape == (len(text),) and (probabilities >= 0).all() and (probabilities <= 1).all()
        )
        spans = decode_spans(text, probabilities, 0.3)
        assert all(0 <= s.start < s.end <= len(text) and 0.3 <= s.score <= 1 for s in spans)
        assert all(a.end < b.start for a, b in itertools.pairwise(spans))


def test_long_texts_are_tagged_to_their_end(tagger):
    """Every word is covered by a token of some window: softmax gives none of them a flat zero."""
    text = "nice tea " * 200 + "idiot"
    assert len(text.split()) > 4 * tagger.limit
    probabilities = tagger.character_probabilities([text])[0]
    assert all((p > 0) == (c != " ") for p, c in zip(probabilities, text, strict=True))


def test_texts_without_words_have_no_spans(tagger):
    assert tagger.find(["", "  ", "...", "\n"]) == [[], [], [], []]
    assert tagger.find([]) == []


def test_neighbours_are_one_span_and_punctuation_parts_them():
    text = "you damn fool, idiot"
    high = np.array([0.0] * 4 + [0.9] * 9 + [0.0] * 2 + [0.8] * 5, np.float32)
    assert [(s.start, s.end) for s in decode_spans(text, high, 0.5)] == [(4, 13), (15, 20)]
    assert decode_spans(text, high, 0.95) == []


def test_the_threshold_is_the_one_that_scores_best():
    texts = ["damn tea"] * 10
    characters = [np.array([0.7] * 4 + [0.0] + [0.5] * 3, np.float32)] * 10
    assert 0.5 < tune_threshold(texts, characters, [frozenset(range(4))] * 10) <= 0.7
    assert tune_threshold([], [], []) == 0.5


def test_the_detox_job_localises_with_it(trained, tagger):
    from transforms.detox.options import LocalizeOptions
    from transforms.detox.steps import LocalizeToxicSpans
    from transforms.shards.steps import StepContext, apply_step

    rude = next(p["text"] for p in marked() if tagger.find([p["text"]])[0])
    found = tagger.find([rude])[0]
    step = LocalizeToxicSpans(LocalizeOptions(sources=("tagger",), tagger=f"hf:{trained.output}"))
    text = f"we meet . {rude}"
    batch = flight.launch(pa.record_batch({"text": [text]}), first_row=0, ids=pa.array(["a"]))
    segments = [{"start": 0, "end": 9, "flagged": False}, {"start": 10, "end": len(text), "flagged": True}]
    batch = flight.set_attribute(batch, "toxicity", pa.array([{"flagged": True, "segments": segments}]))
    context = StepContext(text_column="text")
    step.setup(context)
    spans = flight.attribute(apply_step(step, batch, context), "spans").to_pylist()[0]
    assert [(s["start"], s["end"], s["source"]) for s in spans] == [
        (s.start + 10, s.end + 10, "tagger") for s in found
    ]
    with pytest.raises(ValueError, match=r"localize\.tagger"):
        LocalizeOptions(sources=("tagger",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "no folder"),
        (save_classifier, "not a token classifier"),
        (
            lambda folder: save_settings(
                folder, architectures=["BertForTokenClassification"], labels=("A", "B")
            ),
            "no one class called TOXIC",
        ),
    ],
)
def test_what_is_no_tagger_is_refused(tmp_path, make, message):
    with pytest.raises(ModelError, match=message):
        registry.describe("tagger", f"hf:{make(tmp_path)}")


def test_other_columns_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "offsets": []}\n')
    save_settings(tmp_path / "tiny")
    save_classifier(tmp_path / "tiny")
    with pytest.raises(InputError, match=r"no column 'spans' \(columns: text, offsets\)"):
        run(
            TrainSpansConfig(
                data=str(path), model=str(tmp_path / "tiny"), output=str(Path(tmp_path / "out")), quiet=True
            )
        )
